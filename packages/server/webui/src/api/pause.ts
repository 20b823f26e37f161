// SPDX-License-Identifier: MIT
// Lets the page draw and answer the user while much data comes at once.

const MAX_MS = 10; // of work without a pause

export class Pauses {
  private since = performance.now();

  /** Waits for the next turn of the event loop where the last one was long ago. */
  async takeIfDue(): Promise<void> {
    if (performance.now() - this.since < MAX_MS) return;
    await nextTurn();
    this.since = performance.now();
  }
}

// A message and not a timer: pages that are not shown have slow timers.
function nextTurn(): Promise<void> {
  return new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => {
      port1.close();
      resolve();
    };
    port2.postMessage(null);
  });
}
