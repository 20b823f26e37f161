// SPDX-License-Identifier: MIT
// A conversation that is open: its messages as signals, and the answer that is being written.

import { batch, type ReadonlySignal, type Signal, signal } from "@preact/signals";
import { streamChat } from "../api/chat.ts";
import { snapshot } from "../chat/accumulate.ts";
import { chatRequest } from "../chat/request.ts";
import { merged } from "../chat/settings.ts";
import { titleRequest } from "../chat/title.ts";
import { sizeOfAttached } from "../chat/images.ts";
import { MessageTree } from "../chat/tree.ts";
import { type Decision, recover, Turn } from "../chat/turn.ts";
import { type Attached, type AssistantMessage, type Conversation, emptyStep, type Message, textOf, type UserMessage } from "../chat/types.ts";
import { t } from "../i18n/index.ts";
import type { Store } from "../store/database.ts";
import { newId } from "../store/ids.ts";
import { FrameQueue } from "./frames.ts";
import { isLeaving } from "./leaving.ts";
import { allowAlways, isAllowed, toolsOf } from "./mcp.ts";
import { cardFor, changeModel, refreshModels, refreshSoon } from "./models.ts";
import { announce, notify } from "./notices.ts";
import { callToolFromPage } from "./page-key.ts";
import { preferences } from "./preferences.ts";
import { askForTitle, firstTitle, stopTitles } from "./titles.ts";

const SAVE_MS = 500;
const MAX_ANNOUNCED = 2000;
const MAX_UNTITLED = 6; // messages; where the user was faster than a title until then, the first line stays

export class OpenChat {
  readonly path = signal<readonly string[]>([]);
  readonly active = signal<string | null>(null); // the message that is being written
  private readonly nodes = new Map<string, Signal<Message>>();
  private readonly tree: MessageTree;
  private readonly turns = new Map<string, Turn>();
  private deleted = false;
  private hasAskedForTitle = false;

  constructor(
    readonly info: Signal<Conversation>,
    messages: readonly Message[],
    private readonly store: Store,
    private readonly changed: (id: string, change: Partial<Conversation>) => void,
    private readonly gone: (id: string) => void, // what was to be kept belongs to nothing any more
  ) {
    this.tree = new MessageTree(messages);
    for (const message of messages) {
      this.nodes.set(message.id, signal(message.role === "assistant" ? recover(message) : message));
    }
    const { leaf } = info.value;
    const newest = messages.reduce<Message | undefined>((a, b) => (a && a.created > b.created ? a : b), undefined);
    this.path.value = this.tree.path(leaf && this.tree.has(leaf) ? leaf : (newest?.id ?? null));
  }

  get isBusy(): boolean {
    return this.active.value !== null;
  }

  /** Whether the message is here that the conversation was left at, in this tab or in another one. */
  get hasLeaf(): boolean {
    const { leaf } = this.info.value;
    return leaf === null ? this.tree.size === 0 : this.tree.has(leaf);
  }

  message(id: string): ReadonlySignal<Message> | undefined {
    return this.nodes.get(id);
  }

  siblings(id: string): readonly string[] {
    return this.tree.siblings(id);
  }

  hasBelow(id: string): boolean {
    return this.tree.leafBelow(id) !== id;
  }

  get lastAnswer(): AssistantMessage | undefined {
    const messages = this.path.value.map((id) => this.nodes.get(id)!.value);
    return messages.findLast((one): one is AssistantMessage => one.role === "assistant");
  }

  /** What the user said on the shown branch. */
  get questions(): UserMessage[] {
    const messages = this.path.value.map((id) => this.nodes.get(id)!.value);
    return messages.filter((one): one is UserMessage => one.role === "user");
  }

  /** Characters of the images and files that go with the next question. */
  get attachedSize(): number {
    return this.questions.reduce((sum, one) => sum + sizeOfAttached(one), 0);
  }

  send(text: string, attached: Attached = {}): void {
    this.ask(text, attached, this.path.value.at(-1) ?? null);
  }

