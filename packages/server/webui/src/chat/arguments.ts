// SPDX-License-Identifier: MIT
// The arguments of a call: read, and checked against the tool's JSON schema before anybody is asked about them.
//
// The same is let through and said as by the server's own loop, which checks again when a call runs. What is not known
// here (patterns, formats, references to elsewhere) is allowed. The work is bounded, for schemas come from servers that
// nobody trusts: past MAX_WORK steps or MAX_DEPTH levels everything fits.

const MAX_WORK = 500_000;
const MAX_DEPTH = 64;
const MAX_FAULTS = 5;
const MAX_SHOWN = 80; // characters of a value in a sentence

export type Arguments = Record<string, unknown>;

/** The arguments as an object, or a sentence for the model that says what is wrong with them. */
export function readArguments(written: string, schema: unknown): Arguments | string {
  let value: unknown;
  try {
    value = JSON.parse(written.trim() || "{}");
  } catch {
    return "The JSON of the arguments cannot be read.";
  }
  if (!isObject(value)) return "The arguments must be one JSON object.";
  const faults = new Checker(schema).faults(value);
  return faults.length ? `The arguments do not fit the tool's schema: ${faults.join("; ")}` : value;
}

const isObject = (value: unknown): value is Arguments => typeof value === "object" && value !== null && !Array.isArray(value);
const isCount = (value: unknown): value is number => typeof value === "number" && Number.isFinite(value);

class OutOfWork extends Error {}

class Checker {
  private left = MAX_WORK;
  private found: string[] | undefined; // undefined while it only matters whether something fits

  private readonly refersAlone: boolean; // in old drafts nothing counts beside a reference

  constructor(private readonly root: unknown) {
    const draft = isObject(root) ? root.$schema : undefined;
    this.refersAlone = typeof draft === "string" && /draft-0[3467]/.test(draft);
  }

  faults(value: unknown): string[] {
    const found: string[] = [];
    this.found = found;
    try {
      this.fits(this.root, value, "", 0);
    } catch (error) {
      if (!(error instanceof OutOfWork)) throw error;
      return [];
    }
    return found;
  }

  private work(steps: number): void {
    this.left -= steps;
    if (this.left < 0) throw new OutOfWork();
  }

  private fault(at: string, text: () => string): false {
    if (this.found && this.found.length < MAX_FAULTS) this.found.push(at ? `${at}: ${text()}` : text());
    return false;
  }

  /** Whether a value fits, without a word of why not. */
  private quietly(schema: unknown, value: unknown, depth: number): boolean {
    const found = this.found;
    this.found = undefined;
    try {
      return this.fits(schema, value, "", depth);
    } finally {
      this.found = found;
    }
  }

  private fits(schema: unknown, value: unknown, at: string, depth: number): boolean {
    this.work(1);
    if (depth > MAX_DEPTH) throw new OutOfWork();
    if (schema === false) return this.fault(at, () => `False schema does not allow ${shown(value)}`);
    if (!isObject(schema)) return true;
    if (typeof schema.$ref === "string") {
      const target = this.referred(schema.$ref);
      const fits = target === undefined || this.fits(target, value, at, depth + 1);
      if (!fits || this.refersAlone) return fits;
    }
    // Each of these says its own fault: all are looked at where faults are wanted.
    const checks = [this.isOfType, this.isNamed, this.isInRange, this.hasLength, this.hasMembers, this.hasItems, this.isCombined];
    let all = true;
    for (const check of checks) {
      all = check.call(this, schema, value, at, depth) && all;
      if (!all && !this.found) return false;
    }
    return all;
  }

  private referred(reference: string): unknown {
    this.work(reference.length >> 2);
    if (reference !== "#" && !reference.startsWith("#/")) return undefined;
    let found = this.root;
    for (const part of reference.split("/").slice(1)) {
      const name = unescaped(part);
      if (typeof found !== "object" || found === null || name === undefined || !Object.hasOwn(found, name)) return undefined;
      found = (found as Arguments)[name];
    }
    return found;
  }

