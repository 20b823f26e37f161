// What went wrong, in the user's language.

import type { ErrorInfo } from "../api/http.ts";
import { t } from "../i18n/index.ts";

export function describe({ kind, status, message }: ErrorInfo): string {
  if (kind === "network") return t.value.unreachable;
  if (kind === "dropped") return t.value.dropped;
  if (kind === "format") return t.value.notUnderstood;
  if (message) return message;
  if (kind === "http" && status === 401) return t.value.keyNeeded;
  return kind === "http" ? t.value.httpError(status ?? 0) : t.value.streamError;
}
