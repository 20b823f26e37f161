// What went wrong, in the user's language.

import type { ErrorInfo } from "../api/http.ts";
import type { ModelCard } from "../api/types.ts";
import { named, t } from "../i18n/index.ts";
import { models } from "../state/models.ts";

export const NOT_LOADED = "model_load_failed"; // the server's code

/** An error in words; `model` is what the request was for. */
export function describe({ kind, status, message, code }: ErrorInfo, model = ""): string {
  if (kind === "network") return t.value.unreachable;
  if (kind === "dropped") return t.value.dropped;
  if (kind === "format") return t.value.notUnderstood;
  if (code === NOT_LOADED) return describeFailure(models.value.find(({ id }) => id === model) ?? model);
  if (message) return message;
  if (kind === "http" && status === 401) return t.value.keyNeeded;
  return kind === "http" ? t.value.httpError(status ?? 0) : t.value.streamError;
}

/** That a model could not be loaded, and why, as far as that is still known. */
export function describeFailure(model: ModelCard | string): string {
  if (typeof model === "string") return t.value.couldNotLoad(model || t.value.model);
  const why = named(t.value.failures, model.failure ?? "other");
  return `${t.value.couldNotLoad(model.id)} ${why ?? t.value.failures.other}`;
}

const OF_A_COMMAND = /(^|[^\w-])--?[a-z][a-z-]*/; // as --mem, which nobody can set on a page

/** What the server says, where it speaks of nothing that is done on a command line. */
export const sayable = (said: string | undefined): string | undefined =>
  said === undefined || OF_A_COMMAND.test(said) ? undefined : said;
