export { runRuntime } from './sdk/run-runtime.ts';
export type { RunRuntimeOptions } from './sdk/run-runtime.ts';
export { CommandKilled, defineRuntime } from './sdk/runtime.ts';
export type {
  CommandContext,
  CommandHandler,
  DeployAnswer,
  Emitter,
  JoinNetwork,
  KillCommand,
  NetworkEndpoint,
  Offer,
  Pid,
  RunCommand,
  Runtime,
  RuntimeContext,
  RuntimeControl,
  RuntimeDefinition,
  RuntimeEnvironment,
  RuntimeMode,
  SpawnOptions,
  Volume,
} from './sdk/runtime.ts';
export { RuntimeError } from './sdk/runtime-error.ts';
export type { RuntimeErrorKind, RuntimeErrorOptions } from './sdk/runtime-error.ts';
export type {
  CliDeclaration,
  CliOption,
  CliOptions,
  CliPositional,
  OptionValue,
  ParsedCli,
  Subcommand,
  VolumeKind,
} from './sdk/command-line.ts';
export type { ConfigDeclaration } from './sdk/config-file.ts';
