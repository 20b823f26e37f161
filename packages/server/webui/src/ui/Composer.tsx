// SPDX-License-Identifier: MIT
// The input: Enter sends, Shift+Enter begins a line, Escape stops.

import { type Signal, signal } from "@preact/signals";
import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";
import { maxBody } from "../api/http.ts";
import { MAX_FILE, MAX_FILES, readFile } from "../chat/files.ts";
import { fitting, isImage, MAX_IMAGES, readImage, sizeOfAttached } from "../chat/images.ts";
import type { Prompt, TextFile } from "../chat/types.ts";
import { formatNumber, kibibytes, t } from "../i18n/index.ts";
import type { OpenChat } from "../state/open-chat.ts";
import { confirmFirst, open } from "../state/dialogs.ts";
import { cardFor, connection, isLoading } from "../state/models.ts";
import { sendMessage, shownStart } from "../state/new-chat.ts";
import { forgetAbout, notifyAbout } from "../state/notices.ts";
import { route } from "../state/route.ts";
import { readDraft, writeDraft } from "../store/preferences.ts";
import { NOT_LOADED } from "./errors.ts";
import { Icon } from "./Icon.tsx";
import { FileChip } from "./FileChip.tsx";
import { FailureNote, LoadingLine } from "./ModelState.tsx";
import { PromptMenu, setSystemPrompt, useSuggestions } from "./PromptPicker.tsx";
import { isComposing } from "./shortcuts.ts";
import { ToolsSwitch } from "./ToolsSwitch.tsx";

const MAX_HEIGHT = 240;
const FILES = "files"; // what the notice is about

interface Attachments {
  images: readonly string[];
  files: readonly TextFile[];
  reading: number; // times that something was given and is not read yet
}

const attachments = new Map<string, Signal<Attachments>>(); // by conversation; "" is the new one

/** What goes with the next message: it stays with the page, as a typed text does. */
function attachmentsOf(id: string): Signal<Attachments> {
  const known = attachments.get(id) ?? signal({ images: [], files: [], reading: 0 });
  attachments.set(id, known);
  return known;
}

