/** Data items, chunked uploads and computes in PostgreSQL. */
import { MillraceError } from '@millrace/runner';
import { digestHex } from '../blobs/digest.ts';
import { isHeld } from '../lifecycle.ts';
import type { TaskState } from '../lifecycle.ts';
import type { ComputeRecord, DataRecord } from '../records.ts';
import type {
  ComputeWrite,
  DataQuery,
  DataWrite,
  LeaseRef,
  ListComputesQuery,
  PutComputeAnswer,
  UploadRecord,
} from '../store.ts';
import { sql } from './postgres-database.ts';
import type { Database, Transaction } from './postgres-database.ts';
import { isDuplicate } from './postgres-errors.ts';
import type { Names } from './postgres-names.ts';
import { refusalOfLease } from './postgres-leases.ts';
import { columns, endedAt } from './postgres-rows.ts';
import type { Place } from './postgres-rows.ts';
import { isoTime } from './time.ts';

interface DataRow {
  readonly id: string;
  readonly domainId: string;
  readonly name: string;
  readonly dataType: string;
  readonly size: number;
  readonly createdAt: number;
  readonly updatedAt: number;
  readonly digest: string;
  readonly jobId: string | null;
}

const COLUMNS = `d.id, d.domain_id AS "domainId", d.name, d.data_type AS "dataType", d.size, d.created_at AS "createdAt",
  d.updated_at AS "updatedAt", d.digest, d.job_id AS "jobId"`;

// Shared: it keeps the lease from ending before what is written under it is committed.
const LEASES = sql(`
  SELECT u.job_seq AS "jobSeq", u.no, coalesce(o.state, e.state, 'ready') AS state, o.lease_id AS "leaseId",
    o.node_id AS "nodeId", j.id AS "jobId", j.domain_id AS "domainId"
  FROM unnest($1::bigint[], $2::integer[]) AS u (job_seq, no) JOIN jobs j ON j.seq = u.job_seq
  LEFT JOIN open_tasks o ON o.job_seq = u.job_seq AND o.no = u.no
  LEFT JOIN ended_runs e ON ${endedAt('u.job_seq', 'u.no')}`);
const HOLD_LEASES = sql(`
  SELECT o.job_seq FROM unnest($1::bigint[], $2::integer[]) AS u (job_seq, no)
  JOIN open_tasks o ON o.job_seq = u.job_seq AND o.no = u.no ORDER BY o.job_seq, o.no FOR SHARE OF o`);

const LOCK_ITEMS = sql(`
  SELECT ${COLUMNS} FROM data d
  WHERE d.id = ANY($1::text[]) OR (d.domain_id, d.name) IN (SELECT * FROM unnest($2::text[], $3::text[]))
  ORDER BY d.id FOR UPDATE`);
const INSERT_ITEM = sql(`
  INSERT INTO data (id, domain_id, name, data_type, size, created_at, updated_at, digest, job_id)
  VALUES ($1, $2, $3, $4, $5, $6, $6, $7, $8)`);
const UPDATE_ITEM = sql(`
  UPDATE data SET name = $2, data_type = $3, digest = $4, size = $5, updated_at = $6 WHERE id = $1`);
const ITEM = sql(`SELECT ${COLUMNS} FROM data d WHERE d.domain_id = $1 AND d.id = $2`);
const ITEMS_BY_ID = sql(`
  SELECT ${COLUMNS} FROM unnest($2::text[]) WITH ORDINALITY AS u (id, at) JOIN data d ON d.id = u.id
  WHERE d.domain_id = $1 AND ($3::text IS NULL OR d.name = $3) AND ($4::text IS NULL OR d.data_type = $4)
  ORDER BY u.at LIMIT $5`);
const ITEMS = sql(`
  SELECT ${COLUMNS} FROM data d
  WHERE d.domain_id = $1 AND ($2::text IS NULL OR d.name = $2) AND ($3::text IS NULL OR d.data_type = $3)
  ORDER BY d.domain_id, d.name LIMIT $4`);
const DELETE_ITEM = sql('DELETE FROM data WHERE domain_id = $1 AND id = $2');
const UNREFERENCED = sql(`
  SELECT u.digest FROM unnest($1::text[]) WITH ORDINALITY AS u (digest, at)
  WHERE NOT EXISTS (SELECT 1 FROM data d WHERE d.digest = u.digest)
    AND NOT EXISTS (SELECT 1 FROM computes c WHERE c.digest = u.digest)
  ORDER BY u.at`);

const INSERT_UPLOAD = sql('INSERT INTO uploads (id, domain_id, expires_at, body) VALUES ($1, $2, $3, $4)');
const PARTS = `
  (SELECT coalesce(json_agg(json_build_object('partNumber', p.part_number, 'etag', p.etag, 'size', p.size)
    ORDER BY p.part_number), '[]') FROM upload_parts p WHERE p.upload_id = u.id) AS parts`;
