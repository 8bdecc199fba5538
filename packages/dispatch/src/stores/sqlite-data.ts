/** Data items and chunked uploads in SQLite. Synchronous; the caller brings the transaction. */
import { MillraceError } from '@millrace/runner';
import type { Clock } from '@millrace/runner';
import type { DataRecord } from '../records.ts';
import type { DataQuery, DataWrite, LeaseRef, UploadRecord } from '../store.ts';
import type { SmallItems } from './sqlite-bytes.ts';
import type { Database, Row, Statement } from './sqlite-database.ts';
import { isoTime } from './time.ts';

const COLUMNS = 'id, domain_id, name, data_type, size, created_at, updated_at, digest';

/** A write that nothing stands in the way of. `old`: what it replaces. */
interface PlannedWrite {
  readonly write: DataWrite;
  readonly jobId: string | null;
  readonly old: DataRecord | null;
  readonly name: string;
  readonly dataType: string;
}

/** What is to be known of the leases that writes are made under. */
export interface DataLeases {
  /** Throws when the lease may not write into the domain, else gives the id of its job. */
  readonly check: (ref: LeaseRef, domainId: string) => string;
  /** It does write. */
  readonly keep: (ref: LeaseRef) => void;
}

export class Data {
  readonly #clock: Clock;
  readonly #newId: () => string;
  readonly #leases: DataLeases;
  readonly #small: SmallItems;
  readonly #selectOne: Statement;
  readonly #selectByName: Statement;
  readonly #selectAll: Statement;
  readonly #selectMaker: Statement;
  readonly #insert: Statement;
  readonly #update: Statement;
  readonly #delete: Statement;
  readonly #selectOfJob: Statement;
  readonly #deleteOfJob: Statement;
  readonly #selectDigest: Statement;
  readonly #insertUpload: Statement;
  readonly #selectUpload: Statement;
  readonly #selectExpired: Statement;
  readonly #deleteUpload: Statement;
  readonly #selectParts: Statement;
  readonly #upsertPart: Statement;
  readonly #deleteParts: Statement;

