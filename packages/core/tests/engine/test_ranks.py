# SPDX-License-Identifier: MIT
"""Engines over several processes: the answers of one, every kind of request, and ranks that die."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from candle_vllm.core import EngineConfig, InferenceEngine, LoRARequest, SamplingParams
from candle_vllm.core.engine.ranks import rank
from candle_vllm.core.engine.ranks.rank_line import (
    MOST_BYTES,
    AdapterLoaded,
    Failed,
    ForgetAdapters,
    Go,
    Line,
    LoadAdapter,
    Ready,
    Score,
    ToRank,
    read_exactly,
)
from candle_vllm.core.engine.ranks.ranks import RankedRunner, Ranks, _Other
from candle_vllm.core.errors import CandleVllmError, ConfigError, EngineDeadError, ModelLoadError
from candle_vllm.core.fields import read_json
from candle_vllm.core.sampling.structured import StructuredOutputsParams
from candle_vllm.core.testing.toy_model import toy_config, write_toy_model
from packages.core.tests.models.families import ROWS
from packages.core.tests.models.tiny import write_tiny
from packages.core.tests.toy_adapter import write_adapter
from packages.core.tests.toy_sight import write_toy_sight
from tests.common_run import few
from tests.waiting import PATIENCE, wait_for

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="several ranks need sockets that a child inherits")

GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
LONG = SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True)
PROMPTS = ["The quick brown fox", "jumps over", "the lazy dog and then it " * 4]

USUAL: dict[str, Any] = {
    "device": "cpu", "op_by_op": True, "threads": 1, "block_size": 8, "max_num_seqs": 8,
    "max_num_batched_tokens": 40,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_model(tmp_path_factory.mktemp("toy"), toy_config(num_attention_heads=6, num_key_value_heads=3))


def engine_of(model: Path, size: int, **settings: Any) -> InferenceEngine:
    return InferenceEngine(str(model), tensor_parallel_size=size, **USUAL | settings)


@pytest.fixture(scope="module")
def whole(model: Path) -> Iterator[InferenceEngine]:
    with engine_of(model, 1) as engine:
        yield engine


@pytest.fixture(scope="module")
def ranks(model: Path) -> Iterator[InferenceEngine]:
    """Two, of which the first has two heads of keys and the other one has one; they end with the engine."""
    with engine_of(model, 2) as engine:
        found = pids(engine)
        yield engine
    until_gone(found)


def pids(engine: InferenceEngine) -> list[int]:
    found = engine._ranks
    assert found is not None
    return [other.process.pid for other in found._others.values() if other.process is not None]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 0)
            return True
        return False


def until_gone(found: list[int]) -> None:
    """Wait until these processes have ended."""
    wait_for(lambda: not any(map(is_alive, found)))


def dies(engine: InferenceEngine, hurt: Callable[[], object], said: str, prompts: int = 1) -> None:
    """Who waits for long answers while something is hurt gets an error, which begins so."""
    errors: list[Exception] = []

    def ask() -> None:
        try:
            engine.generate(["a"] * prompts, LONG)
        except EngineDeadError as error:
            errors.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    wait_for(lambda: engine.stats().generation_tokens >= 3)
    hurt()
    wait_for(lambda: not asking.is_alive())
    assert str(errors[0]).startswith(f"the engine has stopped: {said}"), errors[0]


KINDS = {
    "greedy": GREEDY,
    "seeded": SamplingParams(max_tokens=24, temperature=0.9, seed=7, ignore_eos=True),
    "several": SamplingParams(max_tokens=8, temperature=1.0, seed=3, n=3),
    "penalties": SamplingParams(max_tokens=24, temperature=0.0, repetition_penalty=1.3, logit_bias={65: 4.0}),
    "log-probabilities": SamplingParams(max_tokens=8, temperature=0.0, logprobs=3, prompt_logprobs=2),
    "form": SamplingParams(
        max_tokens=24, temperature=0.0, structured_outputs=StructuredOutputsParams(choice=["yes", "no", "never"])
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_request(kind: str, whole: InferenceEngine, ranks: InferenceEngine) -> None:
    """A small random model's likeliest tokens are far apart beside 1e-5, so the texts are the same."""
    for ours, right in zip(ranks.generate(PROMPTS, KINDS[kind]), whole.generate(PROMPTS, KINDS[kind]), strict=True):
        assert [each.token_ids for each in ours.outputs] == [each.token_ids for each in right.outputs]
        if kind == "log-probabilities":
            assert ours.prompt_logprobs is not None
            assert right.prompt_logprobs is not None
            found, wanted = (
                [each.chosen.logprob for each in some if each is not None]
                for some in (ours.prompt_logprobs, right.prompt_logprobs)
            )
            assert found == pytest.approx(wanted, abs=1e-4)