const UPLOAD = sql(`SELECT u.body, ${PARTS} FROM uploads u WHERE u.id = $1 AND u.domain_id = $2`);
const EXPIRED_UPLOADS = sql(`
  SELECT u.body, ${PARTS} FROM uploads u WHERE u.expires_at <= millis($1) ORDER BY u.expires_at, u.id LIMIT $2`);
const PUT_PART = sql(`
  INSERT INTO upload_parts (upload_id, part_number, etag, size)
  SELECT u.id, $2, $3, $4 FROM uploads u WHERE u.id = $1 FOR KEY SHARE
  ON CONFLICT (upload_id, part_number) DO UPDATE SET etag = excluded.etag, size = excluded.size`);
const DELETE_UPLOAD = sql('DELETE FROM uploads WHERE id = $1');
const DELETE_PARTS = sql('DELETE FROM upload_parts WHERE upload_id = $1');

interface ComputeRow {
  readonly seq: number;
  readonly digest: string;
  readonly engine: string;
  readonly size: number;
  readonly createdAt: number;
}

const COMPUTE_COLUMNS = 'seq, digest, engine, size, created_at AS "createdAt"';
const PUT_COMPUTE = sql(`
  INSERT INTO computes (digest, engine, size, created_at) VALUES ($1, $2, $3, millis($4)) ON CONFLICT (digest) DO NOTHING`);
const COMPUTE = sql(`SELECT ${COMPUTE_COLUMNS} FROM computes WHERE digest = $1`);
const COMPUTES = sql(`SELECT ${COMPUTE_COLUMNS} FROM computes WHERE seq < $1 ORDER BY seq DESC LIMIT $2`);
const DELETE_COMPUTE = sql('DELETE FROM computes WHERE digest = $1');
const MISSING_COMPUTES = sql(`
  SELECT u.digest FROM unnest($1::text[]) WITH ORDINALITY AS u (digest, at)
  WHERE NOT EXISTS (SELECT 1 FROM computes c WHERE c.digest = u.digest) ORDER BY u.at`);

/** A write that nothing stands in the way of. `old`: what it replaces. */
interface PlannedWrite {
  readonly write: DataWrite;
  readonly jobId: string | null;
  readonly old: DataRow | null;
  readonly name: string;
  readonly dataType: string;
}

export class Data {
  readonly #database: Database;
  readonly #names: Names;
  readonly #newId: () => string;

  constructor(database: Database, names: Names, newId: () => string) {
    this.#database = database;
    this.#names = names;
    this.#newId = newId;
  }

  /** @throws MillraceError as {@link Store.putData} */
  async put(writes: readonly DataWrite[]): Promise<DataRecord[]> {
    const places = await this.#names.find(writes.flatMap(({ lease }) => (lease ? [lease.taskId] : [])));
    for (let tries = 1; ; tries += 1) {
      try {
        return await this.#database.transaction('call', async (transaction) => {
          const planned = await plan(transaction, places, writes);
          return await Promise.all(planned.map((write) => this.#apply(transaction, write)));
        });
      } catch (error) {
        // Somebody else took the name or id after it was looked up; the next look finds it.
        if (!isDuplicate(error instanceof MillraceError ? error.cause : error) || tries >= 3) throw error;
      }
    }
  }

