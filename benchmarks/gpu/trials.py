# SPDX-License-Identifier: MIT
"""What can be turned on and which tiles can be tried, and what came of it: the tables of runs B and C."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from bars import Judged, Line, below, matches, plain


@dataclass(frozen=True)
class Switch:
    """Something that is off until a GPU has judged it.

    Attributes:
        settings: PATH=NUMBER as `settings.py` takes them; one that does not exist is reported as absent.
        arguments: of `engine.py`, for what it is to make faster.
    """

    settings: tuple[str, ...]
    arguments: tuple[str, ...]


_ONLY = ("--prompts", "--serve", "--mixed")
SWITCHES: Mapping[str, Switch] = {
    "own linear kernel": Switch(("linear.OWN_ROWS=16",), ("--model", "llama-3.1-8b", "--batches", "1", "8", *_ONLY)),
    "captured steps with prompts": Switch(
        ("EngineConfig.max_cudagraph_capture_size=2048",),
        ("--model", "llama-3.1-8b", "--batches", "1", "--prompts", "--serve", "--mixed", "64"),
    ),
}


@dataclass(frozen=True)
class Sweep:
    """Arguments of `sweep.py`, and the engine that its winners are tried in."""

    only: str
    match: tuple[str, ...]
    tries: tuple[str, ...]
    model: tuple[str, ...] = ("--model", "llama-3.1-8b")


_TILES = "gguf_linear.triton.TILES.32"
_8B_MATRICES = ("8B qkv", "8B o", "8B gate, up", "8B down", "8B head")

SWEEPS: Mapping[str, Sweep] = {
    "exact kernel": Sweep(
        "gguf",
        tuple(f"gguf_linear Q4_K 8B {name} T={rows}$" for name in ("gate, up", "down") for rows in (1, 8, 16)),
        (
            *(f"{_TILES}.{place}.{field}" for field in ("rows=32,64", "warps=1,2", "stages=3,4,5") for place in (0, 1)),
            "gguf_linear.triton.CODED_CUT.programs=1024,2048,4096",
        ),
        ("--model", "llama-3.1-8b", "--gguf"),
    ),
    "decode attention": Sweep(
        "attention",
        tuple(f"decode attention 8B R={rows} context=8192$" for rows in (1, 8, 64)),
        (
            "attention.triton_decode.splits.programs=2,3",
            "attention.triton_decode.splits.num_stages=3,5,7",
            "attention.triton_decode._CHUNK=64,128,256",
        ),
    ),
    "own linear": Sweep(
        "linear",
        tuple(f"linear, own {name} T={rows}$" for name in _8B_MATRICES for rows in (1, 8, 16)),
        (
            "linear.triton.SERVER_TILES.0.rows=32,64,128",
            "linear.triton.SERVER_TILES.0.stages=4,5,6,7",
            "linear.triton.CUT.programs=132,264,528",
        ),
    ),
    "prefill attention": Sweep(
        "attention",
        tuple(f"prefill attention 8B T={tokens} context={tokens}$" for tokens in (2048, 8192)),
        (
            "attention.triton_prefill.tiles.keys=64,128",
            "attention.triton_prefill.tiles.num_warps=4,8",
            "attention.triton_prefill.tiles.num_stages=2,3,5",
        ),
    ),
}


def sweeps_for(found: Sequence[Judged], lines: Sequence[Line]) -> list[str]:
    """Names of `SWEEPS` for what is below its bar, the most valuable first; all where nothing was measured."""
    if all(each.measured is None for each in found):
        return list(SWEEPS)
    steps = [step for each in below(found) for step in each.row.look(lines)]
    return list(dict.fromkeys(step.sweep for step in steps if step.sweep))


def own_rows(lines: Iterable[Line]) -> int:
    """The most rows up to which our own linear kernel takes no longer than torch's over the five products of an 8B;
    0 where it never does, or a product was not measured."""
    spent: dict[int, dict[str, tuple[float, float]]] = {}
    for line in lines:
        if matches(line, {"benchmark": "gpu/kernels", "kernel": "linear, own"}) and plain(line) and line.get("ok"):
            name, _, rows = line["shape"].rpartition(" T=")
            peer = line.get("peers", {}).get("torch")
            if name in _8B_MATRICES and isinstance(peer, (int, float)):
                spent.setdefault(int(rows), {})[name] = line["us"], peer
    found = 0
    for rows, times in sorted(spent.items()):
        if len(times) < len(_8B_MATRICES) or sum(ours for ours, _ in times.values()) > sum(
            peer for _, peer in times.values()
        ):
            break
        found = rows
    return found


def gains(lines: Iterable[Line], settings: Sequence[str]) -> list[tuple[str, float, float]]:
    """What settings changed: of each result with them that there is without them too, its name, tokens per second
    without, and with."""
    rows, found = list(lines), []
    keys = ("benchmark", "model", "what", "batch", "tokens", "context")
    for line in rows:
        if line.get("config", {}).get("set") == list(settings) and "tok_s" in line:
            where = {key: line.get(key) for key in keys} | {"config.gguf": line["config"].get("gguf")}
            before = next((each for each in rows if plain(each) and matches(each, where)), None)
            if before is not None:
                name = " ".join(str(line[key]) for key in ("model", "what", "batch", "tokens") if key in line)
                found.append((name, before["tok_s"], line["tok_s"]))
    return found
