// SPDX-License-Identifier: MIT
// Which addresses may be followed, and which pictures shown.

const SCHEMES = new Set(["http:", "https:", "mailto:"]);
const PICTURE = /^data:image\/(?:png|jpeg|gif|webp|avif);base64,[A-Za-z0-9+/=\s]+$/;
const MAX_ADDRESS = 4096;

/** The address of a link, or undefined where it may not be one: only absolute ones with a known scheme are. */
export function safeLink(address: string): string | undefined {
  if (address.length > MAX_ADDRESS) return undefined;
  try {
    const url = new URL(address.trim());
    return SCHEMES.has(url.protocol) ? url.href : undefined;
  } catch {
    return undefined;
  }
}

/** The source of a picture that needs no request to anybody. */
export function safePicture(source: string): string | undefined {
  return PICTURE.test(source) ? source : undefined;
}
