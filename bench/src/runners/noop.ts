/** Does nothing. For the throughput figures. */
import { defineRunner } from '@millrace/runner';

export default defineRunner({ capability: '/bench/nothing/v1', async run() {} });