export function Composer({ chat }: { chat: OpenChat | null }) {
  const id = chat?.info.peek().id ?? "";
  const [text, setText] = useState(() => readDraft(id));
  const attached = attachmentsOf(id);
  const { images, files, reading } = attached.value;
  const change = (part: Partial<Attachments>) => (attached.value = { ...attached.peek(), ...part });
  const isEmpty = !text.trim() && !images.length && !files.length;
  const sees = cardFor(shownStart.value.model)?.modalities?.includes("image") ?? false;
  const field = useRef<HTMLTextAreaElement>(null);
  const isBusy = chat?.isBusy ?? false;
  useHeight(field, text);
  useLayoutEffect(() => {
    if (!matchMedia("(pointer: coarse)").matches) field.current?.focus({ preventScroll: true });
  }, []);
  const isCovered = open.value !== null;
  useEffect(() => () => forgetAbout(FILES), [isCovered, route.value]);
  const write = (value: string) => {
    setText(value);
    writeDraft(id, value);
  };
  const parts = useRef(new Set<string>()); // of prompts, to be written over
  const send = (isSure = false) => {
    if (isEmpty || isBusy || reading) return;
    const unfilled = [...parts.current].filter((one) => text.includes(one)).join(", ");
    if (unfilled && !isSure) {
      confirmFirst({ title: t.value.unfilled, text: t.value.unfilledText(unfilled), action: t.value.send, onConfirm: () => send(true) });
      return;
    }
    parts.current.clear();
    forgetAbout(FILES);
    const said = text.trim();
    write("");
    change({ images: [], files: [] });
    void sendMessage(said, { images, files });
  };
  const insert = (more: string, from: number, to: number) => {
    const area = field.current;
    if (!area) return;
    write(area.value = text.slice(0, from) + more + text.slice(to));
    for (const [part] of more.matchAll(/\{\{[^{}\n]{1,80}\}\}/g)) parts.current.add(part);
    area.focus();
    if (!selectPart(area, from)) area.setSelectionRange(from + more.length, from + more.length);
  };
  /** Selects the next part that is to be written over. */
  const selectPart = (area: HTMLTextAreaElement, from: number): boolean => {
    const found = [...parts.current].map((part) => [area.value.indexOf(part, from), part.length] as const).filter(([at]) => at >= 0);
    const [at, length] = found.sort(([a], [b]) => a - b)[0] ?? [-1, 0];
    if (at >= 0) area.setSelectionRange(at, at + length);
    return at >= 0;
  };
  const take = (isQuery: boolean) => (prompt: Prompt) => {
    const { selectionStart, selectionEnd } = field.current ?? { selectionStart: text.length, selectionEnd: text.length };
    const [from, to] = isQuery ? [0, text.length] : [selectionStart, selectionEnd];
    if (prompt.kind === "message") insert(prompt.text, from, to);
    else {
      if (isQuery) write("");
      setSystemPrompt(prompt);
    }
  };
  const attach = async (given: readonly File[]) => {
    const pictures = given.filter(isImage);
    const others = given.filter((one) => !isImage(one));
    change({ reading: attached.peek().reading + 1 });
    const [found, texts] = await Promise.all([
      Promise.all(sees ? pictures.map(readImage) : []), Promise.all(others.map(readFile)),
    ]).finally(() => change({ reading: attached.peek().reading - 1 }));
    const { images, files } = attached.peek(); // what was given later may have been read before
    const read = found.filter((url) => url !== undefined);
    const all = [...images, ...read].slice(0, MAX_IMAGES);
    const taken = texts.filter((one) => typeof one !== "string");
    const allFiles = [...files, ...taken].slice(0, MAX_FILES);
    const fit = fitting(all, (chat?.attachedSize ?? 0) + sizeOfAttached({ files: allFiles }), maxBody());
    const refused = refusedImages(pictures, found, sees, images.length);
    if (fit.length < all.length) refused.push(t.value.imagesTooLarge(`${formatNumber(Math.floor(maxBody() / (1 << 20)))} MiB`));
    for (const [index, { name, size }] of others.entries()) {
      const fault = texts[index];
      if (typeof fault === "string") refused.push(`${name}: ${t.value.fileFaults[fault](kibibytes(size), kibibytes(MAX_FILE))}`);
    }
    if (files.length + taken.length > MAX_FILES) refused.push(t.value.filesFull(MAX_FILES));
    if (refused.length) notifyAbout(FILES, refused.join(" "));
    else forgetAbout(FILES);
    change({ images: read.length ? fit : images, files: allFiles });
    field.current?.focus();
  };
  const drop = (event: DragEvent) => {
    const files = [...(event.dataTransfer?.files ?? [])];
    if (!files.length) return;
    event.preventDefault();
    void attach(files);
  };
  const paste = (event: ClipboardEvent) => {
    const { files: all = [], types = [] } = event.clipboardData ?? {};
    const files = [...all].filter(isImage);
    // Spreadsheets and word processors put an image of the text beside it.
    if (!files.length || (types.includes("text/html") && types.includes("text/plain"))) return;
    event.preventDefault();
    void attach(files);
  };
  const suggestions = useSuggestions(text, take(true));
  const onKey = (event: KeyboardEvent) => {
    if (suggestions.onKey(event)) return;
    if (event.key === "Tab" && !event.shiftKey && field.current && selectPart(field.current, field.current.selectionEnd)) {
      event.preventDefault(); // behind the last one, Tab leaves the field as ever
      return;
    }
    const sends = event.key === "Enter" && !event.shiftKey && !isComposing(event);
    if (sends && !matchMedia("(pointer: coarse)").matches) {
      event.preventDefault();
      send();
    }
    if (event.key === "ArrowUp" && !text && !isBusy) {
      const edits = document.querySelectorAll<HTMLElement>(".edit-question");
      if (edits.length) event.preventDefault();
      edits[edits.length - 1]?.click();
    }
  };
  return (
    <div class="composer-frame" onDrop={drop} onDragOver={(event) => event.preventDefault()}>
      <form class="composer" onSubmit={(event) => { event.preventDefault(); send(); }}>
        {suggestions.list}
        {images.length > 0 && (
          <div class="pictures">
            {images.map((url, index) => (
              <span key={index} class="picture">
                <img src={url} alt={t.value.picture} />
                <button type="button" class="icon-button" aria-label={t.value.removeImage(index + 1)} data-tip={t.value.removeImage(index + 1)}
                  onClick={() => { change({ images: images.filter((_, other) => other !== index) }); field.current?.focus(); }}><Icon name="close" /></button>
              </span>
            ))}
          </div>
        )}
        {files.length > 0 && (
          <div class="files">
            {files.map((file, index) => (
              <FileChip key={index} file={file} onRemove={() => { change({ files: files.filter((_, other) => other !== index) }); field.current?.focus(); }} />
            ))}
          </div>
        )}
        <textarea id="composer" ref={field} rows={1} dir="auto" value={text} placeholder={t.value.placeholder} aria-label={t.value.message} enterkeyhint="enter"
          onInput={(event) => write(event.currentTarget.value)} onKeyDown={onKey} onPaste={paste} {...suggestions.attributes} />
        <div class="composer-row">
          <Attach sees={sees} onFiles={(files) => void attach(files)} />
          <PromptMenu onChoose={take(false)} />
          <ToolsSwitch />
          <span class="spring" />
          {isBusy ? (
            <button type="button" class="send" aria-label={t.value.stop} data-tip={t.value.stop} onClick={() => { chat?.stop(); field.current?.focus(); }}>
              <Icon name="stop" />
            </button>
          ) : (
            <button type="submit" class="send" aria-label={t.value.send} data-tip={t.value.send} disabled={isEmpty || reading > 0 || connection.value === "locked"}>
              <Icon name="send" />
            </button>
          )}
        </div>
      </form>
      <Note chat={chat} />
    </div>
  );
}

