// SPDX-License-Identifier: MIT
// The fields of one set of chat settings. An empty field leaves the value to the wider settings, then to the server; each
// says what counts then.

import { useId, useState } from "preact/hooks";
import { isSchema, merged, NUMBER_SETTINGS, type NumberSetting, RANGES, readNumber, SLIDERS } from "../chat/settings.ts";
import type { ChatSettings } from "../chat/types.ts";
import { formatNumber, t } from "../i18n/index.ts";
import { Icon } from "./Icon.tsx";

interface GivenProps {
  settings: ChatSettings;
  general?: ChatSettings; // those of all chats, where these are a chat's own
  defaults: ChatSettings; // the server's, as far as it says them
  onChange: (settings: ChatSettings) => void;
}

type FieldsProps = GivenProps & { general: ChatSettings; inherited: ChatSettings };

export function SettingsFields({ general = {}, ...given }: GivenProps) {
  const props: FieldsProps = { ...given, general, inherited: merged(given.defaults, general) };
  return (
    <div class="fields">
      <TextField {...props} name="system" rows={4} />
      <div class="fields two">
        {NUMBER_SETTINGS.map((name) => <NumberField key={name} {...props} name={name} />)}
      </div>
      <StopField {...props} />
      <Choice {...props} name="thinking" />
      <Choice {...props} name="logprobs" />
      <TextField {...props} name="schema" rows={6} />
    </div>
  );
}

type FieldProps<N> = FieldsProps & { name: N };

const without = (settings: ChatSettings, name: keyof ChatSettings): ChatSettings => {
  const { [name]: _, ...others } = settings;
  return others;
};

function Reset({ name, settings, onChange }: FieldProps<keyof ChatSettings>) {
  if (settings[name] === undefined) return null;
  const label = t.value.resetOf(t.value.fields[name]);
  return (
    <button type="button" class="icon-button reset" aria-label={label} data-tip={label} onClick={() => onChange(without(settings, name))}>
      <Icon name="refresh" />
    </button>
  );
}

/** A number as it is typed in the language of the page. */
const written = (value: number): string => (value % 1 ? String(value).replace(".", formatNumber(0.5, 1)[1]!) : String(value));

function NumberField(props: FieldProps<NumberSetting>) {
  const { name, settings, inherited, onChange } = props;
  const [typed, type] = useState<string>();
  const [id, range] = [useId(), RANGES[name]];
  const value = settings[name];
  const isWrong = typed !== undefined && readNumber(typed, range) === null;
  const read = (text: string) => {
    const number = readNumber(text, range);
    type(number === null ? text : undefined);
    if (number === undefined) onChange(without(settings, name));
    else if (number !== null) onChange({ ...settings, [name]: number });
  };
  const isHot = name === "temperature" && (value ?? 0) > SLIDERS.temperature!.most;
  const limits = t.value.between(formatNumber(range.min, 0, 3), formatNumber(range.max));
  return (
    <div class="field">
      <span class="field-head"><label for={id}>{t.value.fields[name]}</label><Default {...props} id={`${id}-default`} /></span>
      <div class="field-row">
        <Slider name={name} shown={Number((isWrong ? undefined : typed?.replace(",", ".")) ?? value ?? inherited[name])} isOwn={value !== undefined} onSlide={(text) => type(written(Number(text)))} onRead={read} />
        <input id={id} class="input" inputMode={range.min < 0 ? "text" : range.integer ? "numeric" : "decimal"} aria-invalid={isWrong}
          aria-describedby={`${id}-hint ${id}-default`} value={typed ?? (value === undefined ? "" : written(value))} placeholder={inherited[name] === undefined ? "" : written(inherited[name])}
          onChange={(event) => read(event.currentTarget.value)} />
        <Reset {...props} />
      </div>
      <span id={`${id}-hint`} class={isWrong || isHot ? "hint wrong" : "hint"}>{isWrong ? limits : isHot ? t.value.hot : t.value.hints[name]}</span>
    </div>
  );
}

