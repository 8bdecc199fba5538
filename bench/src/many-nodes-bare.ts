/** The limit for `many-nodes.ts`: a server that does nothing but commit one small row, synced, for each request. */
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { DatabaseSync } from '@photostructure/sqlite';

const database = new DatabaseSync(process.argv[2]);
database.exec('PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; CREATE TABLE probe (value TEXT)');
const insert = database.prepare('INSERT INTO probe VALUES (?)');
const server = createServer((request, response) => {
  request.resume().on('end', () => {
    insert.run('x'.repeat(200));
    response.setHeader('content-type', 'application/json').end('{}');
  });
});
// Also keeps it: a database that nothing names is closed with the garbage.
process.once('disconnect', () => {
  database.close();
  process.exit();
});
server.listen(0, '127.0.0.1', () => process.send?.((server.address() as AddressInfo).port));
