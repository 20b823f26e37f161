// SPDX-License-Identifier: MIT
// Settings of requests: their ranges, how chat and general settings come together, and what goes on the wire.

import type { ChatSettings } from "./types.ts";

export interface NumberRange {
  min: number;
  max: number;
  step: number;
  integer: boolean;
}

export type NumberSetting =
  | "temperature" | "topP" | "topK" | "minP" | "maxTokens"
  | "presencePenalty" | "frequencyPenalty" | "repetitionPenalty" | "seed";

const real = (min: number, max: number, step: number): NumberRange => ({ min, max, step, integer: false });
const whole = (min: number, max: number): NumberRange => ({ min, max, step: 1, integer: true });

/** The server's own limits; the smallest values of top p and repetition penalty are above 0. */
export const RANGES: Readonly<Record<NumberSetting, NumberRange>> = {
  temperature: real(0, 100, 0.1),
  topP: real(0.001, 1, 0.05),
  topK: whole(-1, 1_000_000),
  minP: real(0, 1, 0.01),
  maxTokens: whole(1, 16_777_216),
  presencePenalty: real(-2, 2, 0.1),
  frequencyPenalty: real(-2, 2, 0.1),
  repetitionPenalty: real(0.01, 100, 0.05),
  seed: whole(-Number.MAX_SAFE_INTEGER, Number.MAX_SAFE_INTEGER),
};

/** Where a number is worth looking for: the part of its range that a slider has. Its field takes all of it. */
export const SLIDERS: Readonly<Partial<Record<NumberSetting, { least: number; most: number; step: number }>>> = {
  temperature: { least: 0, most: 2, step: 0.05 },
  topP: { least: 0.01, most: 1, step: 0.01 },
  topK: { least: 0, most: 200, step: 1 },
  minP: { least: 0, most: 1, step: 0.01 },
  presencePenalty: { least: -2, most: 2, step: 0.1 },
  frequencyPenalty: { least: -2, most: 2, step: 0.1 },
  repetitionPenalty: { least: 0.5, most: 2, step: 0.05 },
};

// What counts where neither a request nor the server's card of the model says it.
const NEUTRAL: ChatSettings = { presencePenalty: 0, frequencyPenalty: 0, repetitionPenalty: 1 };

const WIRE: Readonly<Record<NumberSetting, string>> = {
  temperature: "temperature",
  topP: "top_p",
  topK: "top_k",
  minP: "min_p",
  maxTokens: "max_completion_tokens",
  presencePenalty: "presence_penalty",
  frequencyPenalty: "frequency_penalty",
  repetitionPenalty: "repetition_penalty",
  seed: "seed",
};

export const NUMBER_SETTINGS = Object.keys(RANGES) as NumberSetting[];
export const MAX_STOPS = 16;
export const TOP_LOGPROBS = 5;

/** The chat's settings over the general ones. */
export function merged(general: ChatSettings, chat: ChatSettings): ChatSettings {
  return { ...general, ...chat };
}

/** What the server takes for numbers that a request leaves out; nothing where it does not say (a model that is not loaded). */
export function served(defaults?: Readonly<Record<string, number>>): ChatSettings {
  if (!defaults) return {};
  const told = Object.fromEntries(NUMBER_SETTINGS.filter((name) => WIRE[name] in defaults).map((name) => [name, defaults[WIRE[name]]]));
  return { ...NEUTRAL, ...told };
}

const IN_GROUPS = /^[+-]?\d{1,3}(?:[.,'’\s]\d{3})+$/; // 16,000 as it is written in one country or another

/** Reads a number from a field; undefined where the field is empty, null where it holds no allowed number. */
export function readNumber(text: string, range: NumberRange): number | undefined | null {
  const given = text.trim();
  const trimmed = range.integer && IN_GROUPS.test(given) ? given.replace(/[^\d-]/g, "") : given.replace(",", ".");
  if (!trimmed) return undefined;
  const value = Number(trimmed);
  if (!Number.isFinite(value) || value < range.min || value > range.max) return null;
  return range.integer && !Number.isInteger(value) ? null : value;
}

/** Whether a text is a JSON schema as far as can be told here: an object. */
export function isSchema(text: string): boolean {
  try {
    const value: unknown = JSON.parse(text);
    return typeof value === "object" && value !== null && !Array.isArray(value);
  } catch {
    return false;
  }
}

/** The settings as fields of a chat request. */
export function wireFields(settings: ChatSettings): Record<string, unknown> {
  const fields: Record<string, unknown> = {};
  for (const name of NUMBER_SETTINGS) if (settings[name] !== undefined) fields[WIRE[name]] = settings[name];
  if (settings.stop?.length) fields.stop = settings.stop;
  if (settings.thinking !== undefined) fields.enable_thinking = settings.thinking;
  if (settings.logprobs) Object.assign(fields, { logprobs: true, top_logprobs: TOP_LOGPROBS });
  if (settings.schema && isSchema(settings.schema)) {
    const schema: unknown = JSON.parse(settings.schema);
    fields.response_format = { type: "json_schema", json_schema: { name: "answer", schema } };
  }
  return fields;
}

/** Keeps of unknown data what settings may hold. */
export function readSettings(data: unknown): ChatSettings {
  const settings: ChatSettings = {};
  if (typeof data !== "object" || data === null) return settings;
  const given = data as Record<string, unknown>;
  for (const name of NUMBER_SETTINGS) {
    const value = given[name];
    const { min, max, integer } = RANGES[name];
    const fits = typeof value === "number" && value >= min && value <= max && (!integer || Number.isInteger(value));
    if (fits) settings[name] = value;
  }
  for (const name of ["system", "schema"] as const) {
    if (typeof given[name] === "string") settings[name] = given[name];
  }
  for (const name of ["thinking", "logprobs"] as const) {
    if (typeof given[name] === "boolean") settings[name] = given[name];
  }
  if (Array.isArray(given.stop)) {
    settings.stop = given.stop.filter((one): one is string => typeof one === "string" && !!one).slice(0, MAX_STOPS);
  }
  return settings;
}