/** What counts where the field is empty, and whose it is. */
function Default({ name, general, defaults, id }: FieldProps<NumberSetting> & { id: string }) {
  const number = (value: number) => formatNumber(value, 0, 6);
  const [wider, told] = [general[name], defaults[name]];
  const text = wider !== undefined ? t.value.ofAllChats(number(wider)) : told !== undefined ? t.value.defaultIs(number(told)) : t.value.defaultIs(t.value.untold[name] ?? t.value.ofModel);
  return <span id={id} class="tag">{text}</span>;
}

interface SliderProps {
  name: NumberSetting;
  shown: number; // NaN where nobody knows
  isOwn: boolean;
  onSlide: (text: string) => void;
  onRead: (text: string) => void;
}

/** The same number to be pulled; what it comes to while it is pulled shows in the field, and counts when it is let go. */
function Slider({ name, shown, isOwn, onSlide, onRead }: SliderProps) {
  const slider = SLIDERS[name];
  if (!slider) return null;
  const { least, most, step } = slider;
  const at = Number.isNaN(shown) ? least : Math.min(most, Math.max(least, shown));
  return (
    <input type="range" class={`slider${isOwn ? "" : " unset"}${Number.isNaN(shown) ? " unknown" : ""}`} aria-valuetext={Number.isNaN(shown) ? t.value.notSet : undefined} aria-label={t.value.sliderOf(t.value.fields[name])} min={least} max={most} step={step} value={at}
      onInput={(event) => onSlide(event.currentTarget.value)} onChange={(event) => onRead(event.currentTarget.value)} />
  );
}

function TextField(props: FieldProps<"system" | "schema"> & { rows: number }) {
  const { name, rows, settings, inherited, onChange } = props;
  const id = useId();
  const value = settings[name];
  const isWrong = name === "schema" && !!value?.trim() && !isSchema(value);
  const write = (text: string) => onChange(text ? { ...settings, [name]: text } : without(settings, name));
  return (
    <div class="field">
      <span class="field-head"><label for={id}>{t.value.fields[name]}</label><Reset {...props} /></span>
      <textarea id={id} class={name === "schema" ? "input mono" : "input"} dir="auto" rows={rows} spellcheck={name === "system"} aria-invalid={isWrong}
        aria-describedby={`${id}-hint`} value={value ?? ""} placeholder={inherited[name] ?? t.value.placeholders[name]} onInput={(event) => write(event.currentTarget.value)} />
      <span id={`${id}-hint`} class={isWrong ? "hint wrong" : "hint"}>{isWrong ? t.value.notASchema : t.value.hints[name]}</span>
    </div>
  );
}

function StopField(props: FieldsProps) {
  const { settings, inherited, onChange } = props;
  const id = useId();
  const write = (text: string) => {
    const stop = text.split("\n").filter(Boolean).slice(0, 16);
    onChange(stop.length ? { ...settings, stop } : without(settings, "stop"));
  };
  return (
    <div class="field">
      <span class="field-head"><label for={id}>{t.value.fields.stop}</label><Reset {...props} name="stop" /></span>
      <textarea id={id} class="input mono" rows={2} value={settings.stop?.join("\n") ?? ""} placeholder={inherited.stop?.join("\n") ?? ""}
        aria-describedby={`${id}-hint`} onChange={(event) => write(event.currentTarget.value)} />
      <span id={`${id}-hint`} class="hint">{t.value.hints.stop}</span>
    </div>
  );
}

function Choice(props: FieldProps<"thinking" | "logprobs">) {
  const { name, settings, inherited, onChange } = props;
  const id = useId();
  const value = settings[name];
  const choose = (chosen: string) => onChange(chosen ? { ...settings, [name]: chosen === "on" } : without(settings, name));
  const wider = inherited[name] === undefined ? t.value.modelDefault : inherited[name] ? t.value.on : t.value.off;
  return (
    <div class="field">
      <label for={id}>{t.value.fields[name]}</label>
      <select id={id} class="input" value={value === undefined ? "" : value ? "on" : "off"} aria-describedby={`${id}-hint`} onChange={(event) => choose(event.currentTarget.value)}>
        <option value="">{wider}</option>
        <option value="on">{t.value.on}</option>
        <option value="off">{t.value.off}</option>
      </select>
      <span id={`${id}-hint`} class="hint">{t.value.hints[name]}</span>
    </div>
  );
}
