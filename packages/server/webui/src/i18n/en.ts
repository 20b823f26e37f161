// English: the dictionary that the others follow.

import type { Imported } from "../store/transfer.ts";

export const en = {
  languageName: "English",
  newChat: "New chat", conversations: "Conversations", search: "Search conversations", settings: "Settings",
  server: "Server", tools: "Tools", shortcuts: "Keyboard shortcuts", hideSidebar: "Hide conversations",
  showSidebar: "Show conversations", skipToInput: "Skip to the message field",
  nothingFound: "Nothing found.", noConversations: "Your conversations will appear here.",
  periods: { today: "Today", yesterday: "Yesterday", week: "Last 7 days", earlier: "Earlier" },
  rename: "Rename", renameOf: (title: string) => `Rename ${title}`, delete: "Delete", deleteOf: (title: string) => `Delete ${title}`,
  deleteChat: "Delete conversation?", deleteChatText: (title: string) => `“${title}” and all its messages will be deleted from this browser.`,
  close: "Close", cancel: "Cancel", dismiss: "Dismiss", retry: "Try again", use: "Use", more: "Show more",

  welcome: "What can I help with?", welcomeModel: (name: string) => `${name} is running on your own server.`,
  notLoaded: (name: string) => `${name} is not loaded yet. Your first message loads it, which can take a while.`,
  noModelYet: "This server has no model yet. Whoever runs it can add one.",
  connecting: "Connecting…", privacy: "Conversations are kept in this browser and are sent to no one but this server.",
  suggestions: [
    "Explain how a large language model works, in five sentences.",
    "Write a Python function that finds the longest word in a text.",
    "Plan three simple dinners for this week, as a table.",
  ],

  models: "Models", modelIs: (name: string) => `Model: ${name}`, noModel: "No model", load: "Load", unload: "Unload",
  loadOf: (name: string) => `Load ${name}`, unloadOf: (name: string) => `Unload ${name}`, alias: "same model",
  modelStates: {
    ready: "ready", unloaded: "not loaded", loading: "loading…", waiting: "waiting to load…", draining: "finishing…",
    unloading: "unloading…", failed: "failed",
  },
  loadingSteps: {
    importing: "starting the engine", reading: "reading the model's files", downloading: "downloading", loading: "loading the weights",
    compiling: "compiling for this machine, once", preparing: "getting ready",
  },
  model: "The model", couldNotLoad: (name: string) => `${name} could not be loaded.`, loadAgain: (name: string) => `Try again to load ${name}`,
  serverSays: "What the server says",
  failures: {
    memory: "It needs more memory than the server has free. Unload another model, or choose a smaller one.",
    not_found: "Its files were not found, or could not be downloaded.", unsupported: "Models of this kind are not supported.",
    damaged: "Its files are damaged or incomplete.", settings: "It is set up in a way that does not work; whoever runs this server can change that.",
    died: "It has stopped working.", other: "Whoever runs this server finds the reason in its log.",
  },
  loadingOf: (name: string) => `Loading ${name}`, loadNow: "Load it now",
  writeAlready: "You can write already: the answer begins when the model is ready.",
  contextTokens: (count: string) => `${count} tokens of context`,
  contextOf: (used: string, most: string) => `${used} of ${most} tokens of context used`,

  messages: "Messages", you: "You", answerOf: (model: string) => (model ? `Answer of ${model}` : "Answer"), message: "Message",
  placeholder: "Write a message", send: "Send", stop: "Stop", answering: "Answering…", stopped: "Stopped.",
  emptyAnswer: "The model answered with nothing.", cutOff: "The answer reached the token limit.", answerFailed: "The answer failed.", approvalNeeded: "A tool waits for your approval.",
  mayBeWrong: "Answers can be wrong. Check what matters.", toEnd: "Go to the newest message",
  earlier: (count: number) => `Show ${count} earlier messages`,
  copy: "Copy", copied: "Copied", copyFailed: "Could not copy", copyCode: "Copy code", copyMessage: "Copy message",
  edit: "Edit", editHint: "Sending begins a new branch; the old one stays.", sendEdited: "Send", answer: "Answer",
  regenerate: "Answer again", goOn: "Continue", source: "Source", probabilities: "Probabilities",
  versions: "Versions", previousVersion: "Previous version", nextVersion: "Next version",
  versionOf: (at: number, all: number) => `version ${at} of ${all}`,
  deleteMessage: "Delete message", deleteMessageText: "This message will be deleted.",
  deleteBranchText: "This message and everything that follows it will be deleted.",
  code: "code", codeIn: (name: string) => (name ? `Code in ${name}` : "Code"), table: "Table", image: "Image", task: "Task",
  thinking: "Thinking…", thought: (time: string) => (time ? `Thought for ${time}` : "Thoughts"),
  tokens: (count: string) => `${count} tokens`, perSecond: "tok/s",
  promptTokens: (count: string, cached: string) => `Prompt: ${count} tokens, ${cached} of them from the cache`,
  generatedTokens: (count: string, reasoning: string) => (reasoning === "0" ? `Generated: ${count} tokens` : `Generated: ${count} tokens, ${reasoning} of them thoughts`),
  firstToken: (time: string) => `First token after ${time}`, inAll: (time: string) => `${time} in all`,
  alternatives: "Likeliest tokens here", chooseToken: "Choose a token to see what else was likely.",

  toolCall: (name: string) => `Tool call: ${name}`, arguments: "Arguments", result: "Result", error: "Error",
  mayRun: (name: string) => `May ${name} run with these arguments?`, allowOnce: "Allow once", allowAlways: "Always allow this tool", deny: "Deny",
  callStates: {
    writing: "writing…", waiting: "needs approval", approved: "approved", running: "running…", done: "done", failed: "failed",
    denied: "denied", unknown: "interrupted",
  },
  toolsOn: (on: number, all: number) => `Tools: ${on} of ${all} on`, toolsOff: "Tools off", noToolsHere: "This model calls no tools",
  toolsInChat: "Use tools in this chat", manageTools: "Servers and permissions",
  toolsInChatText: "The model is told of the tools that are on. It asks you before a call runs.",
  toolsText: "Tools come from the server's MCP servers. They are off in every chat until you turn them on there, and nothing runs before you allow it. What is switched off here can be turned on in no chat.",
  noMcp: "This server has no MCP servers. Whoever runs it can add some.", noServers: "No MCP server is configured.",
  noTools: "No tools.", toolsNeedKey: "To run tools, open this page at the address that the server printed when it started. It ends in #key=…", otherTools: "Other tools", readOnly: "reads only", askAgain: "Always allowed: ask again", allOn: "All on", allOff: "All off",
  reconnects: (count: number) => (count === 1 ? "Reconnected once." : `Reconnected ${count} times.`), log: (count: number) => `Log (${count})`,
  serverStates: { connecting: "connecting…", ready: "ready", failed: "failed", closed: "closed", disabled: "disabled" } as Record<string, string>,

  running: "Running requests", waitingRequests: "Waiting requests", kvCache: "KV cache in use", prefixHits: "Prefix-cache hit rate",
  generation: "Generated", promptWork: "Prompts read", allGenerated: "Tokens generated", allPrompt: "Prompt tokens", meanFirst: "Mean time to first token",
  metricsLocked: "The server's counts need its management key.", name: "Name", state: "State", context: "Context", toolFormat: "Tool calls", reasoningFormat: "Reasoning",

  chatSettings: "Settings of this chat", chatSettingsText: "For this conversation alone. Empty fields follow the settings for all chats.",
  generalText: "For all chats. Empty fields are left to the model and the server.", answers: "Answers",
  tabs: { chat: "This chat", general: "All chats", access: "Access", data: "Data" },
  theme: "Theme", themes: { system: "Like the system", light: "Light", dark: "Dark" }, language: "Language", browserLanguage: "Like the browser",
  titles: "Conversations are named by the model", titlesHint: "A short request after the first answer. Otherwise the first line of your message is the name.",
  resetAll: "Reset all", resetOf: (name: string) => `Reset ${name}`, modelDefault: "default", on: "On", off: "Off",
  defaultIs: (value: string) => `Default: ${value}`, ofAllChats: (value: string) => `All chats: ${value}`, ofModel: "the model's own",
  untold: { maxTokens: "until it ends", seed: "random" } as Record<string, string>, sliderOf: (name: string) => `${name}, slider`,
  between: (least: string, most: string) => `Must be between ${least} and ${most}.`,
  fields: {
    system: "System prompt", temperature: "Temperature", topP: "Top p", topK: "Top k", minP: "Min p", maxTokens: "Most tokens",
    presencePenalty: "Presence penalty", frequencyPenalty: "Frequency penalty", repetitionPenalty: "Repetition penalty", seed: "Seed",
    stop: "Stop texts", thinking: "Thinking", logprobs: "Token probabilities", schema: "Structured output",
  },
  hints: {
    system: "What the model is told before the conversation.", temperature: "0 takes the likeliest token; higher is more varied.",
    topP: "Only the likeliest tokens up to this share.", topK: "Only so many of the likeliest tokens.", minP: "Leaves out tokens far less likely than the first.",
    maxTokens: "Where an answer is cut.", presencePenalty: "Against words that have occurred.", frequencyPenalty: "Against words that occur often.",
    repetitionPenalty: "Above 1 repeats less.", seed: "The same seed gives the same choices.", stop: "One in a line. An answer ends before it.",
    thinking: "For models that can think before they answer.", logprobs: "Shows how likely each token was, under an answer.",
    schema: "A JSON schema that every answer has to follow.",
  },
  placeholders: { system: "You are a helpful assistant.", schema: '{"type": "object", "properties": {"city": {"type": "string"}}}' },
  notASchema: "This is not a JSON object yet; it is not used.",
  apiKey: "API key", rememberKey: "Remember on this device", show: "Show", hide: "Hide", showKey: "Show the key", forgetKey: "Forget the key",
  accessText: "A server may ask for a key. Who runs it gives you one.",
  keyInTab: "Kept in this tab until it is closed, sent to this server alone, and in no export.",
  keyOnDevice: "Kept in this browser until you take it out, where everybody who uses this browser can read it. Sent to this server alone, and in no export.",
  keyNeeded: "This server needs an API key.",
  export: "Export", exportText: "One JSON file with messages, branches and settings.", exportAll: (count: number) => `Export all (${count})`, exportThis: "Export this chat",
  import: "Import", importText: "Adds what an exported file has and is not here yet. Nothing that is here is changed.", chooseFile: "Choose a file",
  imported: ({ added, grown, same, broken }: Imported) =>
    `${added || "No new"} ${added === 1 ? "conversation" : "conversations"} imported${grown ? `, ${grown} had new messages` : ""}${same ? `, ${same} already here` : ""}${broken ? `, ${broken} could not be read` : ""}.`,
  notAnExport: (name: string) => `${name} is not a file that was exported here.`, fileTooLarge: (name: string) => `${name} is too large.`, fileNotText: (name: string) => `${name} is not a text file.`,
  deleteAll: "Delete all conversations", deleteAllText: "Removes every conversation from this browser.",
  deleteAllSure: (count: number) => `${count} ${count === 1 ? "conversation" : "conversations"} will be gone for good. Export them first if you may want them again.`,
  keys: {
    send: "Send the message", newLine: "New line", stopKey: "Stop the answer, close what is open", editLast: "Edit the last message (in the empty field)",
    searchKey: "Search conversations", newChatKey: "New chat", sidebarKey: "Show or hide conversations", settingsKey: "Settings", sheetKey: "This sheet",
  },

  unreachable: "The server cannot be reached. Is it running?", dropped: "The connection was lost. What had arrived is kept.",
  httpError: (status: number) => `The server answered with status ${status}.`, streamError: "The answer broke off.",
  reconnecting: "No connection. The page goes on trying by itself; what you write is kept.",
  notUnderstood: "The server's answer could not be understood. Is something else running at this address?",
  notSaved: "The browser could not save this. Its storage may be full.", notPersistent: "This browser keeps nothing for this page: conversations are gone when it closes.",
};

type Widened<T> = T extends string ? string : T extends (...args: infer A) => string ? (...args: A) => string
  : T extends readonly string[] ? readonly string[] : { [K in keyof T]: Widened<T[K]> };

export type Texts = Widened<typeof en>;
