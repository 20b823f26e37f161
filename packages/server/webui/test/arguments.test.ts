// SPDX-License-Identifier: MIT
import assert from "node:assert/strict";
import { test } from "node:test";
import { readArguments } from "../src/chat/arguments.ts";

const fault = (schema: unknown, value: unknown): string | undefined => {
  const read = readArguments(JSON.stringify({ v: value }), { type: "object", properties: { v: schema } });
  return typeof read === "string" ? read.replace("The arguments do not fit the tool's schema: ", "") : undefined;
};

test("arguments are one JSON object; none at all are an empty one", () => {
  assert.deepEqual(readArguments("", {}), {});
  assert.deepEqual(readArguments(' {"a": 1} ', {}), { a: 1 });
  assert.equal(readArguments("[1]", {}), "The arguments must be one JSON object.");
  assert.equal(readArguments("null", {}), "The arguments must be one JSON object.");
  assert.equal(readArguments('{"a"', {}), "The JSON of the arguments cannot be read.");
});

test("what does not fit is said, each fault with its place", () => {
  const schema = { type: "object", properties: { zone: { type: "string" }, days: { type: "array", items: { type: "integer" } } }, required: ["zone", "unit"], additionalProperties: false };
  assert.equal(
    readArguments('{"zone": 5, "days": [1, "x"], "extra": 1}', schema),
    "The arguments do not fit the tool's schema: 'unit' is a required property; zone: 5 is not of type 'string'; days[1]: 'x' is not of type 'integer'; Additional properties are not allowed ('extra' was unexpected)",
  );
  assert.deepEqual(readArguments('{"zone": "a", "unit": 1}', { ...schema, additionalProperties: true }), { zone: "a", unit: 1 });
});

const CASES: readonly [schema: unknown, fits: unknown[], not: unknown[]][] = [
  [{ type: ["string", "null"] }, ["a", null], [1, {}, []]],
  [{ type: "integer" }, [1, 1.0, -3], [1.5, "1", true]],
  [{ type: "number" }, [1.5], ["1"]],
  [{ type: "boolean" }, [true], [1, "true"]],
  [{ enum: ["a", 1, { b: [1] }] }, ["a", 1, { b: [1] }], ["b", "1", { b: [2] }, { b: [1], c: 1 }]],
  [{ const: null }, [null], [0, ""]],
  [{ minimum: 1, maximum: 3 }, [1, 3, "no number"], [0, 4]],
  [{ exclusiveMinimum: 1, exclusiveMaximum: 3 }, [2], [1, 3]],
  [{ minLength: 2, maxLength: 3 }, ["ab", "\u{1F600}\u{1F600}", 5], ["a", "abcd", "\u{1F600}"]],
  [{ minItems: 1, maxItems: 2 }, [[1]], [[], [1, 2, 3]]],
  [{ minProperties: 1, maxProperties: 2 }, [{ a: 1 }], [{}, { a: 1, b: 1, c: 1 }]],
  [{ additionalProperties: { type: "string" } }, [{ a: "x" }], [{ a: 1 }]],
  [{ prefixItems: [{ type: "string" }], items: { type: "number" } }, [["a", 1]], [[1], ["a", "b"]]],
  [{ items: [{ type: "string" }], additionalItems: false }, [["a"], []], [["a", 1], [1]]],
  [{ anyOf: [{ type: "string" }, { type: "number", minimum: 5 }] }, ["a", 6], [4, null]],
  [{ oneOf: [{ type: "number" }, { type: "integer" }] }, [1.5], [1, "a"]],
  [{ allOf: [{ type: "string" }, { maxLength: 1 }] }, ["a"], ["ab", 1]],
  [false, [], [1]],
  [true, [1, null], []],
];

test("the keywords", () => {
  for (const [schema, fits, not] of CASES) {
    for (const value of fits) assert.equal(fault(schema, value), undefined, JSON.stringify([schema, value]));
    for (const value of not) assert.equal(typeof fault(schema, value), "string", JSON.stringify([schema, value]));
  }
});

test("what is not known is let through", () => {
  for (const schema of [{ type: "date" }, { pattern: "^b" }, { format: "email" }, { $ref: "https://example.org/x" }, { $ref: "#anchor" }, { $ref: "#/nowhere" }, { $ref: "#/%zz" }, { minimum: "5" }, { required: "v" }, { enum: "ab" }, { properties: [1] }, 5, null]) {
    assert.equal(fault(schema, "a"), undefined, JSON.stringify(schema));
  }
  assert.equal(fault({ patternProperties: { "^x": {} }, additionalProperties: false }, { xa: 1 }), undefined);
});

test("references within the schema", () => {
  const tree = { $defs: { "no/de~": { type: "object", properties: { left: { $ref: "#/$defs/no~1de~0" } }, additionalProperties: false } }, properties: { tree: { $ref: "#/$defs/no~1de~0" } } };
  assert.deepEqual(readArguments('{"tree": {"left": {"left": {}}}}', tree), { tree: { left: { left: {} } } });
  assert.match(String(readArguments('{"tree": {"left": {"right": {}}}}', tree)), /tree\.left: Additional properties are not allowed \('right' was unexpected\)/);
  const beside = { properties: { v: { $ref: "#/$defs/s", maxLength: 1 } }, $defs: { s: { type: "string" } } };
  assert.equal(typeof readArguments('{"v": "ab"}', beside), "string");
  assert.deepEqual(readArguments('{"v": "ab"}', { ...beside, $schema: "http://json-schema.org/draft-07/schema#" }), { v: "ab" });
  assert.deepEqual(readArguments('{"toString": 1, "__proto__": 2}', { properties: { a: {} }, required: [] }), JSON.parse('{"toString": 1, "__proto__": 2}'));
  assert.match(String(readArguments("{}", { required: ["toString"] })), /'toString' is a required property/);
});

test("hostile schemas and arguments end soon, and are let through", () => {
  const before = process.cpuUsage();
  const circle = { $ref: "#" };
  assert.deepEqual(readArguments('{"a": 1}', circle), { a: 1 });
  const doubling = { $defs: { d: { anyOf: [{ $ref: "#/$defs/d" }, { $ref: "#/$defs/d" }] } }, $ref: "#/$defs/d" };
  assert.deepEqual(readArguments("{}", doubling), {});
  const wide = Object.fromEntries(Array.from({ length: 60 }, (_, at) => [`d${at}`, { allOf: [{ $ref: `#/$defs/d${at + 1}` }, { $ref: `#/$defs/d${at + 1}` }] }]));
  assert.deepEqual(readArguments("{}", { $defs: { ...wide, d60: { type: "string" } }, $ref: "#/$defs/d0" }), {});
  const long = "x".repeat(100_000);
  assert.deepEqual(readArguments(JSON.stringify({ v: long }), { properties: { v: { anyOf: Array.from({ length: 10_000 }, () => ({ maxLength: 5 })) } } }), { v: long });
  const deep = `${'{"a":'.repeat(20_000)}1${"}".repeat(20_000)}`;
  assert.equal(typeof readArguments(deep, { additionalProperties: { $ref: "#" } }), "object");
  assert.ok(process.cpuUsage(before).user < 3e6); // microseconds of CPU; the clock would count other processes
});

test("the values of a fault are short", () => {
  const read = String(readArguments(JSON.stringify({ v: "x".repeat(10_000), w: 1, a: 1, b: 1, c: 1, d: 1, e: 1 }), { additionalProperties: { type: "null" } }));
  assert.ok(read.length < 500);
  assert.equal(read.split("; ").length, 5);
});
