// SPDX-License-Identifier: MIT
// Text files of a question: read in the browser, sent as blocks of code behind the text.

import type { TextFile, UserMessage } from "./types.ts";

export const MAX_FILE = 512 * 1024; // bytes of one
export const MAX_FILES = 16; // of a question
const MAX_NAME = 200; // characters

/** A block of code, in a fence that is longer than any in it. */
export function fenced(text: string, language = ""): string {
  const longest = [...text.matchAll(/`+/g)].reduce((most, one) => Math.max(most, one[0].length), 2);
  const fence = "`".repeat(longest + 1);
  return `${fence}${language}\n${text.replace(/\n$/, "")}\n${fence}`;
}

/** Why a file is not taken. */
export type FileFault = "empty" | "tooLarge" | "pdf" | "binary" | "notUtf8" | "unreadable";

/** A file, or why it is not taken: a PDF is no text, even where all of its bytes are ASCII. */
export async function readFile(file: File): Promise<TextFile | FileFault> {
  if (!file.size || file.size > MAX_FILE) return file.size ? "tooLarge" : "empty";
  const buffer = await file.arrayBuffer().catch(() => undefined); // a folder, or a file that has gone
  if (!buffer) return "unreadable";
  const bytes = new Uint8Array(buffer);
  const isUtf16 = (bytes[0] === 0xff && bytes[1] === 0xfe) || (bytes[0] === 0xfe && bytes[1] === 0xff);
  if (bytes.includes(0) && !isUtf16) return "binary";
  if (String.fromCharCode(...bytes.subarray(0, 5)) === "%PDF-") return "pdf";
  try {
    return { name: file.name.slice(0, MAX_NAME), text: new TextDecoder("utf-8", { fatal: true }).decode(bytes) };
  } catch {
    return "notUtf8";
  }
}

/** What the model reads of a question: the text, then each file under its name. */
export function withFiles({ text, files = [] }: Pick<UserMessage, "text" | "files">): string {
  const blocks = files.map((file) => `${file.name}:\n${fenced(file.text, languageOf(file.name))}`);
  return [...(text ? [text] : []), ...blocks].join("\n\n");
}

const languageOf = (name: string): string => /\.([A-Za-z0-9+#]{1,12})$/.exec(name)?.[1] ?? "";

/** Bytes of a file's text. */
export const sizeOf = ({ text }: TextFile): number => new Blob([text]).size;

/** Files of an imported message: what is no file, or too large, is left out. */
export function keptFiles(data: unknown): TextFile[] {
  if (!Array.isArray(data)) return [];
  return data.flatMap((one: unknown): TextFile[] => {
    const { name, text } = (one ?? {}) as Record<string, unknown>;
    const isFile = typeof name === "string" && name.length <= MAX_NAME && typeof text === "string" && text.length <= MAX_FILE;
    return isFile ? [{ name, text }] : [];
  }).slice(0, MAX_FILES);
}
