// SPDX-License-Identifier: MIT
// Which page is shown: the part of the address after #. An address never does more than show something.

import { signal } from "@preact/signals";

export type Route = { page: "chat"; id: string | null } | { page: Page };

const PAGES = ["models", "server", "tools"] as const;
type Page = (typeof PAGES)[number];

export const route = signal<Route>(readRoute());

function readRoute(): Route {
  const name = typeof location === "undefined" ? "" : location.hash.slice(1);
  const page = PAGES.find((one) => name === `/${one}`);
  if (page) return { page };
  const chat = /^\/chat\/(.+)$/.exec(name);
  return { page: "chat", id: chat ? chat[1]! : null }; // whether there is such a chat is for others to say
}

export const hashOf = (wanted: Route): string =>
  wanted.page === "chat" ? (wanted.id ? `#/chat/${wanted.id}` : "#/") : `#/${wanted.page}`;

export function go(wanted: Route, replace = false): void {
  if (location.hash !== hashOf(wanted)) history[replace ? "replaceState" : "pushState"](null, "", hashOf(wanted));
  route.value = wanted;
}

export function followAddress(): void {
  const read = () => {
    route.value = readRoute();
  };
  addEventListener("popstate", read);
  addEventListener("hashchange", read);
}
