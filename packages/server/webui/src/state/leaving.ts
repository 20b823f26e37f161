// SPDX-License-Identifier: MIT
// Whether the page is going away: what fails then fails for that reason, and is nothing to keep.

let leaving = false;

export const isLeaving = (): boolean => leaving;

export function watchLeaving(): void {
  addEventListener("pagehide", () => (leaving = true));
  addEventListener("pageshow", () => (leaving = false));
}