  /** A changed question is a branch beside the old one. */
  edit(id: string, text: string): void {
    const message = this.nodes.get(id)?.peek();
    this.ask(text, message?.role === "user" ? message : {}, this.tree.get(id)?.parent ?? null);
  }

  /** An answer in the user's words, beside the one that the model gave. */
  rewrite(id: string, text: string): void {
    const message = this.nodes.get(id)?.peek();
    if (this.isBusy || message?.role !== "assistant") return;
    const { role, parent, model } = message;
    this.add({ id: newId(), role, parent, created: this.nextTime(), model, steps: [{ ...emptyStep(), text, finish: "stop" }], state: "done" });
  }

  /** Another answer to the same question. */
  regenerate(id: string): void {
    const parent = this.tree.get(id)?.parent;
    if (parent) this.answer(parent);
  }

  /** The answer to a message that has none. */
  answer(parent: string): void {
    if (this.isBusy) return;
    const message: AssistantMessage = {
      id: newId(), role: "assistant", parent, created: this.nextTime(), model: this.model ?? "", steps: [], state: "streaming",
    };
    this.add(message);
    void this.turnOf(message.id)?.run();
  }

  /** Goes on where an answer stopped; what failed is tried again. */
  goOn(id: string): void {
    if (!this.isBusy) void this.turnOf(id)?.run(true);
  }

  /** Tries again what failed; a model that could not be loaded is loaded first, since the server pauses before it does. */
  retry(id: string): void {
    const message = this.nodes.get(id)?.peek();
    const isUnloaded = message?.role === "assistant" && message.error?.code === "model_load_failed";
    const loaded = isUnloaded ? changeModel(message.model, "loading").catch(() => undefined) : Promise.resolve();
    void loaded.then(() => this.goOn(id)); // which says what is still wrong
  }

  decide(id: string, callId: string, decision: Decision): void {
    void this.turnOf(id)?.decide(callId, decision);
  }

  stop(): void {
    const id = this.active.value ?? this.waiting;
    if (id) this.turnOf(id)?.stop();
  }

  /** Ends what is being written, and keeps nothing more. */
  discard(): void {
    this.deleted = true;
    this.stop();
  }

  /** The shown answer that waits for the user's word on a tool. */
  get waiting(): string | null {
    const last = this.path.value.at(-1);
    const message = last ? this.nodes.get(last)?.value : undefined;
    return message?.role === "assistant" && message.state === "waiting" ? message.id : null;
  }

  select(sibling: string): void {
    this.show(this.tree.leafBelow(sibling));
  }

  remove(id: string): void {
    if (this.isBusy) return;
    const leaf = this.tree.leafWithout(id);
    const removed = this.tree.remove(id);
    this.show(leaf);
    for (const one of removed) this.nodes.delete(one);
    this.keep(this.store.deleteMessages(removed));
  }

  update(given: Partial<Conversation>): void {
    const isOpen = this.info.peek().model === null; // until it is known, and then another chat's choice is for new ones
    const change = isOpen ? { model: this.model, ...given } : given;
    this.info.value = { ...this.info.value, ...change };
    if (!this.deleted) this.changed(this.info.value.id, change);
  }

  private get model(): string | null {
    return cardFor(this.info.value.model)?.id ?? this.info.value.model;
  }

  private ask(text: string, { images, files }: Attached, parent: string | null): void {
    if (this.isBusy) return;
    const waiting = this.waiting;
    if (waiting) this.turnOf(waiting)?.stop();
    const message: UserMessage = { id: newId(), role: "user", parent, created: this.nextTime(), text };
    if (images?.length) message.images = images;
    if (files?.length) message.files = files;
    this.add(message);
    this.answer(message.id);
  }

  // Strictly later than every message, so that the order of siblings does not depend on the clock.
  private nextTime(): number {
    const latest = [...this.nodes.values()].reduce((time, node) => Math.max(time, node.peek().created), 0);
    return Math.max(Date.now(), latest + 1);
  }

  private add(message: Message): void {
    this.nodes.set(message.id, signal(message));
    this.tree.add(message);
    this.show(message.id);
    this.save(message);
  }