  async #apply(
    transaction: Transaction,
    { write, jobId, old, name, dataType }: PlannedWrite,
  ): Promise<DataRecord> {
    const { domainId, digest, size } = write;
    const { now } = transaction;
    if (old !== null) {
      await transaction.count(UPDATE_ITEM, [old.id, name, dataType, digest, size, now]);
      return recordOf({ ...old, name, dataType, digest, size, updatedAt: now });
    }
    const id = write.createId ?? this.#newId();
    await transaction.count(INSERT_ITEM, [id, domainId, name, dataType, size, now, digest, jobId]);
    return recordOf({ id, domainId, name, dataType, size, createdAt: now, updatedAt: now, digest, jobId });
  }

  async get(domainId: string, id: string): Promise<DataRecord | null> {
    const [row] = await this.#database.rows<DataRow>(ITEM, [domainId, id]);
    return row ? recordOf(row) : null;
  }

  async find({ domainId, ids, name, dataType, limit }: DataQuery): Promise<DataRecord[]> {
    const rows =
      ids.length > 0
        ? await this.#database.rows<DataRow>(ITEMS_BY_ID, [domainId, ids, name, dataType, limit])
        : await this.#database.rows<DataRow>(ITEMS, [domainId, name, dataType, limit]);
    return rows.map(recordOf);
  }

  async delete(domainId: string, id: string): Promise<boolean> {
    return await this.#database.transaction(
      'call',
      async (transaction) => (await transaction.count(DELETE_ITEM, [domainId, id])) > 0,
    );
  }

  async unreferenced(digests: readonly string[]): Promise<string[]> {
    const rows = await this.#database.rows<{ digest: string }>(UNREFERENCED, [digests]);
    return rows.map(({ digest }) => digest);
  }

  async createUpload(upload: Omit<UploadRecord, 'parts'>): Promise<void> {
    const { id, domainId, expiresAtMs, lease } = upload;
    const places = await this.#names.find(lease ? [lease.taskId] : []);
    await this.#database.transaction('call', async (transaction) => {
      if (lease) (await leasesOf(transaction, places, [lease]))(lease, domainId);
      await transaction.count(INSERT_UPLOAD, [id, domainId, expiresAtMs, JSON.stringify(upload)]);
    });
  }

  async getUpload(domainId: string, id: string): Promise<UploadRecord | null> {
    const [row] = await this.#database.rows<UploadRow>(UPLOAD, [id, domainId]);
    return row ? uploadOf(row) : null;
  }

  /** @throws MillraceError `not_found` */
  async putPart(
    uploadId: string,
    { partNumber, etag, size }: { readonly partNumber: number; readonly etag: string; readonly size: number },
  ): Promise<void> {
    const kept = await this.#database.transaction('call', (transaction) =>
      transaction.count(PUT_PART, [uploadId, partNumber, etag, size]),
    );
    if (kept === 0) {
      throw new MillraceError('not_found', `upload ${uploadId} does not exist; it may have expired`);
    }
  }

  async deleteUpload(id: string): Promise<boolean> {
    return await this.#database.transaction('call', async (transaction) => {
      const known = transaction.count(DELETE_UPLOAD, [id]);
      // After the upload itself: from then on nobody adds parts.
      transaction.send(DELETE_PARTS, [id]);
      return (await known) > 0;
    });
  }

  async expiredUploads(limit: number): Promise<UploadRecord[]> {
    return (await this.#database.rows<UploadRow>(EXPIRED_UPLOADS, [this.#database.given, limit])).map(
      uploadOf,
    );
  }

  /** @throws MillraceError as {@link Store.putCompute} */
  async putCompute({ digest, engine, size }: ComputeWrite): Promise<PutComputeAnswer> {
    const made = await this.#database.transaction('call', (transaction) =>
      transaction.count(PUT_COMPUTE, [digest, engine, size, transaction.given]),
    );
    const compute = await this.getCompute(digest);
    if (!compute)
      throw new MillraceError('aborted', `compute ${digest} was deleted while it was stored; store it again`);
    if (compute.engine === engine) return { compute, created: made > 0 };
    throw new MillraceError(
      'already_exists',
      `compute ${compute.ref} is there for the engine ${compute.engine}, not for ${engine}; delete it first if it was stored wrongly`,
    );
  }

  async getCompute(digest: string): Promise<ComputeRecord | null> {
    const [row] = await this.#database.rows<ComputeRow>(COMPUTE, [digest]);
    return row ? computeOf(row) : null;
  }

  async listComputes(
    { limit }: ListComputesQuery,
    before: number | null,
  ): Promise<{ items: ComputeRecord[]; next: number | null }> {
    // One more than asked for tells whether there is a next page.
    const rows = await this.#database.rows<ComputeRow>(COMPUTES, [
      before ?? Number.MAX_SAFE_INTEGER,
      limit + 1,
    ]);
    const page = rows.slice(0, limit);
    return { items: page.map(computeOf), next: rows.length > limit ? (page.at(-1)?.seq ?? null) : null };
  }

  async deleteCompute(digest: string): Promise<boolean> {
    return await this.#database.transaction(
      'call',
      async (transaction) => (await transaction.count(DELETE_COMPUTE, [digest])) > 0,
    );
  }

  async missingComputes(digests: readonly string[]): Promise<string[]> {
    const rows = await this.#database.rows<{ digest: string }>(MISSING_COMPUTES, [digests]);
    return rows.map(({ digest }) => digest);
  }
}