def test_answers_are_the_same_whatever_runs_beside_them(ranks: InferenceEngine) -> None:
    """The prefix cache, chunks of prompts and neighbours change no bit of what the same ranks answer."""
    alone = [ranks.generate([prompt], GREEDY)[0].outputs[0].token_ids for prompt in PROMPTS]
    ranks.reset_prefix_cache()
    again = [output.outputs[0].token_ids for output in ranks.generate(PROMPTS * 3, GREEDY)]
    assert again == alone * 3
    assert ranks.stats().cached_prompt_tokens > 0
    by_itself = [ranks.generate(PROMPTS[:1], each)[0].outputs[0] for each in DRAWS]
    for one, other in zip(by_itself, ranks.generate(PROMPTS[:1] * len(DRAWS), DRAWS), strict=True):
        assert other.outputs[0].token_ids == one.token_ids
        found, wanted = ([p.chosen.logprob for p in each.logprobs or ()] for each in (other.outputs[0], one))
        assert found == pytest.approx(wanted, abs=1e-5)  # torch's sums depend on how many rows there are


DRAWS = [
    SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, logprobs=3),
    SamplingParams(max_tokens=12, temperature=1.0, seed=4, ignore_eos=True, logprobs=0),
    SamplingParams(max_tokens=12, temperature=0.8, seed=5, ignore_eos=True, top_p=0.8, logprobs=1),
    SamplingParams(max_tokens=12, temperature=0.8, seed=6, ignore_eos=True, min_p=0.05, top_k=30),
    SamplingParams(
        max_tokens=12, temperature=0.8, seed=7, ignore_eos=True, top_k=9, repetition_penalty=1.2, logprobs=2
    ),
]


@pytest.mark.one_of_each(1)
@pytest.mark.parametrize(
    ("size", "busy", "settings"),
    [
        (2, False, {"max_model_len": 64, "kv_cache_memory": 12 * 8 * 2 * 2 * 3 * 16 * 4}),
        (3, True, {"max_model_len": 512, "speculative_config": {"method": "suffix"}}),
    ],
    ids=["preempted", "guessed"],
)
def test_few_blocks_and_guesses_and_a_rank_that_dies(
    size: int, busy: bool, settings: dict[str, Any], model: Path, whole: InferenceEngine
) -> None:
    """The last rank dies, beside another one that waits for it, and alone with the first one: the engine names it."""
    prompts = [prompt[:20] for prompt in PROMPTS]
    right = [output.outputs[0].token_ids for output in whole.generate(prompts, GREEDY)]
    with engine_of(model, size, **settings) as engine:
        assert [output.outputs[0].token_ids for output in engine.generate(prompts, GREEDY)] == right
        found, told = pids(engine), threading.Event()
        engine.add_death_callback(told.set)
        if busy:
            dies(engine, lambda: os.kill(found[-1], signal.SIGKILL), "rank 2 has ended (killed by SIGKILL)")
        else:
            os.kill(found[-1], signal.SIGKILL)
        wait_for(lambda: not engine.is_alive)
        assert told.wait(PATIENCE)
        until_gone(found)
        with pytest.raises(EngineDeadError, match=f"rank {size - 1} has ended"):
            engine.generate(["a"], GREEDY)


