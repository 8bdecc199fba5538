/** How a node names an artifact on the wire (posemesh compute-node, storage ports). */

/** Every code point other than ASCII letters, digits, `-` and `_` becomes `_`. */
export function sanitise(text: string, whenEmpty: string): string {
  return text.replace(/[^A-Za-z0-9_-]/gu, '_') || whenEmpty;
}

/** `prefix/rel` without doubled slashes where they meet; an empty half is left out. */
export function logicalPath(prefix: string | null, relPath: string): string {
  const rel = relPath.replace(/^\/+/, '');
  const head = (prefix ?? '').replace(/^\/+|\/+$/g, '');
  return [head, rel].filter((part) => part !== '').join('/');
}

export function artifactName(path: string, taskId: string): string {
  return `${sanitise(path.replaceAll('/', '_'), 'artifact')}_${taskId}`;
}

const KNOWN_TYPES: Readonly<Record<string, string>> = {
  json: 'json',
  ply: 'ply',
  drc: 'ply_draco',
  glb: 'glb',
  obj: 'obj',
  csv: 'csv',
  mp4: 'mp4',
};

/** From the last extension: a known type, else `<extension>_data`; `binary` without one. */
export function dataTypeOf(relPath: string): string {
  const file = relPath.slice(relPath.lastIndexOf('/') + 1);
  const dot = file.lastIndexOf('.');
  if (dot <= 0) return 'binary';
  const extension = file.slice(dot + 1).toLowerCase();
  return Object.hasOwn(KNOWN_TYPES, extension)
    ? KNOWN_TYPES[extension]!
    : `${sanitise(extension, 'artifact')}_data`;
}

/** The folder and file a downloaded part gets: `datasets/<scan>/<name>.<type>`, which production runners rely on. */
export function materializedPath(name: string, dataType: string): string {
  const scan = /\d{4}-\d{2}-\d{2}[_-]\d{2}-\d{2}-\d{2}/.exec(name)?.[0] ?? name;
  return `datasets/${sanitise(scan, 'part')}/${sanitise(name, 'part')}.${sanitise(dataType, 'part')}`;
}