  private show(leaf: string | null): void {
    batch(() => {
      this.path.value = this.tree.path(leaf);
      this.update({ leaf, updated: Date.now() });
    });
  }

  private turnOf(id: string): Turn | undefined {
    const known = this.turns.get(id);
    if (known) return known;
    const node = this.nodes.get(id);
    if (node?.value.role !== "assistant") return undefined;
    const draft = structuredClone(node.value);
    const turn = new Turn(draft, this.hostFor(draft, node));
    this.turns.set(id, turn);
    return turn;
  }

  private hostFor(draft: AssistantMessage, node: Signal<Message>) {
    let saving: ReturnType<typeof setTimeout> | undefined;
    const save = () => {
      saving = undefined;
      this.save(draft);
    };
    const frames = new FrameQueue(() => {
      node.value = snapshot(draft);
    });
    return {
      request: (goOn: boolean) => this.request(draft, goOn),
      stream: streamChat,
      callTool: callToolFromPage,
      tool: (name: string) => toolsOf(this.info.value).find((tool) => tool.function.name === name),
      isAllowed,
      allowAlways,
      now: () => performance.now(),
      changed: () => {
        if (draft.state === "streaming" && this.active.value !== draft.id) this.begin(draft.id);
        frames.ask();
        if (draft.state === "streaming") saving ??= setTimeout(save, SAVE_MS); // a hidden page may have no more frames
      },
      settled: () => {
        node.value = snapshot(draft);
        clearTimeout(saving);
        save();
        if (draft.state !== "streaming") this.finish(draft);
      },
    };
  }

  private begin(id: string): void {
    stopTitles();
    this.active.value = id;
    announce(t.value.answering);
    if (cardFor(this.info.peek().model)?.status !== "ready") refreshSoon();
  }

  private finish(draft: AssistantMessage): void {
    if (this.active.value === draft.id) this.active.value = null;
    this.turns.delete(draft.id);
    if (draft.error) void refreshModels(); // the server may have gone, or the model be broken
    this.update({ updated: Date.now() });
    const said = {
      done: textOf(draft).slice(0, MAX_ANNOUNCED), stopped: t.value.stopped, failed: t.value.answerFailed,
      waiting: t.value.approvalNeeded, streaming: "",
    };
    announce(said[draft.state]);
    if (draft.state === "done") void this.askForTitle(draft.model);
  }

  /** Has the model name a conversation that has its first answer and whose name is not the user's. */
  private async askForTitle(model: string): Promise<void> {
    const { title, renamed, settings } = this.info.peek();
    const path = this.path.peek().map((id) => this.nodes.get(id)!.peek());
    const [question, first] = path;
    const isWanted = preferences.peek().titles && !this.hasAskedForTitle && !renamed && path.length <= MAX_UNTITLED;
    if (!isWanted || question?.role !== "user" || title !== firstTitle(question.text, question) || !first || !textOf(first)) return;
    const { system } = merged(preferences.peek().settings, settings);
    const made = await askForTitle(titleRequest(model, path, system, !!cardFor(model)?.reasoning_parser));
    this.hasAskedForTitle = made !== undefined;
    const now = this.info.peek();
    if (made && !now.renamed && now.title === title) this.update({ title: made });
  }

  private request(draft: AssistantMessage, goOn: boolean): object {
    const before = this.tree.path(draft.parent).map((id) => this.nodes.get(id)!.value);
    const card = cardFor(this.info.value.model);
    draft.model = this.model ?? "";
    return chatRequest({
      model: this.model,
      path: [...before, draft],
      settings: merged(preferences.value.settings, this.info.value.settings),
      tools: card?.tool_parser === null ? [] : toolsOf(this.info.value),
      goOn,
    });
  }

  private save(message: Message): void {
    if (!this.deleted && !isLeaving()) this.keep(this.store.putMessage({ ...message, conversation: this.info.value.id }));
  }

  private keep(work: Promise<unknown>): void {
    work.then((isKept) => isKept === false && this.gone(this.info.peek().id), () => notify("error", t.value.notSaved));
  }
}
