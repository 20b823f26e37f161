// SPDX-License-Identifier: MIT
// Fetching models: by name, from the list of known ones, and how far those are that are being fetched.

import { useId, useState } from "preact/hooks";
import { errorInfo, sayable, type ErrorInfo } from "../api/http.ts";
import type { Inventory, KnownModel, Pull } from "../api/types.ts";
import { formatBytes, formatNumber, named, t } from "../i18n/index.ts";
import { ENDED, fetchModel, stopFetching } from "../state/inventory.ts";
import { notify } from "../state/notices.ts";
import { describe } from "./errors.ts";
import { Icon } from "./Icon.tsx";
import { needs } from "./ModelsPage.tsx";

export function AddModels({ stock }: { stock: Inventory }) {
  if (!stock.changes) return <ChangesOff />;
  return (
    <section class="add-models">
      <h2>{t.value.addModels}</h2>
      <FetchForm />
      {stock.pulls.length > 0 && (
        <ul class="stock">{stock.pulls.map((pull) => <PullRow key={pull.model} pull={pull} free={stock.memoryFree} />)}</ul>
      )}
      <h3>{t.value.knownModels}</h3>
      <p class="faint small">{t.value.knownText}</p>
      <ul class="known">
        {stock.known.map((known) => <KnownRow key={known.name} known={known} pulls={stock.pulls} />)}
      </ul>
    </section>
  );
}

function ChangesOff() {
  return (
    <div class="notice">
      <Icon name="info" />
      <div>
        <p>{t.value.changesOff}</p>
        <details class="small"><summary>{t.value.forOperators}</summary><p>{t.value.changesHow} <code>candle-vllm --allow-model-changes</code></p></details>
      </div>
    </div>
  );
}

function FetchForm() {
  const [name, write] = useState("");
  const [isAsking, setAsking] = useState(false);
  const [failure, setFailure] = useState<ErrorInfo | null>(null);
  const id = useId();
  const submit = async () => {
    if (isAsking || !name.trim()) return;
    setAsking(true);
    setFailure(null);
    try {
      await fetchModel(name.trim());
      write((now) => (now === name ? "" : now)); // nothing that was written meanwhile goes
    } catch (error) {
      setFailure(errorInfo(error));
    } finally {
      setAsking(false);
    }
  };
  return (
    <form class="field" onSubmit={(event) => { event.preventDefault(); void submit(); }}>
      <label for={id}>{t.value.modelOnHub}</label>
      <div class="field-row">
        <input id={id} class="input" value={name} placeholder="hf.co/Qwen/Qwen3-4B-GGUF:Q4_K_M" autocomplete="off" autocapitalize="off" spellcheck={false}
          aria-describedby={`${id}-hint`} aria-invalid={failure ? "true" : undefined} onInput={(event) => write(event.currentTarget.value)} />
        <button type="submit" class="button primary" aria-disabled={isAsking}>{isAsking ? t.value.asking : t.value.fetch}</button>
      </div>
      <p id={`${id}-hint`} class="hint">{t.value.modelOnHubHint}</p>
      {failure && <Reason failure={failure} />}
    </form>
  );
}

/** Why a model is not fetched, and the server's words for it. */
function Reason({ failure }: { failure: ErrorInfo }) {
  const [text, said] = [describe(failure), sayable(failure.message)];
  return (
    <div class="notice error" role="alert">
      <Icon name="warning" />
      <div>
        <p>{text}</p>
        {said && said !== text && <details class="small" open={failure.code === "no_such_file"}><summary>{t.value.serverSays}</summary><p>{said}</p></details>}
      </div>
    </div>
  );
}

/** Asks for something about a model's download, and says where that was refused. */
const attempt = (name: string, work: Promise<void>) =>
  void work.catch((error: unknown) => notify("error", `${name}: ${describe(errorInfo(error))}`));

function PullRow({ pull, free }: { pull: Pull; free: number }) {
  const { model, state, done, total, failure, error } = pull;
  const percent = total ? Math.floor((100 * done) / total) : 0;
  const word = named(t.value.pullStates, state) ?? state;
  const isMoving = state === "downloading" || state === "verifying" || state === "stopped";
  const ended = ENDED.has(state);
  return (
    <li class="card">
      <header>
        <span class={`dot ${state === "failed" ? "bad" : ended ? "off" : "busy"}`} aria-hidden="true" />
        <h3>{model}</h3>
        <span class="faint small">{isMoving ? t.value.progressOf(word, formatNumber(percent), formatBytes(total)) : word}</span>
        <span class="spring" />
        {ended ? (
          <button type="button" class="button small" aria-label={t.value.goOnWith(model)} onClick={() => attempt(model, fetchModel(model))}>{t.value.goOn}</button>
        ) : (
          <button type="button" class="button small" aria-label={t.value.stopOf(model)} aria-disabled={state === "stopping"}
            onClick={() => state !== "stopping" && attempt(model, stopFetching(model))}>{t.value.stop}</button>
        )}
        {ended && (
          <button type="button" class="icon-button" aria-label={t.value.discardOf(model)} data-tip={t.value.discardOf(model)} onClick={() => attempt(model, stopFetching(model, true))}>
            <Icon name="trash" />
          </button>
        )}
      </header>
      {(!ended || done > 0) && <progress max={100} value={isMoving ? percent : undefined} aria-label={t.value.fetchingOf(model)} />}
      {pull.fits === "never" && <p class="model-details wrong">{t.value.willNotFit(formatBytes(pull.needed), formatBytes(free))}</p>}
      {state === "failed" && <Reason failure={{ kind: "http", status: 502, message: error, code: failure }} />}
    </li>
  );
}

function KnownRow({ known, pulls }: { known: KnownModel; pulls: readonly Pull[] }) {
  const isOnItsWay = pulls.some(({ model }) => model.toLowerCase() === known.model.toLowerCase());
  return (
    <li>
      <div>
        <strong class="model-id">{known.name}</strong>
        <p class="model-details">{known.model}</p>
        <p class={known.fits === "never" ? "model-details wrong" : "model-details"}>{needs(known.needed, known.fits)}</p>
      </div>
      {known.served ? <span class="faint small">{t.value.isHere}</span> : !isOnItsWay && (
        <button type="button" class="button small" aria-label={t.value.fetchOf(known.name)} onClick={() => attempt(known.name, fetchModel(known.name))}>{t.value.fetch}</button>
      )}
    </li>
  );
}
