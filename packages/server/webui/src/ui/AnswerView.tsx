// SPDX-License-Identifier: MIT
// What the model said: thoughts, text, tool calls, and the numbers.

import { useState } from "preact/hooks";
import type { ErrorInfo } from "../api/http.ts";
import { sizeOf } from "../chat/files.ts";
import { type AssistantMessage, isWhole, type Step, textOf } from "../chat/types.ts";
import { formatNumber, formatSeconds, kibibytes, t } from "../i18n/index.ts";
import { Markdown } from "../markdown/Markdown.tsx";
import { isLoading, models } from "../state/models.ts";
import type { OpenChat } from "../state/open-chat.ts";
import { Editor, useEditing } from "./Editor.tsx";
import { describe, NOT_LOADED } from "./errors.ts";
import { Icon } from "./Icon.tsx";
import { Logprobs } from "./Logprobs.tsx";
import { memo } from "./memo.ts";
import { CopyTool, MessageTools, RemoveTool, Toggle, Tool } from "./MessageTools.tsx";
import { LoadingLine } from "./ModelState.tsx";
import { Numbers } from "./Numbers.tsx";
import { focusInput } from "./shortcuts.ts";
import { ToolCard } from "./ToolCard.tsx";

const WORTH_SAYING_MS = 100; // of thinking

interface AnswerProps {
  chat: OpenChat;
  message: AssistantMessage;
  isLast: boolean;
}

export function AnswerView({ chat, message, isLast }: AnswerProps) {
  const [raw, setRaw] = useState(false);
  const [tokens, setTokens] = useState(false);
  const { frame, editing, edit, done } = useEditing(".edit-answer");
  const isWriting = chat.active.value === message.id;
  const hasTokens = message.steps.some((step) => step.logprobs?.length);
  const last = message.steps.length - 1;
  const ending = endingOf(message);
  const goOn = () => {
    focusInput(); // the button goes
    chat.goOn(message.id);
  };
  const isSilent = isWriting && !message.steps[last]?.text && !message.steps[last]?.reasoning && !message.steps[last]?.calls.length;
  if (editing) {
    return <Editor text={textOf(message)} hint={t.value.editAnswerHint} action={t.value.save} isBusy={chat.isBusy} onKeep={(text) => chat.rewrite(message.id, text)} onDone={done} />;
  }
  return (
    <article ref={frame} class="answer" aria-labelledby={`answer-${message.id}`} aria-busy={isWriting}>
      <h2 class="off-screen" id={`answer-${message.id}`}>{t.value.answerOf(message.model)}</h2>
      {message.steps.map((step, index) => (
        <StepView key={index} chat={chat} id={message.id} step={step} raw={raw} tokens={tokens} isOpen={isWriting && index === last} />
      ))}
      {isSilent && <Silence model={message.model} read={message.steps[last]?.read} />}
      {message.error && <Failure chat={chat} message={message} error={message.error} />}
      {!isWriting && ending && (
        <p class="ending">
          <span>{ending.why}</span>
          {isLast && ending.goesOn && <button type="button" class="button small" disabled={chat.isBusy} onClick={goOn}>{t.value.goOn}</button>}
        </p>
      )}
      <MessageTools chat={chat} id={message.id} actions={!isWriting && (
        <>
          <CopyTool text={() => textOf(message)} />
          <Tool icon="refresh" label={t.value.regenerate} tip={t.value.tips.regenerate} disabled={chat.isBusy} onClick={() => { focusInput(); chat.regenerate(message.id); }} />
          {textOf(message) && message.steps.every((step) => !step.calls.length) && (
            <Tool kind="edit-answer" icon="edit" label={t.value.editAnswer} tip={t.value.tips.editAnswer} disabled={chat.isBusy} onClick={edit} />
          )}
          {isLast && message.state !== "waiting" && !ending?.goesOn && textOf(message) && (
            <Tool icon="play" label={t.value.goOn} tip={t.value.tips.goOn} disabled={chat.isBusy} onClick={goOn} />
          )}
          <RemoveTool chat={chat} id={message.id} />
          <Toggle label={t.value.source} tip={t.value.tips.source} isOn={raw} onToggle={setRaw} />
          {hasTokens && <Toggle label={t.value.probabilities} tip={t.value.tips.probabilities} isOn={tokens} onToggle={setTokens} />}
        </>
      )}>
        <Numbers message={message} isWriting={isWriting} />
      </MessageTools>
    </article>
  );
}

