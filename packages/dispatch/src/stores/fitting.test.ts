import { describe, expect, test } from 'vitest';
import { Usage, shortage } from './fitting.ts';

describe('what fits on a node', () => {
  test('a node that does not say what it has is asked for cpu and memory without bound, and for nothing else', () => {
    expect(shortage({ cpu: 1e6, memory: 2 ** 53 }, null)).toBeNull();
    expect(shortage(null, null)).toBeNull();
    expect(shortage({ cpu: 1, gpu: 2 }, null)).toEqual({ name: 'gpu', needed: 2, free: 0 });
  });

  test('a task fits up to what there is, and not one thousandth more', () => {
    expect(shortage({ cpu: 2.5 }, { cpu: 2.5 })).toBeNull();
    expect(shortage({ cpu: 2.501 }, { cpu: 2.5 })).toEqual({ name: 'cpu', needed: 2.501, free: 2.5 });
    expect(shortage({ memory: 2 ** 53 }, { memory: 2 ** 53 })).toBeNull();
    expect(shortage({ memory: 2 ** 53 }, { memory: 2 ** 53 - 1 })).toMatchObject({ name: 'memory' });
  });

  test('a name that the node does not have is none of it', () => {
    expect(shortage({ cpu: 1 }, { gpu: 1 })).toEqual({ name: 'cpu', needed: 1, free: 0 });
  });

  test('a task that names no cpu takes one where cpus are counted', () => {
    expect(shortage(null, { cpu: 1 })).toBeNull();
    expect(shortage(null, { cpu: 0.5 })).toEqual({ name: 'cpu', needed: 1, free: 0.5 });
    expect(shortage({ gpu: 1 }, { cpu: 0.999, gpu: 1 })).toMatchObject({ name: 'cpu', needed: 1 });
    expect(shortage(null, { gpu: 1 })).toBeNull();
  });

  test('what is taken is given back exactly', () => {
    const usage = new Usage({ cpu: 1, memory: 2 ** 53 });
    const [tenth, most] = [{ cpu: 0.1 }, { memory: 2 ** 53 - 1, cpu: 0.001 }];
    usage.add(tenth, 9);
    expect(usage.shortage(tenth)).toBeNull();
    usage.add(tenth);
    expect(usage.shortage(tenth)).toEqual({ name: 'cpu', needed: 0.1, free: 0 });
    usage.remove(tenth);
    usage.add(most);
    expect(usage.shortage({ memory: 1, cpu: 0.099 })).toBeNull();
    expect(usage.shortage({ memory: 2, cpu: 0.099 })).toEqual({ name: 'memory', needed: 2, free: 1 });
    expect(usage.taken()).toEqual({ cpu: 0.901, memory: 2 ** 53 - 1 });
    usage.remove(most);
    for (let task = 0; task < 9; task += 1) usage.remove(tenth);
    expect(usage.taken()).toEqual({});
  });

  test('a node that holds more than it has any more is short, and by no more than all', () => {
    const usage = new Usage({ cpu: 1 });
    usage.add({ cpu: 4 });
    expect(usage.shortage({ cpu: 0.5 })).toEqual({ name: 'cpu', needed: 0.5, free: 0 });
  });
});
