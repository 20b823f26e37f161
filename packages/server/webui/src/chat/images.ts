// SPDX-License-Identifier: MIT
// Images of a question: as data URLs, small enough to be sent, and to be kept by the browser.

import type { Attached } from "./types.ts";

const MAX_SIDE = 2048; // pixels; what models look at is not larger
const MAX_PLAIN = 1 << 20; // bytes of a file that is sent as it is
const MAX_KEPT = 4 << 20; // characters of one
const QUALITY = 0.9;
const TEXT_BESIDE = 7 / 8; // of a request, for images; the rest is for what is said
const TYPES = ["image/png", "image/jpeg", "image/webp", "image/gif"];
const DATA = /^data:image\/(?:png|jpeg|webp|gif);base64,[A-Za-z0-9+/]+={0,2}$/;

export const MAX_IMAGES = 8; // of a question

/** Whether a file is one by its type, also of a kind that this browser may not read. SVG is a text. */
export const isImage = ({ type }: File): boolean => /^image\/(?!svg)/.test(type);

/** A file as a data URL: drawn anew where it is large or of a rare kind; undefined where it cannot be read. */
export async function readImage(file: File): Promise<string | undefined> {
  try {
    const bitmap = await createImageBitmap(file);
    const scale = Math.min(1, MAX_SIDE / Math.max(bitmap.width, bitmap.height));
    if (scale === 1 && file.size <= MAX_PLAIN && TYPES.includes(file.type)) {
      bitmap.close();
      return await asUrl(file);
    }
    const canvas = new OffscreenCanvas(Math.max(1, Math.round(bitmap.width * scale)), Math.max(1, Math.round(bitmap.height * scale)));
    const context = canvas.getContext("2d")!;
    context.fillStyle = "white";
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
    bitmap.close();
    const url = await asUrl(await canvas.convertToBlob({ type: "image/jpeg", quality: QUALITY }));
    return url.length <= MAX_KEPT ? url : undefined;
  } catch {
    return undefined;
  }
}

function asUrl(blob: Blob): Promise<string> {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result as string);
    reader.onerror = () => reject(reader.error!);
    reader.readAsDataURL(blob);
  });
}

/** As many of the images as have room beside others of that size in a request of at most so many bytes, text included. */
export function fitting(images: readonly string[], held: number, most: number): string[] {
  const taken: string[] = [];
  for (const url of images) {
    held += url.length;
    if (held > most * TEXT_BESIDE) break;
    taken.push(url);
  }
  return taken;
}

/** Characters that images and files of a question take in a request, about. */
export const sizeOfAttached = ({ images = [], files = [] }: Attached): number =>
  images.reduce((sum, url) => sum + url.length, 0) + files.reduce((sum, { text }) => sum + text.length, 0);

/** Images from a file or the database: those that are none are left out. */
export function keptImages(data: unknown): string[] {
  if (!Array.isArray(data)) return [];
  return data.filter((one): one is string => typeof one === "string" && one.length <= MAX_KEPT && DATA.test(one)).slice(0, MAX_IMAGES);
}