@pytest.mark.parametrize(
    ("size", "stages"), few([(3, 1), (2, 2)], (3, 1)), ids=["three ranks", "two of each of two stages"]
)
def test_tokens_are_sent_to_their_experts(size: int, stages: int, tmp_path: Path) -> None:
    """The texts of one rank, whatever runs beside them; and a rank that dies meanwhile ends the engine by name."""
    sizes = {"num_attention_heads": 6, "num_key_value_heads": 6, "n_routed_experts": 8, "num_hidden_layers": 3}
    model = write_tiny(tmp_path, "deepseek_v3", **{**ROWS["DeepSeek-V3"].config, **sizes})
    with engine_of(model, 1) as engine:
        right = [output.outputs[0].token_ids for output in engine.generate(PROMPTS, GREEDY)]
    settings: dict[str, Any] = {"enable_expert_parallel": True, "all2all_backend": "all_to_all", "max_model_len": 512}
    with engine_of(model, size, pipeline_parallel_size=stages, **settings) as engine:
        alone = [engine.generate([prompt], GREEDY)[0].outputs[0].token_ids for prompt in PROMPTS]
        assert alone == right
        engine.reset_prefix_cache()
        assert [output.outputs[0].token_ids for output in engine.generate(PROMPTS * 3, GREEDY)] == right * 3
        assert engine.stats().cached_prompt_tokens > 0
        found = pids(engine)
        dies(engine, lambda: os.kill(found[-1], signal.SIGKILL), f"rank {len(found)} has ended", prompts=8)
        until_gone(found)


def test_a_rank_that_dies_before_the_first_request_ends_the_engine(model: Path) -> None:
    with engine_of(model, 2) as engine:
        os.kill(pids(engine)[0], signal.SIGKILL)
        wait_for(lambda: not engine.is_alive)


def test_ranks_end_with_the_first_one(model: Path) -> None:
    script = (
        "import os, sys, time\n"
        "from candle_vllm.core import InferenceEngine\n"
        "engine = InferenceEngine(sys.argv[1], device='cpu', op_by_op=True, threads=1, tensor_parallel_size=2)\n"
        "print(*(other.process.pid for other in engine._ranks._others.values()), flush=True)\n"
        "time.sleep(60)\n"
    )
    first = subprocess.Popen([sys.executable, "-c", script, str(model)], stdout=subprocess.PIPE, text=True)
    with first:
        assert first.stdout is not None
        found = [int(each) for each in first.stdout.readline().split()]
        assert found
        first.kill()
    until_gone(found)


@pytest.mark.every_case
def test_what_a_rank_cannot_load_is_said(tmp_path: Path) -> None:
    """The first rank's own refusal, and no rank is left."""
    narrow = write_toy_model(tmp_path, toy_config())
    before = children()
    with pytest.raises(ConfigError, match="tensor_parallel_size to one of 1, 2, 4") as raised:
        engine_of(narrow, 3)
    assert raised.value.setting == "tensor_parallel_size"
    assert children() == before


def test_a_rank_that_cannot_begin_is_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("candle_vllm.core.engine.ranks.ranks.RANK", (sys.executable, "-c", "raise SystemExit(3)"))
    with pytest.raises(Exception, match=r"rank 1 has ended .*exit status 3"):
        engine_of(model, 2)


@pytest.mark.every_case
def test_a_rank_that_ends_while_steps_are_made_is_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done together fails in the first rank too, by words of the library below."""
    loaded = Ranks.all_loaded

    def killed(self: Ranks, files: Any) -> None:
        process = self._others[1].process
        assert process is not None
        process.kill()
        loaded(self, files)

    monkeypatch.setattr(Ranks, "all_loaded", killed)
    with pytest.raises(ModelLoadError, match=r"rank 1 has ended .*killed by SIGKILL"):
        engine_of(model, 2)


LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@LINUX
@pytest.mark.parametrize("when", ["it begins", pytest.param("it has loaded", marks=pytest.mark.every_case)])
def test_a_rank_that_is_stopped_while_it_loads_is_named(
    model: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    name = "_begin" if when == "it begins" else "all_loaded"
    whole = getattr(Ranks, name)

    def work(self: Ranks, *given: Any) -> None:
        process = (given[1] if name == "_begin" else self._others[1]).process
        assert process is not None
        os.kill(process.pid, signal.SIGSTOP)
        whole(self, *given)

    monkeypatch.setattr(Ranks, name, work)
    with pytest.raises(ModelLoadError, match=r"rank 1 has ended \(it has not responded for 8 s\)"):
        engine_of(model, 2)


BUSY = """
import ctypes, functools, operator, sys, time
from candle_vllm.core.engine.ranks import rank

