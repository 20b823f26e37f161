// SPDX-License-Identifier: MIT
// IndexedDB: conversations, and their messages one by one. Where it cannot be had, a Map stands in for it.

import type { Conversation, Message } from "../chat/types.ts";
import { readUnfinished, writeUnfinished } from "./preferences.ts";
import { readConversation } from "./records.ts";

export type StoredMessage = Message & { conversation: string };

export interface Store {
  readonly persistent: boolean;
  conversations(): Promise<Conversation[]>;
  messages(conversation: string): Promise<StoredMessage[]>;
  /** Puts what was changed onto what is kept. Here and below false: the conversation is gone, and nothing was written. */
  /** `known` is the whole record as the page has it. */
  changeConversation(id: string, change: Partial<Conversation>, known: Conversation): Promise<boolean>;
  putMessage(message: StoredMessage): Promise<boolean>;
  messageIds(): Promise<readonly string[]>;
  /** A conversation with messages that are new: together or not at all. Fails where a message is there already. */
  add(conversation: Conversation, messages: readonly Message[]): Promise<void>;
  deleteMessages(ids: readonly string[]): Promise<void>;
  deleteConversation(id: string): Promise<void>;
  /** Small things of one kind, as they were kept. */
  records(kind: Kind): Promise<unknown[]>;
  putRecord(kind: Kind, record: { id: string }): Promise<void>;
  deleteRecord(kind: Kind, id: string): Promise<void>;
  clear(): Promise<void>;
}

export type Kind = "folders" | "prompts";

const CHATS = "conversations";
const MESSAGES = "messages";
const BY_CHAT = "conversation";
const FOLDERS = "folders";
const PROMPTS = "prompts";
const VERSION = 3;

/** `onReplaced` is called when a newer page has taken the database over: nothing can be kept here any more. */
export async function openStore(onReplaced: () => void, name = "candle-vllm"): Promise<Store> {
  try {
    const store = new DatabaseStore(await openDatabase(name, onReplaced));
    await store.finish().catch(() => undefined);
    return store;
  } catch {
    return new MemoryStore(); // private windows of some browsers, or a full disk
  }
}

function openDatabase(name: string, onReplaced: () => void): Promise<IDBDatabase> {
  return new Promise((resolve, reject) => {
    const opening = indexedDB.open(name, VERSION);
    opening.onupgradeneeded = ({ oldVersion }) => {
      if (oldVersion < 1) {
        opening.result.createObjectStore(CHATS, { keyPath: "id" });
        opening.result.createObjectStore(MESSAGES, { keyPath: "id" }).createIndex(BY_CHAT, BY_CHAT);
      }
      if (oldVersion < 2) opening.result.createObjectStore(FOLDERS, { keyPath: "id" });
      if (oldVersion < 3) opening.result.createObjectStore(PROMPTS, { keyPath: "id" });
    };
    opening.onsuccess = () => {
      opening.result.onversionchange = () => {
        opening.result.close();
        onReplaced();
      };
      resolve(opening.result);
    };
    opening.onerror = () => reject(opening.error);
    opening.onblocked = () => reject(new Error("blocked"));
  });
}

const answered = <T>(request: IDBRequest<T>): Promise<T> =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

/** A change that waits for what it is put onto, and the whole record that is put without that. */
interface Waiting {
  record: Unfinished;
  transaction?: IDBTransaction;
  hurried: boolean;
}

type Unfinished = [name: typeof CHATS, record: Conversation] | [name: typeof MESSAGES, record: StoredMessage];

class DatabaseStore implements Store {
  readonly persistent = true;

  private readonly pending = new Set<Waiting>();

  constructor(private readonly database: IDBDatabase) {
    addEventListener("pagehide", () => this.hurry());
    addEventListener("pageshow", ({ persisted }) => persisted && writeUnfinished("")); // the page goes on by itself
  }

  async conversations(): Promise<Conversation[]> {
    const kept: unknown[] = await answered(this.database.transaction(CHATS).objectStore(CHATS).getAll());
    return kept.map(readConversation).filter((one) => one !== undefined);
  }

  messages(conversation: string): Promise<StoredMessage[]> {
    return answered(this.database.transaction(MESSAGES).objectStore(MESSAGES).index(BY_CHAT).getAll(conversation));
  }

  changeConversation(id: string, change: Partial<Conversation>, known: Conversation): Promise<boolean> {
    return this.changeWhereThere(id, (at, kept) => at(CHATS).put({ ...kept, ...change }), [CHATS, known]);
  }

  putMessage(message: StoredMessage): Promise<boolean> {
    return this.changeWhereThere(message.conversation, (at) => at(MESSAGES).put(message), [MESSAGES, message]);
  }

  async messageIds(): Promise<readonly string[]> {
    return (await answered(this.database.transaction(MESSAGES).objectStore(MESSAGES).getAllKeys())) as string[];
  }

  add(conversation: Conversation, messages: readonly Message[]): Promise<void> {
    return this.change([CHATS, MESSAGES], (at) => {
      at(CHATS).put(conversation);
      for (const message of messages) at(MESSAGES).add({ ...message, conversation: conversation.id });
    });
  }

  deleteMessages(ids: readonly string[]): Promise<void> {
    return this.change([MESSAGES], (at) => ids.forEach((id) => at(MESSAGES).delete(id)));
  }

  deleteConversation(id: string): Promise<void> {
    return this.change([CHATS, MESSAGES], (at) => {
      at(CHATS).delete(id);
      const finding = at(MESSAGES).index(BY_CHAT).getAllKeys(id);
      finding.onsuccess = () => finding.result.forEach((key) => at(MESSAGES).delete(key));
    }, false);
  }

