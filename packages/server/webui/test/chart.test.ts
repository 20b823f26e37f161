// SPDX-License-Identifier: MIT
import assert from "node:assert/strict";
import { test } from "node:test";
import { rate, type Sample, sampleOf } from "../src/api/metrics.ts";
import { axisEnd, spanFor } from "../src/ui/Chart.tsx";

test("half of a value axis is a round number, and nothing is cut off", () => {
  const ends = [0.03, 1, 2, 2.1, 3, 7, 10, 10.5, 99, 101, 1234, 20_000].map((most) => axisEnd(most));
  assert.deepEqual(ends, [0.04, 1, 2, 4, 4, 10, 10, 20, 100, 200, 2000, 20_000]);
});

test("the time axis grows in steps", () => {
  assert.deepEqual([0, 59_000, 60_000, 61_000, 121_000, 3e6].map(spanFor), [60_000, 60_000, 60_000, 120_000, 360_000, 360_000]);
});

test("rates stand where their samples do, and one sample has none", () => {
  const samples: Sample[] = [[1000, 5], [3000, 15], [4000, 0]].map(([at, count]) => sampleOf(`vllm:generation_tokens_total ${count}`, at!));
  assert.deepEqual(rate(samples, "generatedTokens"), [{ at: 3000, value: 5 }, { at: 4000, value: 0 }]);
  assert.deepEqual(rate(samples.slice(0, 1), "generatedTokens"), []);
});