def keeps_the_interpreter(seconds):
    until = time.monotonic() + seconds
    if sys.argv[1] == "computes":
        any(map(functools.partial(operator.lt, until), iter(time.monotonic, None)))
    else:
        ctypes.PyDLL(None).usleep(int(seconds * 1e6))

def load(*given, **options):
    keeps_the_interpreter(float(sys.argv[2]))
    return whole(*given, **options)

whole, rank.load_any_model = rank.load_any_model, load
sys.exit(rank.main(sys.argv[3]))
"""


@pytest.mark.every_case
@LINUX
@pytest.mark.parametrize(
    ("does", "seconds", "allowed"),
    [
        ("computes", 5, 4),
        pytest.param("computes", 35, 30, marks=pytest.mark.every_case),
        pytest.param("sleeps", 10, 4, marks=pytest.mark.every_case),
    ],
)
def test_a_rank_that_computes_is_not_blamed_for_keeping_the_interpreter(
    model: Path, monkeypatch: pytest.MonkeyPatch, does: str, seconds: float, allowed: int
) -> None:
    """Longer than a rank may be silent while it loads, which is mostly shorter here."""
    monkeypatch.setattr("candle_vllm.core.engine.ranks.ranks.RANK", (sys.executable, "-c", BUSY, does, str(seconds)))
    monkeypatch.setattr("candle_vllm.core.engine.ranks.ranks._LOADING", allowed)
    if does == "sleeps":
        with pytest.raises(ModelLoadError, match=r"rank 1 has ended .*not responded"):
            engine_of(model, 2)
    else:
        with engine_of(model, 2) as engine:
            assert engine.generate(["a"], GREEDY)[0].outputs[0].token_ids


@pytest.mark.parametrize("silent", [1, 2])
def test_what_a_rank_said_last_is_raised_though_another_one_is_waited_for(
    silent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that has failed ends all others; the first one reads of that on the line of the one it waits for."""
    ends: dict[int, tuple[socket.socket, socket.socket]] = {}

    def start(self: Ranks, config: EngineConfig, rank: int) -> None:
        (near, far), (near_side, far_side) = socket.socketpair(), socket.socketpair()
        self._others[rank], ends[rank] = _Other(Line(near), Line(near_side), None), (far, far_side)

    monkeypatch.setattr(Ranks, "_start", start)
    ranks, failed = Ranks(EngineConfig(model="m", tensor_parallel_size=3, **USUAL)), 3 - silent
    try:
        Line(ends[failed][0]).send(Failed("these are its last words", "model"))
        for end in ends[failed]:
            end.close()
        ranks._others[failed].gone = "exit status 1"
        with pytest.raises(ConfigError, match="these are its last words") as raised:
            assert ranks.collective
        assert raised.value.setting == "model"
    finally:
        ranks.close()
        for end in ends[silent]:
            end.close()