  records(kind: Kind): Promise<unknown[]> {
    return answered(this.database.transaction(kind).objectStore(kind).getAll());
  }

  putRecord(kind: Kind, record: { id: string }): Promise<void> {
    return this.change([kind], (at) => at(kind).put(record));
  }

  deleteRecord(kind: Kind, id: string): Promise<void> {
    return this.change([kind], (at) => at(kind).delete(id));
  }

  clear(): Promise<void> {
    const all = [CHATS, MESSAGES, FOLDERS, PROMPTS];
    return this.change(all, (at) => all.forEach((name) => at(name).clear()));
  }

  /** One transaction, so that no other tab comes between the reading and the writing; `record` is written without reading. */
  private async changeWhereThere(
    id: string,
    work: (at: (name: string) => IDBObjectStore, kept: Conversation) => unknown,
    record: Unfinished,
  ): Promise<boolean> {
    let isThere = false;
    const waiting: Waiting = { record, hurried: false };
    const change = this.change([CHATS, MESSAGES], (at, transaction) => {
      waiting.transaction = transaction;
      const reading: IDBRequest<Conversation | undefined> = at(CHATS).get(id);
      reading.onsuccess = () => {
        this.pending.delete(waiting);
        isThere = reading.result !== undefined;
        try {
          if (reading.result) work(at, reading.result);
          transaction.commit();
        } catch {
          transaction.abort();
        }
      };
    }, false);
    this.pending.add(waiting);
    try {
      await change;
    } catch (error) {
      if (!waiting.hurried) throw error;
      return true;
    } finally {
      this.pending.delete(waiting);
    }
    return isThere;
  }

  /**
   * Writes at once what still waits for its reading: a page that goes away hears of no reading any more.
   * The tab's next page may read the database before this is written, so it gets the records as well.
   */
  private hurry(): void {
    const all = [...this.pending];
    if (!all.length) return;
    for (const waiting of all) {
      waiting.hurried = true;
      waiting.transaction?.abort();
    }
    this.pending.clear();
    const records = all.map(({ record }) => record);
    writeUnfinished(JSON.stringify(records));
    this.change([CHATS, MESSAGES], (at) => records.forEach(([name, record]) => at(name).put(record))).catch(() => undefined);
  }

  /** Writes what the tab's last page was writing when it went away, except where something newer or nothing is there now. */
  async finish(): Promise<void> {
    const written = readUnfinished();
    if (!written) return;
    writeUnfinished("");
    const records = JSON.parse(written) as Unfinished[];
    await this.change([CHATS, MESSAGES], (at) => {
      for (const [name, record] of records) {
        const reading: IDBRequest<Conversation | undefined> = at(CHATS).get(name === CHATS ? record.id : record.conversation);
        reading.onsuccess = () => {
          const there = reading.result;
          if (there && (name === MESSAGES || there.updated <= record.updated)) at(name).put(record);
        };
      }
    }, false);
  }

  /** With `whole` nothing follows what `work` asks for: it is kept even where the page goes away at once. */
  private change(names: string[], work: (at: (name: string) => IDBObjectStore, transaction: IDBTransaction) => unknown, whole = true): Promise<void> {
    return new Promise((resolve, reject) => {
      const transaction = this.database.transaction(names, "readwrite");
      transaction.oncomplete = () => resolve();
      transaction.onerror = () => reject(transaction.error);
      transaction.onabort = () => reject(transaction.error);
      work((name) => transaction.objectStore(name), transaction);
      if (whole) transaction.commit();
    });
  }
}

export class MemoryStore implements Store {
  readonly persistent = false;
  private readonly chats = new Map<string, Conversation>();
  private readonly kept = new Map<string, StoredMessage>();
  private readonly small = new Map<Kind, Map<string, unknown>>();

  async conversations(): Promise<Conversation[]> {
    return [...this.chats.values()];
  }

  async messages(conversation: string): Promise<StoredMessage[]> {
    return [...this.kept.values()].filter((message) => message.conversation === conversation);
  }

  async changeConversation(id: string, change: Partial<Conversation>): Promise<boolean> {
    const kept = this.chats.get(id);
    if (kept) this.chats.set(id, structuredClone({ ...kept, ...change }));
    return kept !== undefined;
  }

  async putMessage(message: StoredMessage): Promise<boolean> {
    const isThere = this.chats.has(message.conversation);
    if (isThere) this.kept.set(message.id, structuredClone(message));
    return isThere;
  }

  async messageIds(): Promise<readonly string[]> {
    return [...this.kept.keys()];
  }

  async add(conversation: Conversation, messages: readonly Message[]): Promise<void> {
    if (messages.some(({ id }) => this.kept.has(id))) throw new Error("a message is there already");
    this.chats.set(conversation.id, structuredClone(conversation));
    for (const message of messages) await this.putMessage({ ...message, conversation: conversation.id });
  }

  async deleteMessages(ids: readonly string[]): Promise<void> {
    for (const id of ids) this.kept.delete(id);
  }

  async deleteConversation(id: string): Promise<void> {
    this.chats.delete(id);
    for (const message of await this.messages(id)) this.kept.delete(message.id);
  }

  async records(kind: Kind): Promise<unknown[]> {
    return [...(this.small.get(kind)?.values() ?? [])];
  }

  async putRecord(kind: Kind, record: { id: string }): Promise<void> {
    this.small.set(kind, new Map(this.small.get(kind)).set(record.id, structuredClone(record)));
  }

  async deleteRecord(kind: Kind, id: string): Promise<void> {
    this.small.get(kind)?.delete(id);
  }

  async clear(): Promise<void> {
    this.chats.clear();
    this.kept.clear();
    this.small.clear();
  }
}
