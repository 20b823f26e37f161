// SPDX-License-Identifier: MIT
// Requests to this server: addresses relative to the page, the API key, and errors with what the server said.

export type Failure = "network" | "http" | "stream" | "dropped" | "format";

/** What went wrong, in a form that can be kept with a message and shown later. */
export interface ErrorInfo {
  kind: Failure;
  message: string;
  status?: number;
  param?: string;
  code?: string; // the server's word for what it is, for programs
}

export class ApiError extends Error {
  constructor(readonly info: ErrorInfo) {
    super(info.message);
    this.name = "ApiError";
  }
}

const MAX_MESSAGE = 2000; // characters of an error that are shown
const MAX_WAIT_MS = 15_000; // for what the server knows without work

let currentKey: () => string = () => "";
let mostBody = Infinity;

/** Bytes that a request may have, as the server has said. */
export const maxBody = (): number => mostBody;

/** Says where the API key comes from; it is asked for at each request. */
export function useKey(source: () => string): void {
  currentKey = source;
}

/** A request that has been answered with success; `path` is relative to the page. An own key stands for the API key. */
export async function send(path: string, init: RequestInit = {}, ownKey = ""): Promise<Response> {
  const headers = new Headers(init.headers);
  const key = ownKey || currentKey();
  if (key) headers.set("authorization", `Bearer ${key}`);
  let response: Response;
  try {
    response = await fetch(path, { ...init, headers, credentials: "same-origin", redirect: "error" });
  } catch (error) {
    if (isAbort(error)) throw error;
    throw new ApiError({ kind: "network", message: "" });
  }
  if (!response.ok) throw await failureOf(response);
  const said = Number(response.headers.get("x-max-body-bytes"));
  if (said > 0) mostBody = said;
  return response;
}

/** What a path answers with; where that takes too long, the server counts as gone. */
export const getJson = async (path: string): Promise<unknown> =>
  readJson(await send(path, { signal: AbortSignal.timeout(MAX_WAIT_MS) }));

export async function postJson(path: string, body: unknown, signal?: AbortSignal, ownKey = ""): Promise<unknown> {
  return readJson(await send(path, jsonRequest(body, signal), ownKey));
}

async function readJson(response: Response): Promise<unknown> {
  try {
    return await response.json();
  } catch (error) {
    if (isAbort(error)) throw error;
    throw new ApiError({ kind: error instanceof SyntaxError ? "format" : "dropped", message: "" });
  }
}

export function jsonRequest(body: unknown, signal?: AbortSignal): RequestInit {
  const init: RequestInit = {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(body),
  };
  if (signal) init.signal = signal;
  return init;
}

async function failureOf(response: Response): Promise<ApiError> {
  const info: ErrorInfo = { kind: "http", status: response.status, message: "" };
  const code = response.headers.get("x-error-code"); // where the error's own form has no place for it
  if (code) info.code = code.slice(0, 200);
  try {
    const text = (await response.text()).slice(0, 20_000);
    Object.assign(info, describeError(JSON.parse(text)));
  } catch {
    // a proxy's page, or nothing at all: the status says what there is to say
  }
  return new ApiError(info);
}

/** Message, parameter and code of OpenAI's error body. */
export function describeError(body: unknown): Pick<ErrorInfo, "message" | "param" | "code"> {
  const error = (body as { error?: unknown } | null)?.error;
  if (typeof error === "string") return { message: shortened(error) };
  const { message, param, code } = (error ?? {}) as { message?: unknown; param?: unknown; code?: unknown };
  const described: ReturnType<typeof describeError> = { message: shortened(message) };
  if (typeof param === "string" && param) described.param = param.slice(0, 200);
  if (typeof code === "string" && code) described.code = code.slice(0, 200);
  return described;
}

const shortened = (message: unknown): string => (typeof message === "string" ? message.slice(0, MAX_MESSAGE) : "");

const OF_A_COMMAND = /(^|[^\w-])--[a-z]/; // as --mem, which nobody can set on a page

/** What the server says, where it speaks of nothing that is done on a command line. */
export const sayable = (said: string | undefined): string =>
  said === undefined || OF_A_COMMAND.test(said) ? "" : said;

/** The server lets nobody without a key (or from another page) do this, and has not done it. */
export const isRefusal = (error: unknown): boolean =>
  error instanceof ApiError && (error.info.status === 401 || error.info.status === 403);

export function isAbort(error: unknown): boolean {
  return error instanceof DOMException && error.name === "AbortError";
}

export function errorInfo(error: unknown): ErrorInfo {
  if (error instanceof ApiError) return error.info;
  return { kind: "stream", message: error instanceof Error ? error.message : String(error) };
}
