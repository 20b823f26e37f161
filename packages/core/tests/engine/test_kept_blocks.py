# SPDX-License-Identifier: MIT
"""Blocks on disk: prompts that begin as one before a restart, what is damaged or late, and the bounds."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from candle_vllm.core import ConfigError, EngineConfig, InferenceEngine, LoRARequest, SamplingParams
from candle_vllm.core.assembly.model import load_model
from candle_vllm.core.devices import CPU
from candle_vllm.core.engine.build import build_engine
from candle_vllm.core.engine.cache import block_stores
from candle_vllm.core.engine.cache import block_tiers as kept_blocks
from candle_vllm.core.engine.cache.block_stores import BlockFolder
from candle_vllm.core.engine.requests import GenerationRequest
from candle_vllm.core.engine.runners import key_fit
from candle_vllm.core.engine.step.engine import Engine
from candle_vllm.core.fields import read_json
from candle_vllm.core.loading.source import files_mark
from candle_vllm.core.testing.toy_model import toy_config, write_toy_model
from packages.core.tests.toy_adapter import write_adapter
from packages.core.tests.toy_sight import write_toy_sight
from tests.waiting import PATIENCE, Clock, wait_for

SIZE = 16  # tokens of a block
PROMPT = [3 + n * 7 % 90 for n in range(5 * SIZE + 3)]


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The time that blocks are waited for stands still: who waits for one that does not come waits for ever."""
    return Clock(monkeypatch, kept_blocks)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = toy_config(head_dim=64, num_attention_heads=2, num_key_value_heads=1)  # a size that kernel tests compile
    return write_toy_model(tmp_path_factory.mktemp("kept") / "toy", config)


@contextmanager
def running(model: Path, folder: Path | None, **settings: Any) -> Iterator[Engine]:
    settings = {"kv_cache_memory": 4 << 20, "threads": 1, **settings}
    config = EngineConfig(model=str(model), prompt_cache_path=folder, block_size=SIZE, **settings)
    engine = build_engine(config, load_model(config, CPU, lambda *_: None))
    try:
        yield engine
    finally:
        engine.close()


def answer(engine: Engine, prompt: list[int], name: str = "a", **params: Any) -> list[int]:
    engine.add(engine.prepare(request(prompt, name, **params)))
    tokens: list[int] = []
    while engine.has_work:
        for piece in engine.step():
            assert piece.error is None
            tokens += piece.token_ids
    return tokens


def request(prompt: list[int], name: str, **params: Any) -> GenerationRequest:
    chosen = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, **params)
    return GenerationRequest(request_id=name, prompt_token_ids=tuple(prompt), params=chosen)


def cached(engine: Engine) -> int:
    return engine.stats().cached_prompt_tokens


