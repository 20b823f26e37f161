// SPDX-License-Identifier: MIT
// The server page: what it does now, and how that went over the last minutes.

import { useEffect, useState } from "preact/hooks";
import { ApiError, errorInfo } from "../api/http.ts";
import { rate, type Sample, sampleOf } from "../api/metrics.ts";
import { readMetrics, serverVersion } from "../api/server.ts";
import { formatNumber, formatSeconds, t } from "../i18n/index.ts";
import { connection } from "../state/models.ts";
import { hashOf } from "../state/route.ts";
import { Chart, LONGEST, spanFor } from "./Chart.tsx";
import { follow } from "./ConversationList.tsx";
import { describe } from "./errors.ts";
import { Icon } from "./Icon.tsx";
import { SidebarButton } from "./SidebarButton.tsx";

const EVERY_MS = 2000;
const MAX_SAMPLES = 1 + LONGEST / EVERY_MS;

export function ServerPage() {
  const { samples, failure } = useSamples();
  const version = useVersion();
  return (
    <>
      <header class="page-head"><SidebarButton /><h1>{t.value.server}</h1><span class="spring" />{version && <span class="faint small">candle-vllm {version}</span>}</header>
      <div class="scroller"><div class="page">
        {failure && connection.value !== "unreachable" && <div class="notice error" role="alert"><Icon name="warning" /><p>{failure}</p></div>}
        {samples.length > 0 ? <Charts samples={samples} /> : !failure && <p class="faint">{t.value.connecting}</p>}
        <p><a href={hashOf({ page: "models" })} onClick={follow({ page: "models" })}>{t.value.manageModels}</a></p>
      </div></div>
    </>
  );
}

function useSamples() {
  const [samples, setSamples] = useState<readonly Sample[]>([]);
  const [failure, setFailure] = useState("");
  useEffect(() => {
    let timer: ReturnType<typeof setTimeout> | undefined;
    let isShown = true;
    const ask = async () => {
      try {
        if (!document.hidden) {
          const sample = sampleOf(await readMetrics(), performance.now());
          setSamples((before) => [...before, sample].slice(-MAX_SAMPLES));
          setFailure("");
        }
      } catch (error) {
        const isLocked = error instanceof ApiError && [401, 403].includes(error.info.status ?? 0);
        setFailure(isLocked ? t.value.metricsLocked : describe(errorInfo(error)));
      }
      if (isShown) timer = setTimeout(() => void ask(), EVERY_MS);
    };
    void ask();
    return () => {
      isShown = false;
      clearTimeout(timer);
    };
  }, []);
  return { samples, failure };
}

function useVersion(): string {
  const [version, setVersion] = useState("");
  useEffect(() => {
    serverVersion().then(setVersion, () => undefined);
  }, []);
  return version;
}

function Charts({ samples }: { samples: readonly Sample[] }) {
  const [first, last] = [samples[0]!, samples.at(-1)!];
  const axis = { now: last.at, span: spanFor(last.at - first.at) };
  const of = (value: (sample: Sample) => number) => samples.map((sample) => ({ at: sample.at, value: value(sample) }));
  const hitRate = (one: Sample) => (one.prefixQueries ? one.prefixHits / one.prefixQueries : 0);
  const whole = (value: number) => formatNumber(value);
  const percent = (value: number) => `${formatNumber(value * 100, value > 0 && value < 0.1 ? 1 : 0)} %`;
  const perSecond = (value: number) => `${formatNumber(value, value > 0 && value < 10 && value % 1 ? 1 : 0)} ${t.value.perSecond}`;
  return (
    <>
      <div class="charts">
        <Chart {...axis} title={t.value.running} points={of((one) => one.running)} format={whole} least={2} />
        <Chart {...axis} title={t.value.waitingRequests} points={of((one) => one.waiting)} format={whole} least={2} />
        <Chart {...axis} title={t.value.kvCache} points={of((one) => one.kvUsage)} format={percent} most={1} />
        <Chart {...axis} title={t.value.prefixHits} points={of(hitRate)} format={percent} most={1} />
        <Chart {...axis} title={t.value.generation} points={rate(samples, "generatedTokens")} format={perSecond} least={10} />
        <Chart {...axis} title={t.value.promptWork} points={rate(samples, "promptTokens")} format={perSecond} least={10} />
      </div>
      <dl class="totals">
        <div><dt>{t.value.allGenerated}</dt><dd>{whole(last.generatedTokens)}</dd></div>
        <div><dt>{t.value.allPrompt}</dt><dd>{whole(last.promptTokens)}</dd></div>
        <div><dt>{t.value.meanFirst}</dt><dd>{last.firstTokens ? formatSeconds(last.firstTokenSeconds / last.firstTokens) : "–"}</dd></div>
      </dl>
    </>
  );
}