/** What stands in the way of one write is found before the first is made. */
async function plan(
  transaction: Transaction,
  places: ReadonlyMap<string, Place>,
  writes: readonly DataWrite[],
): Promise<PlannedWrite[]> {
  const refs = writes.flatMap(({ lease }) => lease ?? []);
  const named = writes.filter(({ name }) => name !== null);
  // Tasks before items, as everywhere; the leases are looked at once they cannot end any more.
  const [checkLease, rows] = await Promise.all([
    leasesOf(transaction, places, refs),
    transaction.rows<DataRow>(LOCK_ITEMS, [
      writes.flatMap(({ id }) => id ?? []),
      ...columns<DataWrite, string>(
        named,
        ({ domainId }) => domainId,
        ({ name }) => name ?? '',
      ),
    ]),
  ]);
  const planned = writes.map((write) => planOne(write, rows, checkLease));
  const names = new Set<string>();
  const ids = new Set<string>();
  for (const { write, old, name } of planned) {
    const key = JSON.stringify([write.domainId, name]);
    if (names.has(key) || (old !== null && ids.has(old.id))) {
      throw new MillraceError(
        'already_exists',
        `data item ${JSON.stringify(name)} is written twice in one request; names are unique in a domain`,
      );
    }
    names.add(key);
    if (old !== null) ids.add(old.id);
  }
  return planned;
}

function planOne(write: DataWrite, rows: readonly DataRow[], checkLease: CheckLease): PlannedWrite {
  const { domainId } = write;
  const jobId = write.lease ? checkLease(write.lease, domainId) : null;
  const own = rows.filter((row) => row.domainId === domainId);
  const taken = write.name === null ? undefined : own.find(({ name }) => name === write.name);
  let target = taken;
  if (write.id !== null) {
    target = own.find(({ id }) => id === write.id);
    if (!target) {
      throw new MillraceError('not_found', `data item ${write.id} does not exist in domain ${domainId}`);
    }
  } else if (write.name === null || write.dataType === null) {
    throw new MillraceError('invalid_argument', 'a new data item needs a name and a data_type');
  }
  if (taken && (taken.id !== target?.id || (write.id === null && !write.replaceByName))) {
    throw new MillraceError(
      'already_exists',
      `domain ${domainId} has a data item named ${JSON.stringify(write.name)}; names are unique, replace it by its id ${taken.id}`,
    );
  }
  const old = target ?? null;
  if (old !== null && write.lease && write.ownOnly && old.jobId !== jobId) {
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
    dataType: write.dataType ?? old?.dataType ?? '',
  };
}

/** The id of the lease's job. Throws when the lease may not write into the domain. */
type CheckLease = (ref: LeaseRef, domainId: string) => string;

/** Keeps the leases of these tasks from ending until the transaction does, and tells what they are. */
async function leasesOf(
  transaction: Transaction,
  places: ReadonlyMap<string, Place>,
  refs: readonly LeaseRef[],
): Promise<CheckLease> {
  type Row = Place & {
    readonly state: TaskState;
    readonly leaseId: string | null;
    readonly nodeId: string | null;
    readonly jobId: string;
    readonly domainId: string;
  };
  const found = [...new Set(refs.map(({ taskId }) => taskId))].flatMap((id) => places.get(id) ?? []);
  const values = columns<Place, number>(
    found,
    ({ jobSeq }) => jobSeq,
    ({ no }) => no,
  );
  const [, rows] =
    found.length === 0
      ? [[], []]
      : await Promise.all([transaction.rows(HOLD_LEASES, values), transaction.rows<Row>(LEASES, values)]);
  const byPlace = new Map(rows.map((row) => [`${row.jobSeq}:${row.no}`, row]));
  return (ref, domainId) => {
    const place = places.get(ref.taskId);
    const task = place && byPlace.get(`${place.jobSeq}:${place.no}`);
    const current =
      task &&
      isHeld(task.state) &&
      task.nodeId === ref.nodeId &&
      (ref.leaseId === null || task.leaseId === ref.leaseId);
    if (!task || !current) throw refusalOfLease(ref, task?.state);
    if (task.domainId !== domainId) {
      throw new MillraceError(
        'permission_denied',
        `task ${ref.taskId} belongs to domain ${task.domainId} and may not write into domain ${domainId}`,
      );
    }
    return task.jobId;
  };
}

interface UploadRow {
  readonly body: string;
  readonly parts: UploadRecord['parts'];
}

function uploadOf({ body, parts }: UploadRow): UploadRecord {
  return { ...(JSON.parse(body) as Omit<UploadRecord, 'parts'>), parts };
}

function recordOf(row: DataRow): DataRecord {
  return {
    id: row.id,
    domain_id: row.domainId,
    name: row.name,
    data_type: row.dataType,
    size: row.size,
    created_at: isoTime(row.createdAt),
    updated_at: isoTime(row.updatedAt),
    digest: row.digest,
  };
}

function computeOf({ digest, engine, size, createdAt }: ComputeRow): ComputeRecord {
  const hex = digestHex(digest);
  return {
    ref: `compute://sha256/${hex}`,
    alg: 'sha256',
    digest: hex,
    engine,
    bytes: size,
    created_at: isoTime(createdAt),
  };
}