  private isOfType({ type }: Arguments, value: unknown, at: string): boolean {
    const wanted = Array.isArray(type) ? type : [type];
    this.work(wanted.length);
    if (!wanted.every((one) => typeof one === "string" && Object.hasOwn(TYPES, one)) || wanted.some((one) => TYPES[one as string]!(value))) return true;
    return this.fault(at, () => `${shown(value)} is not of type ${wanted.map((one) => `'${one}'`).join(", ")}`);
  }

  private isNamed(schema: Arguments, value: unknown, at: string): boolean {
    const { enum: names } = schema;
    if (Object.hasOwn(schema, "const") && !this.same(schema.const, value, 0)) return this.fault(at, () => `${shown(schema.const)} was expected`);
    if (!Array.isArray(names) || names.some((one) => this.same(one, value, 0))) return true;
    return this.fault(at, () => `${shown(value)} is not one of [${names.slice(0, 20).map(shown).join(", ")}${names.length > 20 ? ", ..." : ""}]`);
  }

  private isInRange({ minimum, maximum, exclusiveMinimum, exclusiveMaximum }: Arguments, value: unknown, at: string): boolean {
    if (typeof value !== "number") return true;
    if (isCount(minimum) && value < minimum) return this.fault(at, () => `${value} is less than the minimum of ${minimum}`);
    if (isCount(maximum) && value > maximum) return this.fault(at, () => `${value} is greater than the maximum of ${maximum}`);
    if (isCount(exclusiveMinimum) && value <= exclusiveMinimum) return this.fault(at, () => `${value} is less than or equal to the minimum of ${exclusiveMinimum}`);
    if (isCount(exclusiveMaximum) && value >= exclusiveMaximum) return this.fault(at, () => `${value} is greater than or equal to the maximum of ${exclusiveMaximum}`);
    return true;
  }

  private hasLength(schema: Arguments, value: unknown, at: string): boolean {
    const [least, most] = typeof value === "string" ? [schema.minLength, schema.maxLength] : Array.isArray(value) ? [schema.minItems, schema.maxItems]
      : isObject(value) ? [schema.minProperties, schema.maxProperties] : [];
    if (!isCount(least) && !isCount(most)) return true;
    const length = this.lengthOf(value);
    const [few, many] = isObject(value) ? ["does not have enough properties", "has too many properties"] : ["is too short", "is too long"];
    if (isCount(least) && length < least) return this.fault(at, () => `${shown(value)} ${few}`);
    if (isCount(most) && length > most) return this.fault(at, () => `${shown(value)} ${many}`);
    return true;
  }

  /** Characters of a text as Unicode counts them, items, or members. */
  private lengthOf(value: unknown): number {
    if (Array.isArray(value)) return value.length;
    const length = typeof value === "string" ? value.length : Object.keys(value as object).length;
    this.work(length >> 4);
    if (typeof value !== "string") return length;
    let pairs = 0;
    for (let index = 0; index < length; index++) if ((value.charCodeAt(index) & 0xfc00) === 0xd800) pairs++;
    return length - pairs;
  }