/** Below the input: what keeps the next answer waiting. */
function Note({ chat }: { chat: OpenChat | null }) {
  const isWaiting = chat !== null && chat.path.value.length > 0 && !chat.isBusy; // else it is said where the answer will be
  const card = cardFor(shownStart.value.model);
  if (connection.value === "unreachable") return <p class="composer-note">{t.value.noConnection}</p>;
  if (connection.value === "connecting") return <p class="composer-note">{t.value.connecting}</p>;
  if (connection.value === "ready" && isWaiting && card && isLoading(card)) return <div class="composer-note"><LoadingLine card={card} /></div>;
  const isSaid = chat?.lastAnswer?.error?.code === NOT_LOADED;
  if (connection.value === "ready" && isWaiting && card?.status === "failed" && !isSaid) return <FailureNote card={card} />;
  return <p class="composer-note">{t.value.mayBeWrong}</p>;
}

function useHeight(field: { current: HTMLTextAreaElement | null }, text: string): void {
  useLayoutEffect(() => {
    const area = field.current;
    if (!area) return;
    area.style.height = "auto";
    area.style.height = `${Math.min(area.scrollHeight, MAX_HEIGHT)}px`;
  }, [text]);
}

/** Which images are not taken, and why. */
function refusedImages(files: readonly File[], found: readonly (string | undefined)[], sees: boolean, count: number): string[] {
  if (!files.length) return [];
  if (!sees) return [t.value.imagesNotSeen(files.map(({ name }) => name).join(", "))];
  const broken = files.filter((_, index) => found[index] === undefined).map(({ name }) => name);
  const isFull = count + files.length - broken.length > MAX_IMAGES;
  return [...(broken.length ? [t.value.imagesBroken(broken.join(", "))] : []), ...(isFull ? [t.value.imagesFull(MAX_IMAGES)] : [])];
}

/** The button for files, with what it takes: a phone offers its camera for images. */
function Attach({ sees, onFiles }: { sees: boolean; onFiles: (files: readonly File[]) => void }) {
  const chooser = useRef<HTMLInputElement>(null);
  const tip = (sees ? t.value.attachImagesTip : t.value.attachTip)(kibibytes(MAX_FILE));
  const take = (input: HTMLInputElement) => {
    onFiles([...(input.files ?? [])]);
    input.value = "";
  };
  return (
    <>
      <input ref={chooser} id="attach-file" type="file" hidden multiple onChange={(event) => take(event.currentTarget)} />
      <button type="button" class="icon-button" aria-label={tip} data-tip={tip} onClick={() => chooser.current?.click()}><Icon name="attach" /></button>
    </>
  );
}
