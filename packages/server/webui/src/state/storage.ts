// SPDX-License-Identifier: MIT
// The store that everything is kept in.

import { signal } from "@preact/signals";
import { t } from "../i18n/index.ts";
import { MemoryStore, openStore, type Store } from "../store/database.ts";
import { notify } from "./notices.ts";

let store: Store = new MemoryStore();

export const isStoreReady = signal(false);
export const isPersistent = signal(true);

export const storage = (): Store => store;

export const unsaved = (): void => notify("error", t.value.notSaved);

/** Opens the database; `read` is what is read of it first. */
export async function startStorage(read: () => Promise<void>): Promise<void> {
  store = await openStore(() => notify("error", t.value.replaced));
  await read().catch(() => {
    store = new MemoryStore(); // what is there cannot be read: nothing of it is touched
  });
  isPersistent.value = store.persistent;
  isStoreReady.value = true;
}