  private hasMembers(schema: Arguments, value: unknown, at: string, depth: number): boolean {
    if (!isObject(value)) return true;
    const { required, properties, additionalProperties, patternProperties } = schema;
    let all = true;
    for (const name of Array.isArray(required) ? required : []) {
      this.work(1);
      if (typeof name === "string" && !Object.hasOwn(value, name)) all = this.fault(at, () => `${shown(name)} is a required property`);
    }
    const known = isObject(properties) ? properties : {};
    const others: string[] = [];
    for (const name of Object.keys(value)) {
      this.work(1);
      if (Object.hasOwn(known, name)) all = this.fits(known[name], value[name], at ? `${at}.${name.slice(0, MAX_SHOWN)}` : name.slice(0, MAX_SHOWN), depth + 1) && all;
      else others.push(name);
      if (!all && !this.found) return false;
    }
    if (isObject(patternProperties) || additionalProperties === undefined) return all;
    if (additionalProperties === false) {
      const listed = () => others.slice(0, 10).map(shown).join(", ");
      return others.length ? this.fault(at, () => `Additional properties are not allowed (${listed()} ${others.length > 1 ? "were" : "was"} unexpected)`) : all;
    }
    for (const name of others) all = this.fits(additionalProperties, value[name], at ? `${at}.${name.slice(0, MAX_SHOWN)}` : name.slice(0, MAX_SHOWN), depth + 1) && all;
    return all;
  }

  private hasItems({ items, prefixItems, additionalItems }: Arguments, value: unknown, at: string, depth: number): boolean {
    if (!Array.isArray(value)) return true;
    const first = Array.isArray(prefixItems) ? prefixItems : Array.isArray(items) ? items : []; // the older drafts have the list in `items`
    const rest = Array.isArray(items) ? additionalItems : items;
    let all = true;
    for (const [index, item] of value.entries()) {
      const schema = index < first.length ? first[index] : rest;
      all = this.fits(schema, item, `${at}[${index}]`, depth + 1) && all;
      if (!all && !this.found) return false;
    }
    return all;
  }

  private isCombined({ anyOf, oneOf, allOf }: Arguments, value: unknown, at: string, depth: number): boolean {
    let all = true;
    for (const one of Array.isArray(allOf) ? allOf : []) all = this.fits(one, value, at, depth + 1) && all;
    const fitting = (schemas: unknown[]) => schemas.filter((one) => this.quietly(one, value, depth + 1)).length;
    const none = () => `${shown(value)} is not valid under any of the given schemas`;
    if (Array.isArray(anyOf) && !anyOf.some((one) => this.quietly(one, value, depth + 1))) all = this.fault(at, none);
    if (Array.isArray(oneOf)) {
      const count = fitting(oneOf);
      if (!count) all = this.fault(at, none);
      else if (count > 1) all = this.fault(at, () => `${shown(value)} is valid under ${count} of the given schemas, and one is allowed`);
    }
    return all;
  }

  private same(one: unknown, other: unknown, depth: number): boolean {
    this.work(typeof one === "string" ? 1 + (one.length >> 4) : 1);
    if (one === other) return true;
    if (depth > MAX_DEPTH) throw new OutOfWork();
    if (Array.isArray(one) && Array.isArray(other)) return one.length === other.length && one.every((item, index) => this.same(item, other[index], depth + 1));
    if (!isObject(one) || !isObject(other)) return false;
    const names = Object.keys(one);
    return names.length === Object.keys(other).length && names.every((name) => Object.hasOwn(other, name) && this.same(one[name], other[name], depth + 1));
  }
}

const TYPES: Readonly<Record<string, (value: unknown) => boolean>> = {
  string: (value) => typeof value === "string",
  number: (value) => typeof value === "number",
  integer: (value) => Number.isInteger(value),
  boolean: (value) => typeof value === "boolean",
  null: (value) => value === null,
  array: Array.isArray,
  object: isObject,
};

/** A part of a JSON pointer in an address. */
function unescaped(part: string): string | undefined {
  try {
    return decodeURIComponent(part).replaceAll("~1", "/").replaceAll("~0", "~");
  } catch {
    return undefined;
  }
}

/** A value in a sentence; of long ones the beginning, of nested ones what they are. */
function shown(value: unknown): string {
  if (typeof value === "string") return `'${value.slice(0, MAX_SHOWN)}${value.length > MAX_SHOWN ? "..." : ""}'`;
  if (Array.isArray(value)) return value.length ? `an array of ${value.length}` : "[]";
  if (isObject(value)) return Object.keys(value).length ? "the object" : "{}";
  return String(value);
}
