// SPDX-License-Identifier: MIT
// A line of values over time, with axes; the last value stands above it, and all of it in words for screen readers.

import { t } from "../i18n/index.ts";

export interface Point {
  at: number; // ms
  value: number;
}

interface ChartProps {
  title: string;
  points: readonly Point[];
  now: number; // ms: where the time axis ends
  span: number; // ms: how long it is
  format: (value: number) => string;
  least?: number; // the value axis ends at least here
  most?: number; // it ends here
}

const MINUTE = 60_000;
const SPANS = [MINUTE, 2 * MINUTE, 6 * MINUTE];
export const LONGEST = SPANS.at(-1)!;

/** The shortest time axis, of those that have round ticks, on which so many ms have room. */
export const spanFor = (ms: number): number => SPANS.find((span) => ms <= span) ?? LONGEST;

/** Where a value axis ends: so that half of it is a round number too. */
export function axisEnd(largest: number): number {
  const half = Math.max(largest, 1e-9) / 2;
  const power = 10 ** Math.floor(Math.log10(half));
  return 2 * power * [1, 2, 5, 10].find((step) => half <= step * power * (1 + 1e-9))!;
}

export function Chart({ title, points, now, span, format, least = 0, most }: ChartProps) {
  const shown = points.filter(({ at }) => at >= now - span);
  const values = shown.map(({ value }) => value);
  const end = most ?? axisEnd(Math.max(least, ...values));
  const last = values.at(-1);
  const x = (at: number) => (100 * (1 - (now - at) / span)).toFixed(2);
  const y = (value: number) => (100 * (1 - Math.min(value, end) / end)).toFixed(2);
  const line = shown.map(({ at, value }) => `${x(at)},${y(value)}`);
  const period = t.value.lastMinutes(span / MINUTE);
  const said = last === undefined ? t.value.chartEmpty(title)
    : t.value.chartText(title, period, format(last), format(Math.min(...values)), format(Math.max(...values)));
  return (
    <figure class="chart">
      <figcaption>{title}<strong>{last === undefined ? "–" : format(last)}</strong></figcaption>
      <div class="plot">
        <div class="value-axis" aria-hidden="true">{[end, end / 2, 0].map((tick) => <span key={tick}>{format(tick)}</span>)}</div>
        <svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" aria-label={said}>
          {[0, 50, 100].map((at) => <path key={at} class="grid" d={`M0 ${at}H100M${at} 0V100`} />)}
          {line.length > 1 && <polygon points={`${x(shown[0]!.at)},100 ${line.join(" ")} ${x(shown.at(-1)!.at)},100`} />}
          {line.length > 1 && <polyline points={line.join(" ")} />}
          {line.length > 0 && <path class="last-point" d={`M${line.at(-1)}h.01`} />}
        </svg>
        <div class="time-axis" aria-hidden="true">{[span, span / 2, 0].map((tick) => <span key={tick}>{t.value.ago(tick / 1000)}</span>)}</div>
      </div>
    </figure>
  );
}