@pytest.mark.skipif(sys.platform != "linux", reason="ranks share no memory there")
@pytest.mark.parametrize(
    ("error", "status", "logged"),
    [(EOFError(), 0, False), (BrokenPipeError(), 0, False), (OSError(28, "No space left on device"), 1, True)],
    ids=repr,
)
def test_a_rank_says_what_it_fails_by(
    error: Exception, status: int, logged: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """But for the end of its line; and the memory that it was given is not given to processes of its own."""
    pair, memory = socket.socketpair(), os.memfd_create("memory", 0)

    def fail(line: Line, side: Line, invitation: None, ring: Any, memory: None) -> int:
        with line.socket, side.socket, ring:
            assert not os.get_inheritable(ring.fileno())
        assert invitation is memory is None
        raise error

    monkeypatch.setattr(rank, "_run", fail)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr(rank, "collect_seldom", lambda: None)
    line, side = (each.detach() for each in pair)
    assert rank.main(f"{line},{side},{memory},") == status
    assert ("No space left" in caplog.text) == logged


def test_one_gpu_is_not_several(model: Path) -> None:
    with pytest.raises(ConfigError, match="name that many GPUs") as raised:
        engine_of(model, 2, device="cuda:3")
    assert raised.value.setting == "device"


def children() -> set[str]:
    """Processes of this one."""
    return (
        set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()) if sys.platform == "linux" else set()
    )


@pytest.mark.parametrize(
    ("settings", "blamed"),
    [
        ({"cpu_experts": 4}, "cpu_experts"),
        ({"device": "cuda:0,cuda:1,cuda:2"}, "tensor_parallel_size"),
        ({"device": "cuda:1,cuda:1"}, "device"),
    ],
)
def test_what_ranks_cannot_do_is_refused(settings: dict[str, Any], blamed: str) -> None:
    with pytest.raises(ConfigError) as raised:
        EngineConfig(model="m", tensor_parallel_size=2, **settings)
    assert raised.value.setting == blamed


@pytest.mark.parametrize("level", [1, 2])
def test_ranks_sleep_and_wake_with_the_same_bits(level: int, ranks: InferenceEngine) -> None:
    right = ranks.generate(PROMPTS, GREEDY)
    ranks.sleep(level)
    assert ranks.is_sleeping
    ranks.wake_up()
    assert [each.outputs[0].token_ids for each in ranks.generate(PROMPTS, GREEDY)] == [
        each.outputs[0].token_ids for each in right
    ]


def test_several_devices_are_as_many_ranks() -> None:
    assert EngineConfig(model="m", device="cuda:0,cuda:1").tensor_parallel_size == 2


def test_lines_refuse_what_is_no_message() -> None:
    near, far = socket.socketpair()
    with near, far:
        ours, theirs = Line(near), Line(far)
        ours.send(Score(np.array([1, 2])))
        assert theirs.receive(ToRank).rows.tolist() == [1, 2]
        near.sendall((MOST_BYTES + 1).to_bytes(4, "little"))
        with pytest.raises(ValueError, match="at most"):
            theirs.receive(ToRank)
    near, far = socket.socketpair()
    with near, far:
        ours, theirs = Line(near), Line(far)
        ours.send(Ready(1))
        with pytest.raises(ValueError, match="Invalid value 'Ready'"):
            theirs.receive(Go)
        near.sendall((5).to_bytes(4, "little") + b"12")
        near.close()
        with pytest.raises(EOFError):
            theirs.receive(ToRank)


@pytest.mark.parametrize("number", [errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ECONNRESET])
def test_a_connection_that_broke_has_ended(number: int) -> None:
    """However the system reports it; only a deadline of the caller is a `TimeoutError`."""
    failure = Mock(side_effect=OSError(number, os.strerror(number)))
    broken: Any = SimpleNamespace(recv_into=failure, sendall=failure)
    with pytest.raises(EOFError):
        Line(broken).receive(ToRank)
    with pytest.raises(ConnectionError, match=f"Errno {number}"):
        Line(broken).send(Ready(0))
    near, far = socket.socketpair()
    with near, far, pytest.raises(TimeoutError):
        read_exactly(far, 1, time.monotonic() + 0.01)


