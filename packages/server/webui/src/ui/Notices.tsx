// SPDX-License-Identifier: MIT
// Banners at the head of the page: what happened, and what can be done about it.

import { t } from "../i18n/index.ts";
import { connection, connectionError, isKeyWrong, refreshModels } from "../state/models.ts";
import { dismiss, notices } from "../state/notices.ts";
import { isPersistent } from "../state/storage.ts";
import { Icon } from "./Icon.tsx";
import { describe } from "./errors.ts";
import { KeyForm } from "./KeyForm.tsx";

export function Notices() {
  return (
    <div class="notices">
      {connection.value === "unreachable" && connectionError.value && (
        <div class="notice error" role="alert">
          <Icon name="warning" />
          <p>{describe(connectionError.value)} {t.value.reconnecting}</p>
          <button type="button" class="button small" onClick={() => void refreshModels()}>{t.value.retry}</button>
        </div>
      )}
      {connection.value === "locked" && (
        <div class="notice" role="alert">
          <Icon name="info" />
          <div>
            <p>{isKeyWrong.value ? t.value.keyWrong : t.value.keyNeeded}</p>
            <KeyForm />
          </div>
        </div>
      )}
      {!isPersistent.value && (
        <div class="notice"><Icon name="info" /><p>{t.value.notPersistent}</p></div>
      )}
      {notices.value.map(({ id, kind, text, retry }) => (
        <div key={id} class={`notice ${kind}`} role={kind === "error" ? "alert" : "status"}>
          <Icon name={kind === "error" ? "warning" : "info"} />
          <p>{text}</p>
          {retry && <button type="button" class="button small" onClick={() => { dismiss(id); retry(); }}>{t.value.retry}</button>}
          <button type="button" class="icon-button" aria-label={t.value.dismiss} data-tip={t.value.dismiss} onClick={() => dismiss(id)}>
            <Icon name="close" />
          </button>
        </div>
      ))}
    </div>
  );
}
