// SPDX-License-Identifier: MIT
// Draws at most once a frame, and leaves the page half of its time where drawing takes long.

export class FrameQueue {
  private waiting = false;
  private notBefore = 0;

  constructor(private readonly draw: () => void) {}

  ask(): void {
    if (this.waiting) return;
    this.waiting = true;
    const delay = this.notBefore - performance.now();
    if (document.hidden) setTimeout(this.work, 500); // hidden pages have no frames
    else if (delay > 4) setTimeout(() => requestAnimationFrame(this.work), delay);
    else requestAnimationFrame(this.work);
  }

  private readonly work = () => {
    this.waiting = false;
    const started = performance.now();
    this.draw();
    // After layout and paint, which come at the end of the frame.
    setTimeout(() => {
      const cost = performance.now() - started;
      this.notBefore = performance.now() + (cost > 8 ? cost : 0);
    });
  };
}
