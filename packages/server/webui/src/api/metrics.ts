// SPDX-License-Identifier: MIT
// Prometheus' text format -> the numbers of the server page.

export interface Sample {
  at: number; // ms
  running: number;
  waiting: number;
  kvUsage: number; // 0 to 1
  prefixQueries: number;
  prefixHits: number;
  promptTokens: number;
  generatedTokens: number;
  firstTokens: number;
  firstTokenSeconds: number;
}

/** The values of each metric, one for every combination of its labels. */
export function valuesOf(text: string): Map<string, number[]> {
  const found = new Map<string, number[]>();
  for (const line of text.split("\n")) {
    if (!line || line.startsWith("#")) continue;
    const match = /^([A-Za-z_:][\w:]*)(?:\{.*\})?\s+(\S+)/.exec(line);
    if (!match) continue;
    const value = Number(match[2]);
    if (Number.isFinite(value)) found.set(match[1]!, [...(found.get(match[1]!) ?? []), value]);
  }
  return found;
}

export function sampleOf(text: string, at: number): Sample {
  const all = valuesOf(text);
  const value = (name: string) => (all.get(name) ?? []).reduce((sum, one) => sum + one, 0);
  return {
    at,
    running: value("vllm:num_requests_running"),
    waiting: value("vllm:num_requests_waiting"),
    kvUsage: Math.min(1, Math.max(0, ...(all.get("vllm:kv_cache_usage_perc") ?? []))), // of the engine with the fullest cache
    prefixQueries: value("vllm:prefix_cache_queries_total"),
    prefixHits: value("vllm:prefix_cache_hits_total"),
    promptTokens: value("vllm:prompt_tokens_total"),
    generatedTokens: value("vllm:generation_tokens_total"),
    firstTokens: value("vllm:time_to_first_token_seconds_count"),
    firstTokenSeconds: value("vllm:time_to_first_token_seconds_sum"),
  };
}

/** What a counter rose by per second up to each sample but the first; 0 after a restart of the server. */
export function rate(samples: readonly Sample[], name: keyof Sample): { at: number; value: number }[] {
  return samples.slice(1).map((sample, index) => {
    const before = samples[index]!;
    const seconds = (sample.at - before.at) / 1000;
    return { at: sample.at, value: seconds > 0 ? Math.max(0, sample[name] - before[name]) / seconds : 0 };
  });
}