def seeing(folder: Path, **settings: Any) -> list[Any]:
    """Answers of a model to prompts with two pictures, with one of them twice, and with none; and again, cached."""
    random = np.random.default_rng(3)
    one, other = (random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((40, 70), (32, 32)))
    ask = "<|im_start|>user\nCompare <image> with <image>.<|im_end|>\n<|im_start|>assistant\n"
    asked: list[Any] = [
        {"prompt": ask, "multi_modal_data": {"image": pictures}}
        for pictures in ([one, other], [one, one], [other, one])
    ]
    with InferenceEngine(str(folder), **USUAL | settings) as engine:
        found = [engine.generate([*asked, "Hello"], GREEDY) for _ in range(2)]
        assert engine.model_info.max_images
        assert all(answer.num_cached_tokens for answer in found[1][:3])
        assert engine.stats().images_encoded == 2
        if settings.get("tensor_parallel_size"):
            engine.sleep(2)
            engine.wake_up()
            found.append(engine.generate([*asked, "Hello"], GREEDY))
        return [[answer.outputs[0].token_ids for answer in answers] for answers in found]


@pytest.mark.every_case
def test_pictures(tmp_path: Path) -> None:
    """They are cut by steps of 40 tokens; what they became stands in the prefix cache of all ranks."""
    folder = write_toy_sight(tmp_path)
    right, *again = seeing(folder)
    assert again == [right]
    assert len({str(each) for each in right}) == 4
    assert seeing(folder, tensor_parallel_size=2) == [right] * 3


class Packed:
    """An adapter in memory, as far as ranks know it."""

    digest = b"same"

    def __init__(self, serial: int) -> None:
        self.serial = serial


def test_adapters_that_come_and_go_between_steps_are_forgotten() -> None:
    """Before the next one is loaded, so that no rank keeps more of them than the first one."""
    told = list[Any]()
    ranks: Any = SimpleNamespace(broadcast=told.append, adapters_loaded=lambda number: [AdapterLoaded(number, b"same")])
    unused = dict.fromkeys(("step_memory", "hidden_sum", "drop_cache", "restore_cache", "wake_up"))
    runner: Any = SimpleNamespace(in_flight=1, fatal=(), **unused)
    ours = RankedRunner(runner, ranks)
    for serial in range(3):
        packed: Any = Packed(serial)
        ours.adapter_is_loaded(ours.load_adapter(Path("a")), packed)
        del packed
    ours.adapter_is_loaded(ours.load_adapter(Path("a")), None)
    ours.load_adapter(Path("b"))
    loads = [LoadAdapter(number, "a") for number in (1, 2, 3, 4)]
    forgets = [ForgetAdapters((number,)) for number in (1, 2, 3, 4)]
    assert told == [each for pair in zip(loads, forgets) for each in pair] + [LoadAdapter(5, "b")]


@pytest.mark.every_case
def test_adapters(model: Path, tmp_path: Path) -> None:
    """Each rank has its part of those that are asked for, and forgets what is unloaded; a broken one hurts its own."""
    config = read_json(model / "config.json")
    sizes = {"q": config["num_attention_heads"], "v": config["num_key_value_heads"]}
    shapes = {
        f"model.layers.{layer}.self_attn.{name}_proj": (heads * config["head_dim"], config["hidden_size"])
        for layer in (0, 1)
        for name, heads in sizes.items()
    }
    for number in range(3):
        write_adapter(tmp_path / f"a{number}", shapes, rank=4, seed=number, size=2)
    (tmp_path / "a2" / "adapter_model.safetensors").write_bytes(b"nothing")

    def answers(size: int) -> list[Any]:
        with engine_of(model, size, enable_lora=True, lora_dtype="f32") as engine:
            uses = {name: LoRARequest(name, lora_path=str(tmp_path / name)) for name in ("a0", "a1", "a2")}
            wanted = [None, uses["a0"], uses["a1"], uses["a0"]]
            found = [each.outputs[0].token_ids for each in engine.generate(["abc"] * 4, GREEDY, lora_request=wanted)]
            with pytest.raises(CandleVllmError, match="a2"):
                engine.generate(["abc"], GREEDY, lora_request=uses["a2"])
            assert engine.remove_lora("a0")
            found.append(engine.generate(["abc"], GREEDY, lora_request=uses["a1"])[0].outputs[0].token_ids)
            return found

    right = answers(1)
    assert answers(2) == right
    assert right[1] == right[3]
    assert right[2] == right[4]
    assert len({tuple(each) for each in right}) == 3
