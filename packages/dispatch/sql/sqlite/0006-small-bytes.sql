-- The bytes of small data items, by SHA-256. A row is written with the item that names it, and goes with the last one.
CREATE TABLE small_bytes (
  sha256 BLOB NOT NULL PRIMARY KEY,
  bytes  BLOB NOT NULL
) STRICT;