@pytest.mark.one_of_each(2)
@pytest.mark.parametrize(
    "settings",
    [{}, {"key_cache_dtype": "q8_0", "value_cache_dtype": "q4_0"}, {"kv_cache_dtype": "q8_0"}, {"op_by_op": True}],
    ids=["bf16", "mixed", "q8_0", "eager"],
)
def test_a_prompt_is_found_after_a_restart(model: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    with running(model, None, **settings) as engine:
        right = answer(engine, PROMPT)
    folder = tmp_path / "kept"
    with running(model, folder, **settings) as engine:
        assert answer(engine, PROMPT) == right
        assert cached(engine) == 0
    assert folder.stat().st_mode & 0o777 == 0o700
    with running(model, folder, **settings) as engine:
        assert answer(engine, PROMPT) == right
        assert cached(engine) == 5 * SIZE
        stats = engine.stats()
        assert (stats.kept_blocks_read, stats.kept_block_failures) == (5, 0)
        assert answer(engine, PROMPT, "again") == right
        assert engine.stats().kept_blocks_read == 5  # from memory


def test_a_file_stays_when_it_cannot_be_opened_now(tmp_path: Path) -> None:
    """Too many open files say nothing of the block; a link in its place is no block."""
    store = BlockFolder(tmp_path / "kept", "f", 1 << 20, 1000)
    store.write(bytes(32), bytes(1000))
    for number, stays in ((errno.EMFILE, True), (errno.ELOOP, False)):
        failure = mock.patch.object(block_stores.os, "open", side_effect=OSError(number, "no"))
        with failure, pytest.raises(block_stores.BlockError):
            store.read(bytes(32))
        assert store.has(bytes(32)) is stays
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_blocks_that_are_written_during_a_listing_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, listed = BlockFolder(tmp_path / "kept", "f", 1 << 20, 1000), block_stores._found
    store.write(bytes(32), bytes(1000))

    def slow(*given: Any) -> OrderedDict[str, int]:
        found = listed(*given)
        store.write(b"a" * 32, bytes(1000))
        return found

    monkeypatch.setattr(block_stores, "_found", slow)
    store._look()
    assert store.has(bytes(32))
    assert store.has(b"a" * 32)
    assert store.num_bytes == 2 * (block_stores.HEADER + 1000)


def test_blocks_that_are_deleted_from_outside_are_written_again(tmp_path: Path) -> None:
    """Who misses one knows that others may be gone as well; the whole folder may be emptied, too."""
    digests = [bytes([n]) * 32 for n in range(3)]
    first, second = (BlockFolder(tmp_path / "kept", "f", 1 << 20, 1000) for _ in range(2))
    for deleted in range(2):
        for digest in digests:
            first.write(digest, bytes(1000))
        if deleted:
            shutil.rmtree(tmp_path / "kept" / first._own)
        else:
            second.clear()
        with pytest.raises(block_stores.BlockError):
            first.read(digests[0])
        assert not any(first.has(digest) for digest in digests)
        assert first.num_bytes == 0
    first.write(digests[1], bytes(1000))
    assert first.read(digests[1]) == bytes(1000)
    assert (tmp_path / "kept" / first._own).stat().st_mode & 0o777 == 0o700


def test_blocks_come_back_when_they_have_left_memory(model: Path, tmp_path: Path) -> None:
    """A cache of a few blocks, through which other prompts go meanwhile."""
    with running(model, tmp_path / "kept", kv_cache_memory=1 << 17, max_model_len=7 * SIZE) as engine:
        assert engine.stats().num_blocks == 16
        right = answer(engine, PROMPT)
        for n in range(4):
            answer(engine, [9 + n, *PROMPT], f"other {n}")
        assert not engine.scheduler.blocks.lookup(_hashes(engine, PROMPT)[:1])
        assert answer(engine, PROMPT, "again") == right
        assert engine.stats().kept_blocks_read == 5


def test_blocks_that_are_read_do_not_evict_the_blocks_before_them(model: Path, tmp_path: Path) -> None:
    """A prompt of which the head is cached and the tail is on disk."""
    with running(model, tmp_path / "kept", kv_cache_memory=1 << 17, max_model_len=7 * SIZE) as engine:
        right = answer(engine, PROMPT)
        for n in range(2):
            answer(engine, [9 + n, *PROMPT], f"other {n}")
        answer(engine, PROMPT[:1:-1][: 2 * SIZE + 3], "short")
        assert len(engine.scheduler.blocks.lookup(_hashes(engine, PROMPT))) == 3
        before = cached(engine)
        assert answer(engine, PROMPT, "again") == right
        assert cached(engine) - before == 5 * SIZE
        assert engine.stats().kept_blocks_read == 2


def _hashes(engine: Engine, prompt: list[int]) -> list[bytes]:
    return engine.prepare(request(prompt, "hash"))[0].sequence.hashes(SIZE)


@pytest.mark.parametrize("damage", ["short", "long", "flipped", "renamed", "empty", "link", "missing"])
def test_what_is_damaged_is_computed_again(model: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "kept"
    with running(model, folder) as engine:
        right = answer(engine, PROMPT)
        hashes = _hashes(engine, PROMPT)
    paths = [next(folder.glob(f"*/*/{digest.hex()}")) for digest in hashes[:3]]
    data = paths[2].read_bytes()
    if damage == "short":
        paths[2].write_bytes(data[:-1])
    elif damage == "long":
        paths[2].write_bytes(data + b"x")
    elif damage == "flipped":
        paths[2].write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    elif damage == "renamed":  # a whole block, of another beginning
        paths[2].write_bytes(paths[1].read_bytes())
    elif damage == "empty":
        paths[2].write_bytes(b"")
    elif damage == "link":
        (tmp_path / "other").write_bytes(data)
        paths[2].unlink()
        paths[2].symlink_to(tmp_path / "other")
    with running(model, folder) as engine:
        if damage == "missing":
            paths[2].unlink()  # by another process, after it was seen
        assert answer(engine, PROMPT) == right
        assert cached(engine) == 2 * SIZE
        assert engine.stats().kept_block_failures == (damage != "link")  # a link was not seen in the first place
    with running(model, folder) as engine:  # written again
        assert answer(engine, PROMPT) == right
        assert cached(engine) == 5 * SIZE


def test_a_slow_disk_costs_a_second(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    folder = tmp_path / "kept"
    with running(model, folder) as engine:
        right = answer(engine, PROMPT)
    held = threading.Event()
    whole = BlockFolder.read

    def read(self: BlockFolder, digest: bytes) -> memoryview | None:
        held.wait()
        return whole(self, digest)

    with running(model, folder) as engine:
        monkeypatch.setattr(BlockFolder, "read", read)
        engine.add(engine.prepare(request(PROMPT, "slow")))
        tokens: dict[str, list[int]] = {"slow": [], "quick": []}
        assert not engine.step()
        engine.add(engine.prepare(request([5, 6, 7], "quick")))
        while engine.has_work:
            for piece in engine.step():
                tokens[piece.request_id] += piece.token_ids
            if "quick" not in engine._requests:  # nobody else has waited for it
                clock.skip(1.1)
        assert tokens["slow"] == right
        assert (cached(engine), engine.stats().kept_block_failures) == (0, 1)
        held.set()


def test_who_waits_behind_a_long_prefix_is_not_late(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    """Prefixes are read one after the other: the second one has no block while the first one gets its blocks."""
    folder, prompts = tmp_path / "kept", [PROMPT, PROMPT[::-1]]
    with running(model, folder) as engine:
        right = [answer(engine, prompt) for prompt in prompts]
        both = [_hashes(engine, prompt)[:5] for prompt in prompts]
    may_read = {digest: threading.Event() for hashes in both for digest in hashes}
    whole = BlockFolder.read

    def read(self: BlockFolder, digest: bytes) -> memoryview | None:
        may_read[digest].wait()
        return whole(self, digest)

    with running(model, folder) as engine:
        monkeypatch.setattr(BlockFolder, "read", read)
        tokens: dict[str, list[int]] = {"0": [], "1": []}
        for name, prompt in zip(tokens, prompts, strict=True):
            engine.add(engine.prepare(request(prompt, name)))
        number = 0
        while engine.has_work:
            if number < 10 and engine.stats().kept_blocks_read == number:
                may_read[(both[0] + both[1])[number]].set()
                number += 1
                clock.skip(0.7)
            for piece in engine.step():
                tokens[piece.request_id] += piece.token_ids
        assert [*tokens.values()] == right
        assert (cached(engine), engine.stats().kept_block_failures) == (10 * SIZE, 0)


def test_a_request_that_is_given_up_leaves_nothing(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    with running(model, folder) as engine:
        right = answer(engine, PROMPT)
    with running(model, folder) as engine:
        engine.add(engine.prepare(request(PROMPT, "gone")))
        engine.step()
        engine.abort("gone")
        assert not engine.has_work
        assert engine.stats().num_free_blocks == engine.stats().num_blocks
        assert answer(engine, PROMPT) == right


def test_a_failing_disk_is_told_once_and_answers_go_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def write(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(BlockFolder, "write", write)
    with running(model, tmp_path / "kept") as engine:
        right = answer(engine, PROMPT)
        assert answer(engine, [8, *PROMPT], "other")
        assert answer(engine, PROMPT, "again") == right
    assert [each.levelname for each in caplog.records if "No space left" in each.getMessage()] == ["WARNING"]


@pytest.mark.parametrize("way", ["copy_out", "copy_in"])
def test_a_copy_that_fails_costs_a_computation(
    model: Path, tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on a GPU without memory for it; a block that was not copied back is not found in the cache either."""
    folder, other = tmp_path / "kept", [8, *PROMPT]
    with running(model, folder) as engine:
        right = answer(engine, PROMPT)
    with running(model, None) as engine:
        right_other = answer(engine, other)
    with running(model, folder) as engine:
        copy, calls = getattr(engine.runner, way), itertools.count(1)

        def third_fails(*given: Any, **named: Any) -> Any:
            if next(calls) == 3:
                raise RuntimeError("out of memory")
            return copy(*given, **named)

        monkeypatch.setattr(engine.runner, way, third_fails)
        assert answer(engine, PROMPT) == right
        assert cached(engine) == (2 if way == "copy_in" else 5) * SIZE
        assert answer(engine, other, "other") == right_other
        assert answer(engine, PROMPT, "again") == right
        stats = engine.stats()
        assert (stats.kept_blocks_read, stats.kept_block_failures) == (2 if way == "copy_in" else 5, 1)
    assert [each.levelname for each in caplog.records if "out of memory" in each.getMessage()] == ["WARNING"]


def test_keys_that_were_fitted_to_another_text_are_not_read(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another tokenizer gives the text other tokens, which change the factors of quantised keys."""
    folder = tmp_path / "kept"
    with running(model, folder, kv_cache_dtype="q8_0") as engine:
        answer(engine, PROMPT)
    monkeypatch.setattr(key_fit, "_TEXT", "Another text, of which a tokenizer makes other tokens.")
    with running(model, folder, kv_cache_dtype="q8_0") as engine:
        answer(engine, PROMPT)
        assert cached(engine) == 0


def test_what_answers_depend_on_tells_blocks_apart(model: Path, tmp_path: Path) -> None:
    """Other weights, another type of cache, another salt: nothing is found."""
    folder = tmp_path / "kept"
    with running(model, folder) as engine:
        answer(engine, PROMPT)
    with running(model, folder, kv_cache_dtype="q8_0") as engine:
        answer(engine, PROMPT)
        assert cached(engine) == 0
    with running(model, folder) as engine:
        answer(engine, PROMPT, cache_salt="mine")
        assert cached(engine) == 0
    weights = next(model.glob("*.safetensors"))
    before = files_mark([weights])
    data = bytearray(weights.read_bytes())
    other = tmp_path / "other.safetensors"
    data[-5] ^= 1
    other.write_bytes(data)
    os.utime(other, ns=(weights.stat().st_atime_ns, weights.stat().st_mtime_ns))
    assert files_mark([other]) != before


def test_the_bound_deletes_what_was_used_longest_ago(tmp_path: Path) -> None:
    digests = [bytes([n]) * 32 for n in range(5)]
    data = bytes(1000)
    folder = BlockFolder(tmp_path / "kept", "a", 3 * 1040, 1000)
    for digest in digests[:3]:
        folder.write(digest, data)
    assert folder.num_bytes == 3 * 1040
    assert folder.read(digests[0]) == data  # used now
    folder.write(digests[3], data)
    assert [folder.has(digest) for digest in digests] == [True, False, True, True, False]
    for n, digest in enumerate((digests[2], digests[0], digests[3])):
        os.utime(next((tmp_path / "kept").glob(f"*/*/{digest.hex()}")), (1000 + n, 1000 + n))
    other = BlockFolder(tmp_path / "kept", "b", 3 * 1040, 1000)  # after a restart, of another model
    assert other.num_bytes == 3 * 1040
    other.write(digests[4], data)
    with pytest.raises(OSError, match="cannot be read"):
        folder.read(digests[2])
    assert folder.read(digests[0]) == data
    other.clear()
    assert other.num_bytes == 2 * 1040
    assert folder.read(digests[3]) == data


def test_engines_that_write_to_one_folder_keep_one_bound(tmp_path: Path) -> None:
    folders = [BlockFolder(tmp_path / "kept", name, 32 * 1040, 1000) for name in "aab"]
    for number in range(50):
        for each, folder in enumerate(folders):
            folder.write(bytes([each, number]) * 16, bytes(1000))
    on_disk = [path.stat().st_size for path in (tmp_path / "kept").glob("*/*/*")]
    assert 24 * 1040 <= sum(on_disk) <= (32 + 3 * 2) * 1040
    folders[0].clear()  # what the second wrote is of the same model
    assert not list((tmp_path / "kept" / folders[1]._own).glob("*/*"))
    assert list((tmp_path / "kept").glob("*/*/*"))


def test_forgetting_the_prefix_cache_forgets_the_disk(model: Path, tmp_path: Path) -> None:
    with running(model, tmp_path / "kept") as engine:
        answer(engine, PROMPT)
        wait_for(lambda: engine.stats().kept_blocks_written == 5)
        engine.reset_prefix_cache()
        assert engine.stats().kept_block_bytes == 0
        answer(engine, PROMPT, "again")
        assert cached(engine) == 0


@pytest.mark.skipif(os.name == "nt", reason="modes of files are of other systems")
def test_a_folder_that_others_can_read_is_refused(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir(mode=0o755)
    folder.chmod(0o755)
    with pytest.raises(ConfigError, match="this user only") as caught, running(model, folder):
        pass
    assert caught.value.setting == "prompt_cache_path"
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="prompt_cache_path"), running(model, tmp_path / "file"):
        pass
    with pytest.raises(ConfigError, match="is too small for one block"):
        BlockFolder(tmp_path / "small", "a", 1000, 1000)


def test_settings_that_set_nothing_are_told(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with running(model, tmp_path / "kept", enable_prefix_caching=False) as engine:
        assert engine.offloaded is None
    assert "prompt_cache_path has no effect without enable_prefix_caching" in caplog.text
    assert not (tmp_path / "kept").exists()
    with pytest.raises(ConfigError, match="random weights"), running(model, tmp_path / "kept", load_format="dummy"):
        pass
    with pytest.raises(ConfigError, match="prompt_cache_bytes sets nothing without prompt_cache_path"):
        EngineConfig(model="m", prompt_cache_bytes=1 << 30)


def test_a_process_that_is_killed_while_it_writes_leaves_no_wrong_block(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    code = (
        "import sys; from pathlib import Path\n"
        "from candle_vllm.core.engine.cache.block_stores import BlockFolder\n"
        "folder = BlockFolder(Path(sys.argv[1]), 'a', 1 << 30, 1 << 20)\n"
        "print('ready', flush=True)\n"
        "for n in range(100000): folder.write(n.to_bytes(32, 'big'), n.to_bytes(4, 'big') * (1 << 18))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    wait_for(lambda: len(list(folder.glob("*/*/*"))) > 1)
    process.send_signal(signal.SIGTERM if os.name == "nt" else signal.SIGKILL)
    process.wait()
    process.stdout.close()
    again = BlockFolder(folder, "a", 1 << 30, 1 << 20)
    found = 0
    while again.has(found.to_bytes(32, "big")):
        data = again.read(found.to_bytes(32, "big"))
        assert data is not None
        assert (np.frombuffer(data, ">u4") == found).all()
        found += 1
    assert found


def test_pictures_tell_blocks_apart(tmp_path: Path) -> None:
    """The same words with the same picture are found after a restart, with another one as far as it begins."""
    model = write_toy_sight(tmp_path / "sight")
    numbers = np.random.default_rng(3)
    first, second = (numbers.integers(0, 256, (40, 70, 3), dtype=np.uint8) for _ in range(2))
    settings: dict[str, Any] = {"prompt_cache_path": tmp_path / "kept", "block_size": SIZE, "threads": 1}
    greedy = SamplingParams(max_tokens=6, temperature=0)

    def asked(picture: Any) -> tuple[tuple[int, ...], int]:
        with InferenceEngine(model, **settings) as engine:
            prompt = {"prompt": "0123456789abcdef" * 2 + "<image> what?", "multi_modal_data": {"image": picture}}
            found = engine.generate(prompt, greedy, use_tqdm=False)[0]  # type: ignore[arg-type]
            return tuple(found.outputs[0].token_ids), engine.stats().cached_prompt_tokens

    right, none = asked(first)
    again, all_of_it = asked(first)
    other, before_it = asked(second)
    assert (again, none) == (right, 0)
    assert other != right
    assert all_of_it > before_it == 2 * SIZE


def test_adapters_tell_blocks_apart(model: Path, tmp_path: Path) -> None:
    """After a restart an adapter finds its own blocks, by what is in it and not by its name."""
    config = read_json(model / "config.json")
    heads = {"q_proj": "num_attention_heads", "v_proj": "num_key_value_heads"}
    sizes = {name: config[count] * config["head_dim"] for name, count in heads.items()}
    shapes = {f"model.layers.0.self_attn.{name}": (size, config["hidden_size"]) for name, size in sizes.items()}
    for seed in range(2):
        write_adapter(tmp_path / f"adapter{seed}", shapes, rank=4, seed=seed, size=2)
    settings: dict[str, Any] = {"prompt_cache_path": tmp_path / "kept", "block_size": SIZE, "threads": 1}
    greedy = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)

    def asked(folder: str | None) -> tuple[tuple[int, ...], int]:
        with InferenceEngine(model, enable_lora=True, **settings) as engine:
            wanted = None if folder is None else LoRARequest("one", lora_path=str(tmp_path / folder))
            found = engine.generate([PROMPT], greedy, lora_request=wanted, use_tqdm=False)[0]
            return tuple(found.outputs[0].token_ids), engine.stats().cached_prompt_tokens

    plain, mine = asked(None), asked("adapter0")
    assert plain[1] == mine[1] == 0
    assert asked("adapter1")[1] == 0  # of the same name
    assert asked("adapter0") == (mine[0], 5 * SIZE)
    assert asked(None) == (plain[0], 5 * SIZE)


def test_blocks_outlive_sleep(model: Path, tmp_path: Path) -> None:
    with InferenceEngine(model, prompt_cache_path=tmp_path / "kept", block_size=SIZE, threads=1) as engine:
        greedy = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
        right = engine.generate([PROMPT], greedy, use_tqdm=False)[0].outputs[0].token_ids
        engine.sleep(2)
        engine.wake_up()
        assert engine.generate([PROMPT], greedy, use_tqdm=False)[0].outputs[0].token_ids == right
        assert engine.stats().kept_blocks_read == 5


def test_what_is_being_written_is_forgotten_too(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go = threading.Event(), threading.Event()
    whole = BlockFolder.write

    def write(self: BlockFolder, digest: bytes, data: Any) -> None:
        begun.set()
        go.wait()
        whole(self, digest, data)

    monkeypatch.setattr(BlockFolder, "write", write)
    with running(model, tmp_path / "kept") as engine:
        answer(engine, PROMPT)
        assert begun.wait(PATIENCE)
        engine.reset_prefix_cache()
        go.set()
    assert not [path for path in (tmp_path / "kept").glob("*/*/*") if path.is_file()]
