// SPDX-License-Identifier: MIT
// What went wrong, in the user's language.

import { sayable, type ErrorInfo } from "../api/http.ts";
import type { ModelCard } from "../api/types.ts";
import { named, t } from "../i18n/index.ts";
import { models } from "../state/models.ts";
import { apiKey } from "../state/preferences.ts";

export const NOT_LOADED = "model_load_failed"; // the server's code

/** An error in words; `model` is what the request was for. */
export function describe({ kind, status, message, code, param }: ErrorInfo, model = ""): string {
  if (kind === "network") return t.value.unreachable;
  if (kind === "dropped") return t.value.dropped;
  if (kind === "format") return t.value.notUnderstood;
  if (code === NOT_LOADED) return describeFailure(models.value.find(({ id }) => id === model) ?? model);
  if (status === 401) return message.includes("management key") ? t.value.managementKeyNeeded : apiKey.peek().key ? t.value.keyWrong : t.value.keyNeeded;
  const own = ownWords(code, param, message);
  if (own) return own;
  if (sayable(message)) return message;
  if (message) return t.value.refused;
  return kind === "http" ? t.value.httpError(status ?? 0) : t.value.streamError;
}

/** For what the server says in words of a program, or of who runs it. */
function ownWords(code: string | undefined, param: string | undefined, message: string): string | undefined {
  if (code === "context_length_exceeded" && param?.startsWith("max")) return t.value.answerTooLong;
  if (message.includes("has no chat template")) return t.value.noTemplate;
  if (code === "api_key_needed") return t.value.toolsNeedKey;
  if (code === "mcp_off") return t.value.noMcp;
  return code === undefined ? undefined : named(t.value.refusals, code);
}

/** That a model could not be loaded, and why, as far as that is still known. */
export function describeFailure(model: ModelCard | string): string {
  if (typeof model === "string") return t.value.couldNotLoad(model || t.value.model);
  const why = named(t.value.failures, model.failure ?? "other");
  return `${t.value.couldNotLoad(model.id)} ${why ?? t.value.failures.other}`;
}
