// A small line of values over time, with the last one in words.

interface ChartProps {
  title: string;
  values: readonly number[];
  format: (value: number) => string;
  least?: number; // the scale's end is at least this
  most?: number; // the scale's end is this
}

const [WIDTH, HEIGHT, POINTS] = [240, 64, 150];

export function Chart({ title, values, format, least = 0, most }: ChartProps) {
  const end = most ?? Math.max(least, ...values);
  const last = values.at(-1) ?? 0;
  const step = WIDTH / (POINTS - 1);
  const from = WIDTH - (values.length - 1) * step;
  const at = (value: number) => (HEIGHT - 2 - (Math.min(value, end) / (end || 1)) * (HEIGHT - 4)).toFixed(1);
  const points = values.map((value, index) => `${(from + index * step).toFixed(1)},${at(value)}`);
  return (
    <figure class="chart">
      <figcaption>{title}<strong>{format(last)}</strong></figcaption>
      <svg viewBox={`0 0 ${WIDTH} ${HEIGHT}`} preserveAspectRatio="none" aria-hidden="true">
        {points.length > 1 && <polygon points={`${from.toFixed(1)},${HEIGHT} ${points.join(" ")} ${WIDTH},${HEIGHT}`} />}
        {points.length > 1 && <polyline points={points.join(" ")} />}
        <line x1="0" x2={WIDTH} y1={HEIGHT - 0.5} y2={HEIGHT - 0.5} />
      </svg>
      <span class="chart-scale" aria-hidden="true">{format(end)}</span>
    </figure>
  );
}
