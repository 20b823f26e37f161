// SPDX-License-Identifier: MIT
// Gives the user a file.

const TYPES = { json: "application/json", md: "text/markdown" };

/** A text under a name that is made of a title. */
export function download(text: string, title: string, ending: keyof typeof TYPES): void {
  const address = URL.createObjectURL(new Blob([text], { type: TYPES[ending] }));
  const link = document.createElement("a");
  const name = title.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 40) || "conversation";
  link.href = address;
  link.download = `candle-vllm-${name}-${new Date().toISOString().slice(0, 10)}.${ending}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}