/** What stands where the answer will begin, while its model is loaded or reads the prompt; `read` is the share it has read. */
function Silence({ model, read }: { model: string; read: number | undefined }) {
  const card = models.value.find((one) => one.id === model);
  if (card && isLoading(card)) return <LoadingLine card={card} />;
  const percent = read && Math.floor(100 * read);
  return (
    <>
      <p class="waiting-dots" role="img" aria-label={t.value.answering}><span /><span /><span /></p>
      {percent ? <p class="reading">{t.value.readingPrompt(formatNumber(percent))}</p> : null}
    </>
  );
}

interface FailureProps {
  chat: OpenChat;
  message: AssistantMessage;
  error: ErrorInfo;
}

const LENGTHS = /has (\d+) (tokens|characters)\b.*maximum context length is (\d+) tokens/;

function Failure({ chat, message, error }: FailureProps) {
  const card = models.value.find(({ id }) => id === message.model);
  if (error.code === NOT_LOADED && card && isLoading(card)) return <LoadingLine card={card} />; // it is tried again
  const said = describe(error, message.model);
  const [, count, unit, most] = error.code === "context_length_exceeded" ? LENGTHS.exec(error.message) ?? [] : [];
  const attached = most ? chat.questions.flatMap(({ files = [] }) => files) : [];
  return (
    <div class="notice error" role="alert">
      <Icon name="warning" />
      <p>{said}{error.param && said === error.message && <> <code>{error.param}</code></>}
        {most && ` ${t.value.lengthIs(formatNumber(Number(count)), unit === "tokens", formatNumber(Number(most)))}`}
        {attached.length > 0 && ` ${t.value.attachedAre(attached.map((one) => `${one.name} (${kibibytes(sizeOf(one))})`).join(", "))}`}</p>
      <button type="button" class="button small" disabled={chat.isBusy} onClick={() => { focusInput(); chat.retry(message.id); }}>{t.value.retry}</button>
    </div>
  );
}

/** Why an answer is not whole, and whether it can go on. */
function endingOf(message: AssistantMessage): { why: string; goesOn: boolean } | undefined {
  const last = message.steps.at(-1);
  const early = last?.finish && !isWhole(last) ? (last.finish === "length" ? t.value.cutOff : t.value.endedBy(last.finish)) : undefined;
  const isEmpty = message.state === "done" && message.steps.every((step) => !step.text && !step.calls.length);
  const why = message.state === "stopped" ? t.value.stopped : early ?? (isEmpty ? t.value.emptyAnswer : undefined);
  return why && !message.error ? { why, goesOn: !isEmpty } : undefined;
}

interface StepProps {
  chat: OpenChat;
  id: string;
  step: Step;
  raw: boolean;
  tokens: boolean;
  isOpen: boolean;
}

const StepView = memo(
  ({ chat, id, step, raw, tokens, isOpen }: StepProps) => (
    <div class="step">
      {step.reasoning && <Reasoning step={step} isOpen={isOpen && !step.text && !step.calls.length} />}
      {tokens && step.logprobs ? <Logprobs tokens={step.logprobs} /> : step.text && (raw ? <pre class="raw" dir="auto">{step.text}</pre> : <Markdown source={step.text} open={isOpen} />)}
      {step.calls.map((call, index) => call && (
        <ToolCard key={call.id || index} call={call} onDecide={(decision) => chat.decide(id, call.id, decision)} />
      ))}
    </div>
  ),
  (before, after) =>
    before.step === after.step && before.raw === after.raw && before.tokens === after.tokens && before.isOpen === after.isOpen,
);

function Reasoning({ step, isOpen }: { step: Step; isOpen: boolean }) {
  const label = isOpen ? t.value.thinking : t.value.thought((step.reasoningMs ?? 0) < WORTH_SAYING_MS ? "" : formatSeconds(step.reasoningMs! / 1000));
  const [unfolded, setUnfolded] = useState(false);
  return (
    <details class="reasoning" open={unfolded} onToggle={(event) => setUnfolded(event.currentTarget.open)}>
      <summary><Icon name="right" /><span class={isOpen ? "pulse" : ""}>{label}</span></summary>
      {unfolded && <Markdown source={step.reasoning} open={isOpen} />}
    </details>
  );
}
