// SPDX-License-Identifier: MIT
// Whether work grows with the length of its input, by seconds of CPU: how fast the machine is does not matter.

const SHORT = 16_000;

const seconds = (work: () => unknown): number => {
  const before = process.cpuUsage();
  work();
  const { user, system } = process.cpuUsage(before);
  return (user + system) / 1e6;
};

/** How many times as much CPU an input of four times the length costs, the least of five tries. Linear work gives 4,
 * quadratic work 16. Work of less than 5 ms counts as 5 ms, because the clock and the collector disturb what is shorter. */
export const growth = (work: (length: number) => unknown): number =>
  Math.min(
    ...[1, 2, 3, 4, 5].map(() => {
      const short = seconds(() => work(SHORT));
      return seconds(() => work(4 * SHORT)) / Math.max(short, 0.005);
    }),
  );