  constructor(database: Database, clock: Clock, newId: () => string, leases: DataLeases, small: SmallItems) {
    this.#clock = clock;
    this.#newId = newId;
    this.#leases = leases;
    this.#small = small;
    const sql = (text: string): Statement => database.prepare(text);
    this.#selectOne = sql(`SELECT ${COLUMNS} FROM data WHERE domain_id = ? AND id = ?`);
    this.#selectByName = sql(`SELECT ${COLUMNS} FROM data WHERE domain_id = ? AND name = ?`);
    this.#selectAll = sql(`
      SELECT ${COLUMNS} FROM data
      WHERE domain_id = ?1 AND (?2 IS NULL OR data_type = ?2) ORDER BY name LIMIT ?3`);
    this.#selectMaker = sql('SELECT job_id FROM data WHERE id = ?');
    this.#insert = sql(`INSERT INTO data (${COLUMNS}, job_id) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)`);
    this.#update = sql(
      'UPDATE data SET name = ?, data_type = ?, digest = ?, size = ?, updated_at = ? WHERE id = ?',
    );
    this.#delete = sql('DELETE FROM data WHERE domain_id = ? AND id = ?');
    this.#selectOfJob = sql('SELECT digest FROM data WHERE job_id = ?');
    this.#deleteOfJob = sql('DELETE FROM data WHERE job_id = ?');
    this.#selectDigest = sql(`
      SELECT 1 FROM data WHERE digest = ?1 UNION ALL SELECT 1 FROM computes WHERE digest = ?1 LIMIT 1`);
    this.#insertUpload = sql('INSERT INTO uploads (id, domain_id, expires_at, body) VALUES (?, ?, ?, ?)');
    this.#selectUpload = sql('SELECT id, body FROM uploads WHERE id = ?');
    this.#selectExpired = sql(
      'SELECT id, body FROM uploads WHERE expires_at <= ? ORDER BY expires_at, id LIMIT ?',
    );
    this.#deleteUpload = sql('DELETE FROM uploads WHERE id = ?');
    this.#selectParts = sql(
      'SELECT part_number, etag, size FROM upload_parts WHERE upload_id = ? ORDER BY part_number',
    );
    this.#upsertPart = sql(`
      INSERT INTO upload_parts (upload_id, part_number, etag, size) VALUES (?, ?, ?, ?)
      ON CONFLICT DO UPDATE SET etag = excluded.etag, size = excluded.size`);
    this.#deleteParts = sql('DELETE FROM upload_parts WHERE upload_id = ?');
  }

  /**
   * What stands in the way of one write is found before the first is made, so that a refusal costs no rollback.
   *
   * @throws MillraceError as {@link Store.putData}
   */
  put(writes: readonly DataWrite[]): DataRecord[] {
    const planned = writes.map((write) => this.#plan(write));
    const names = new Set<string>();
    const ids = new Set<string>();
    for (const { write, old, name } of planned) {
      const key = `${write.domainId} ${name}`;
      if (names.has(key) || (old !== null && ids.has(old.id))) {
        throw new MillraceError(
          'already_exists',
          `data item ${JSON.stringify(name)} is written twice in one request; names are unique in a domain`,
        );
      }
      names.add(key);
      if (old !== null) ids.add(old.id);
    }
    for (const { lease } of writes) if (lease) this.#leases.keep(lease);
    return planned.map((plan) => this.#apply(plan));
  }

  #plan(write: DataWrite): PlannedWrite {
    const { domainId } = write;
    const jobId = write.lease ? this.#leases.check(write.lease, domainId) : null;
    const taken = write.name === null ? undefined : this.#selectByName.get(domainId, write.name);
    let target = taken;
    if (write.id !== null) {
      target = this.#selectOne.get(domainId, write.id);
      if (!target) {
        throw new MillraceError('not_found', `data item ${write.id} does not exist in domain ${domainId}`);
      }
    } else if (write.name === null || write.dataType === null) {
      throw new MillraceError('invalid_argument', 'a new data item needs a name and a data_type');
    }
    if (taken && (taken[0] !== target?.[0] || (write.id === null && !write.replaceByName))) {
      throw new MillraceError(
        'already_exists',
        `domain ${domainId} has a data item named ${JSON.stringify(write.name)}; names are unique, replace it by its id ${String(taken[0])}`,
      );
    }
    const old = target ? recordOf(target) : null;
    if (old !== null && write.lease && write.ownOnly && this.#selectMaker.get(old.id)?.[0] !== jobId) {
      throw new MillraceError(
        'permission_denied',
        `data item ${old.id} was not made by job ${jobId}, whose tasks have an outputs prefix and may replace only what it made`,
      );
    }
    return {
      write,
      jobId,
      old,
      name: write.name ?? old?.name ?? '',
      dataType: write.dataType ?? old?.data_type ?? '',
    };
  }

  #apply({ write, jobId, old, name, dataType }: PlannedWrite): DataRecord {
    const { domainId, digest, size } = write;
    const now = this.#clock.now();
    if (write.bytes !== undefined) this.#small.put(digest, write.bytes);
    if (old !== null) {
      this.#update.run(name, dataType, digest, size, now, old.id);
      if (old.digest !== digest) this.#small.drop(old.digest);
      return { ...old, name, data_type: dataType, digest, size, updated_at: isoTime(now) };
    }
    const id = write.createId ?? this.#newId();
    const row = [id, domainId, name, dataType, size, now, now, digest];
    this.#insert.run(...row, jobId);
    return recordOf(row);
  }

  /** @see MemoItems.copy */
  copy(
    jobId: string,
    items: readonly Pick<DataRecord, 'id' | 'domain_id' | 'name' | 'data_type' | 'digest' | 'size'>[],
  ): boolean {
    if (items.some(({ domain_id, name }) => this.#selectByName.get(domain_id, name) !== undefined))
      return false;
    const now = this.#clock.now();
    for (const { id, domain_id, name, data_type, size, digest } of items) {
      this.#insert.run(id, domain_id, name, data_type, size, now, now, digest, jobId);
    }
    return true;
  }

  get(domainId: string, id: string): DataRecord | null {
    const row = this.#selectOne.get(domainId, id);
    return row ? recordOf(row) : null;
  }

  find({ domainId, ids, name, dataType, limit }: DataQuery): DataRecord[] {
    let rows: (Row | undefined)[];
    if (ids.length > 0) rows = ids.map((id) => this.#selectOne.get(domainId, id));
    else if (name !== null) rows = [this.#selectByName.get(domainId, name)];
    else rows = this.#selectAll.all(domainId, dataType, limit);
    return rows
      .flatMap((row) => (row ? [recordOf(row)] : []))
      .filter(
        (item) => (name === null || item.name === name) && (dataType === null || item.data_type === dataType),
      )
      .slice(0, limit);
  }

  delete(domainId: string, id: string): boolean {
    const item = this.get(domainId, id);
    if (item === null) return false;
    this.#delete.run(domainId, id);
    this.#small.drop(item.digest);
    return true;
  }

  /** Removes what was made under the leases of a job. Returns how many items. */
  deleteOfJob(jobId: string): number {
    const digests = this.#selectOfJob.all(jobId).map(([digest]) => digest as string);
    if (digests.length === 0) return 0;
    this.#deleteOfJob.run(jobId);
    for (const digest of new Set(digests)) this.#small.drop(digest);
    return digests.length;
  }

  unreferenced(digests: readonly string[]): string[] {
    return digests.filter((digest) => !this.#selectDigest.get(digest));
  }

  createUpload(upload: Omit<UploadRecord, 'parts'>): void {
    if (upload.lease) {
      this.#leases.check(upload.lease, upload.domainId);
      this.#leases.keep(upload.lease);
    }
    this.#insertUpload.run(upload.id, upload.domainId, upload.expiresAtMs, JSON.stringify(upload));
  }

  getUpload(domainId: string, id: string): UploadRecord | null {
    const row = this.#selectUpload.get(id);
    const upload = row ? this.#upload(row) : null;
    return upload?.domainId === domainId ? upload : null;
  }

  /** @throws MillraceError `not_found` */
  putPart(
    uploadId: string,
    part: { readonly partNumber: number; readonly etag: string; readonly size: number },
  ): void {
    if (!this.#selectUpload.get(uploadId)) {
      throw new MillraceError('not_found', `upload ${uploadId} does not exist; it may have expired`);
    }
    this.#upsertPart.run(uploadId, part.partNumber, part.etag, part.size);
  }

  deleteUpload(id: string): boolean {
    this.#deleteParts.run(id);
    return this.#deleteUpload.count(id) > 0;
  }

  expiredUploads(limit: number): UploadRecord[] {
    return this.#selectExpired.all(this.#clock.now(), limit).map((row) => this.#upload(row));
  }

  #upload([id, body]: Row): UploadRecord {
    const parts = this.#selectParts.all(String(id)).map(([partNumber, etag, size]) => ({
      partNumber: partNumber as number,
      etag: etag as string,
      size: size as number,
    }));
    return { ...(JSON.parse(String(body)) as Omit<UploadRecord, 'parts'>), parts };
  }
}

function recordOf([id, domainId, name, dataType, size, createdAt, updatedAt, digest]: Row): DataRecord {
  return {
    id: id as string,
    domain_id: domainId as string,
    name: name as string,
    data_type: dataType as string,
    size: size as number,
    created_at: isoTime(createdAt as number),
    updated_at: isoTime(updatedAt as number),
    digest: digest as string,
  };
}
