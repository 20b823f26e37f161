# SPDX-License-Identifier: MIT
"""Plan memory: available memory, the size of the KV cache, and errors for what does not fit."""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeAlias

from candle_vllm.core.config import CACHE_TYPES, EngineConfig
from candle_vllm.core.devices import Device, gpu_memory
from candle_vllm.core.errors import ConfigError, NoMemoryError
from candle_vllm.core.kernels.collectives import Collective
from candle_vllm.core.kernels.cpu_runtime.weight_memory import mapped_bytes
from candle_vllm.core.loading.cache_specs import (
    NO_STATES,
    CacheSpec,
    PagedSpec,
    StateRoom,
    WindowRoom,
    paged,
    pool_of,
    states,
    windows_of,
)
from candle_vllm.core.loading.config import ModelConfig
from candle_vllm.core.threads import STACK_BYTES, control_groups, loading_threads, read_or_nothing

MIB = 1 << 20
SPARE, SPARE_ADDRESSES = 256 * MIB, 768 * MIB
"""Bytes that a raised limit should leave free for steps, requests and threads; the second is for `ulimit -v`."""
_FOR_STEPS = 64 * MIB
_FOR_A_SERVER = 128 * MIB
"""Bytes of a control group's limit that are left free, because the system kills a process that exceeds it: after the
cache is planned, a start takes 70 MiB with the smallest models, and six concurrent requests take 30 MiB more."""
_SHORT = 96 * MIB  # bytes that loading a library may need


def _size(count: float) -> str:
    return f"{count / MIB:.0f} MiB" if count >= 10 * MIB else f"{count / 1024:.0f} KiB"


_UNBOUNDED = 1 << 40  # state slots that a rank without states, such as a stage of attention layers, agrees to


@dataclasses.dataclass(frozen=True)
class CachePlan:
    """Size of the KV cache.

    Attributes:
        block_bytes: bytes of one block: keys and values of all layers without a page pool, and of a draft model.
        max_model_len: longest prompt plus output, in tokens; it always fits.
        message: how the size was computed, for the log.
        warning: the reduced context, and the memory that the full context needs; empty if it was not reduced.
        states: size of the pool of layer states.
        windows: the page pools of layers with a window, one for each window.
        index_bytes: bytes outside the cache for the scores and positions of a sparse-attention index in a step.
    """

    num_blocks: int
    block_bytes: int
    max_model_len: int
    message: str
    warning: str = ""
    states: StateRoom = NO_STATES
    windows: tuple[WindowRoom, ...] = ()
    index_bytes: int = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of all blocks, page pools and states."""
        return self.num_blocks * self.block_bytes + _window_bytes(self.windows) + self.states.num_bytes

    def agreed(self, ranks: Collective) -> CachePlan:
        """Return the largest plan that fits every rank."""
        blocks, longest = (ranks.least(number) for number in (self.num_blocks, self.max_model_len))
        own = (self.states.running, self.states.checkpoints) if self.states.running_bytes else (_UNBOUNDED, _UNBOUNDED)
        running, checkpoints = map(ranks.least, own)
        some = running < _UNBOUNDED  # a rank of this model has states
        room = dataclasses.replace(self.states, running=running, checkpoints=checkpoints) if some else self.states
        windows = tuple(dataclasses.replace(each, pages=ranks.least(each.pages)) for each in self.windows)
        return dataclasses.replace(self, num_blocks=blocks, max_model_len=longest, states=room, windows=windows)


@dataclasses.dataclass(frozen=True)
class Room:
    """Memory for a KV cache.

    Attributes:
        available: free bytes on the device after loading the weights, without the reserve for a step.
        share: default of `kv_fraction`, the fraction of `available` that the cache may take.
        kept: description of the reserve, for the message; may be empty.
        limit: the user's setting that bounds the memory, if any.
        as_it_fills: the cache takes memory only as it fills.
        total: bytes of a GPU, used or not; 0 for main memory.
    """

    available: int
    share: float
    kept: str = ""
    limit: Limit | None = None
    as_it_fills: bool = False
    total: int = 0


def main_room(threads: int, share: float, weights: int = 0) -> Room:
    """Return the main memory for a KV cache; `weights` are bytes that are taken later, for weights and steps.

    Limits of reserved memory count the stacks of all computing threads.
    """
    limit = tightest_limit()
    limit = limit._replace(left=max(0, limit.left - weights))
    aside = 0
    if limit.unit:
        aside = min(limit.left // 2, threads * STACK_BYTES + _FOR_STEPS)
    elif limit.allowed:
        aside = min(limit.left, _FOR_A_SERVER)
    kept = f" of {limit.name}, {_size(aside)} put aside" if aside else ""
    return Room(limit.left - aside, share, kept, limit if limit.allowed else None, as_it_fills=True)


class _Division(NamedTuple):
    """Memory divided into states, page pools and blocks; `specs` are the caches in blocks, without a draft model's."""

    states: StateRoom
    of_states: str
    windows: tuple[WindowRoom, ...]
    specs: Sequence[PagedSpec]
    token_bytes: int

    def bytes_with(self, tokens: int) -> int:
        """Return the bytes of states, page pools, and blocks for `tokens` tokens."""
        return self.states.num_bytes + _window_bytes(self.windows) + tokens * self.token_bytes


def plan_cache(
    config: EngineConfig,
    model: ModelConfig,
    element_bytes: ElementBytes,
    sequences: int,
    room: Room,
    beside: int = 0,
    layers: Iterable[int] | None = None,
    drafts: int = 0,
    rows: int = 0,
    pools: int | None = None,
) -> CachePlan:
    """Divide the memory for the KV cache into blocks.

    Args:
        model: the model, its context already reduced to `config.max_model_len` if that is set.
        sequences: maximum number of sequences in a step; the cache is no larger than for this number of full length.
        beside: bytes of one token in a draft model's cache, which has the same number of blocks.
        layers: the numbers of this rank's layers; None for all.
        drafts: maximum number of draft tokens of a sequence in a step.
        rows: maximum tokens of a sequence in overlapping steps; 0 if layers with a window have as many pages as blocks.
        pools: maximum number of page pools; None for one pool per window size.

    Raises:
        ConfigError: the requested context is longer than the model's, or the cache does not fit (NoMemoryError).
    """
    refuse_longer(config, model)
    available, share = room.available, config.kv_fraction or room.share
    if config.kv_cache_memory is not None and config.kv_cache_memory > available:
        raise NoMemoryError(
            f"kv_cache_memory is {_size(config.kv_cache_memory)}, but only {_size(available)} are free: set "
            f"kv_cache_memory={int(available * 0.9) // MIB * MIB} (bytes) or less",
            "kv_cache_memory",
        )
    here = [each for n, each in enumerate(model.cache_specs) if layers is None or n % model.num_layers in layers]
    budget = config.kv_cache_memory or int(available * share)
    of_whole = config.gpu_memory_utilization is not None and room.total > 0 and not config.kv_cache_memory
    if config.gpu_memory_utilization is not None and of_whole:
        budget = max(0, available - int(room.total * (1 - config.gpu_memory_utilization)))
    per_sequence, most_sequences = -(-model.max_position // config.block_size), sequences

    def divide(total: int) -> _Division:
        found, windows = _plan_states(config, here, most_sequences, drafts, model.max_position, available, total), ()
        running, left = found[0].running or most_sequences, max(0, total - found[0].num_bytes)
        wanted = windows_of(model.cache_specs)[:pools] if rows else ()  # all pipeline stages have the same pools
        while wanted and not windows:
            rooms = [WindowRoom(window, min(rows, model.max_position) + drafts) for window in wanted]
            sizes = [0] * len(rooms)
            block = beside * config.block_size
            for spec in paged(here):
                size, pool = cache_bytes([spec], config.block_size, element_bytes), pool_of(spec, rooms)
                if pool is None:
                    block += size
                else:
                    sizes[pool] += size
            rooms = [dataclasses.replace(room, page_bytes=size) for room, size in zip(rooms, sizes)]
            windows = _plan_windows(config, rooms, block, running, left, per_sequence)
            wanted = wanted[:-1]  # for the largest window, one page per block may take less memory
        specs = [spec for spec in paged(here) if pool_of(spec, windows) is None]
        token_bytes = cache_bytes(specs, 1, element_bytes) + beside
        return _Division(*found, windows, specs, token_bytes)

    given, parts = budget, divide(budget)
    (states, of_states, windows, specs, token_bytes), window_bytes = parts, _window_bytes(parts.windows)
    sequences, budget = states.running or sequences, max(0, budget - states.num_bytes)
    block_bytes = token_bytes * config.block_size
    affordable = (budget - window_bytes) // block_bytes if block_bytes else max(per_sequence, 1 << 17)  # 0-byte blocks
    context, whole_bytes, more = model.max_position, 0, parts.bytes_with(per_sequence * config.block_size)
    if affordable < per_sequence:
        while more > whole_bytes:  # a larger cache has more checkpoints and window pages; suggestions are whole MiB
            whole_bytes = -(-more // MIB) * MIB if states.num_bytes or windows else more
            more = divide(whole_bytes).bytes_with(per_sequence * config.block_size)
        context = _shrunk_context(config, context, affordable, whole_bytes, room, given)
    num_blocks = min(affordable, per_sequence * sequences)
    source = "set by kv_cache_memory" if config.kv_cache_memory else f"{share:g} of {_size(available)} free{room.kept}"
    if of_whole:
        source = f"{_size(available)} free{room.kept}, of {_size(room.total)} times {config.gpu_memory_utilization:g}"
    whole = num_blocks == per_sequence * sequences
    several = f"{sequences} sequences" if sequences > 1 else "one sequence"
    needed = f"all that {several} of {context:,} tokens can need" if whole else f"of {_size(budget)}"
    each = [f"{room.window:,} tokens keep {(room.pages - 1) * config.block_size:,}" for room in windows]
    of_windows = f"; layers with a window of {', of '.join(each)} tokens, {_size(window_bytes)}" if windows else ""
    of_drafts = f" and {beside} B for drafts" if beside else ""
    terms = f"{_elements(specs, element_bytes)}{of_drafts}"
    of_token = f"; one token takes {terms} = {token_bytes} B" if token_bytes else ""
    kept = ", taken as the cache fills" if room.as_it_fills else ""
    message = (
        f"KV cache: room for {num_blocks * config.block_size:,} tokens in blocks of {config.block_size}; at most "
        f"{_size(num_blocks * block_bytes + window_bytes)}, {needed} ({source}){kept}{of_token}{of_windows}; context "
        f"{context:,}{of_states}"
    )
    cut = ""
    if context < model.max_position:
        if config.kv_cache_memory or of_whole:
            takes = f"all of it takes {-(-whole_bytes // MIB)} MiB of KV cache (--mem) instead of {_size(given)}"
        else:
            missing = -(-int(whole_bytes / share - available) // MIB)
            takes = f"all of it takes {missing:,} MiB more than the {_size(available)} that are free{room.kept}"
        cut = (
            f"the model's context of {model.max_position:,} tokens does not fit and is cut to {context:,}: {takes}; if "
            f"that is intended, set max_model_len to {context} (--max-model-len {context})"
        )
    return CachePlan(num_blocks, block_bytes, context, message, cut, states, windows)


def _window_bytes(windows: Iterable[WindowRoom]) -> int:
    return sum(room.pages * room.page_bytes for room in windows)


def agreed_plan(make: Callable[[int | None], CachePlan], ranks: Collective | None) -> CachePlan:
    """Return the plan that fits all ranks; `make` plans for at most a number of page pools, None for all pools."""
    plan = make(None)
    while ranks is not None:
        fewest = ranks.least(len(plan.windows))
        if ranks.least(-len(plan.windows)) == -fewest:
            return plan.agreed(ranks)
        plan = make(fewest)
    return plan


def _plan_windows(
    config: EngineConfig, rooms: Sequence[WindowRoom], block: int, sequences: int, budget: int, per_sequence: int
) -> tuple[WindowRoom, ...]:
    """Compute the pages of each pool within `budget` bytes; no pool if a page for each block takes no more memory.

    Pools get the pages that all sequences read and write, and as many for cached prefixes. But if `max_model_len` is
    set, blocks for one sequence of full length, `per_sequence`, come first; otherwise pools get at least half of the
    budget. `block` are the bytes of a block of the layers without a pool.
    """
    size, is_set = config.block_size, config.max_model_len is not None
    most, least, wanted = per_sequence * sequences, list[int](), list[int]()
    for room in rooms:
        least.append(min(per_sequence, room.blocks(size)))
        seen = sequences * min(per_sequence, room.blocks(size, 1)) * (1 + config.enable_prefix_caching)
        wanted.append(min(most, max(least[-1], seen + -(-room.rows // size))))
    each = least, wanted, [1] * len(rooms)
    low, high, unused = (sum(room.page_bytes * count for room, count in zip(rooms, counts)) for counts in each)
    given = max(low if is_set else max(low, budget // 2), budget - per_sequence * block - unused)
    share = 1.0 if given >= high else max(0.0, (given - low) / (high - low))
    found = [dataclasses.replace(room, pages=1 + few + int((many - few) * share))
             for room, few, many in zip(rooms, least, wanted)]  # fmt: skip
    taken = _window_bytes(found)
    blocks = most if taken <= budget else 0
    if block:
        blocks = max((budget - taken) // block, per_sequence if is_set else 0)
    return tuple(found) if all(room.pages <= min(blocks, most) for room in found) else ()


def _plan_states(
    config: EngineConfig,
    specs: Iterable[CacheSpec],
    sequences: int,
    drafts: int,
    longest: int,
    available: int,
    budget: int,
) -> tuple[StateRoom, str]:
    """Return the size of the state pool in a cache of `budget` bytes, and a description of it.

    `longest` is the maximum number of tokens of a sequence; errors suggest at most `available` bytes for the cache.
    """
    parts = [part for spec in states(specs) for part in spec.parts]
    if not parts:
        return NO_STATES, ""
    state = 4 * sum(math.prod(part.shape) for part in parts)
    whole = state + 4 * drafts * sum(part.inputs for part in parts)
    running, least = min(sequences, budget // 2 // whole), config.max_num_seqs or 1
    if running < least:
        needed = -(-2 * whole * least // MIB) * MIB
        ways = [f"set max_num_seqs={running}"] if running else []
        ways += [f"set kv_cache_memory={needed} (bytes)"] if needed <= available else []
        raise NoMemoryError(
            f"the recurrent states of {least} sequence{'s' * (least > 1)} take {_size(whole)} each, and may use half "
            f"of the cache's {_size(budget)}: {' or '.join(ways) or 'use a smaller model'}",
            "max_num_seqs" if running else "kv_cache_memory",
        )
    kept = budget // 4 if config.state_cache_gb is None else int(config.state_cache_gb * (1 << 30))
    blocks = sequences * -(-longest // config.block_size)  # each block may end at a checkpoint
    checkpoints = min(kept // state, blocks) if config.enable_prefix_caching else 0
    said = f"; states: {running} of {_size(whole)} for sequences, and {checkpoints} checkpoints of {_size(state)}"
    return StateRoom(running, checkpoints, drafts, whole, state), said


def refuse_longer(config: EngineConfig, model: ModelConfig) -> None:
    """Raise a ConfigError if the requested context is longer than the model's."""
    if config.max_model_len is not None and config.max_model_len > model.max_position:
        raise ConfigError(
            f"max_model_len {config.max_model_len} is beyond the model's context of {model.max_position} tokens: "
            f"set max_model_len={model.max_position} or leave it out",
            "max_model_len",
        )


ElementBytes: TypeAlias = Callable[[int], float]
"""Function from a key head's number of elements to the bytes of a cache element, with its share of a scale."""


def cache_bytes(specs: Iterable[CacheSpec], tokens: int, element_bytes: ElementBytes) -> int:
    """Return the bytes of `tokens` tokens in the paged caches among these specs; states do not count."""
    return round(tokens * sum(spec.elements * _bytes_of(spec, element_bytes) for spec in paged(specs)))


def _bytes_of(spec: PagedSpec, element_bytes: ElementBytes) -> float:
    return 4 if spec.exact else element_bytes(spec.key_dim)


def device_element_bytes(config: EngineConfig, plain: int) -> ElementBytes:
    """Return the `ElementBytes` of a GPU's cache; `plain` are the bytes of an element of activations."""
    kind = CACHE_TYPES[config.kv_cache_dtype]
    if not kind.row_scales:
        return lambda _: 1 if kind.element else plain
    from candle_vllm.core.kernels.kv_write.scaled_rows import SCALE

    return lambda key_dim: 1 + SCALE / key_dim


def _elements(specs: Sequence[PagedSpec], element_bytes: ElementBytes) -> str:
    """Return the formula of a token's bytes for the log, with a term for each shape of keys and values."""
    terms: list[str] = []
    counts = Counter((spec.shape, _bytes_of(spec, element_bytes)) for spec in specs)
    for ((heads, keys, values), size), count in counts.items():
        kept = f"2 x {count} layers x {heads} heads x {keys}"
        if keys != values:
            kept = f"{count} layers x {heads} head{'s' * (heads > 1)} x {keys + values}"
        terms.append(f"{kept} x {size:g} B")
    return " + ".join(terms)


def _shrunk_context(config: EngineConfig, context: int, affordable: int, needed: int, room: Room, budget: int) -> int:
    """Return the context that fits; raise a NoMemoryError with values that work if one is set, or no block fits.

    `needed` are the bytes of a cache for the whole context, `affordable` the blocks that `budget` bytes have room for.
    """
    fits = affordable * config.block_size
    if config.max_model_len is None and fits >= config.block_size:
        return fits
    ways, missing = [f"max_model_len={fits}"] if fits > 0 else [], needed - room.available
    if missing <= 0:
        ways.append(f"kv_cache_memory={min(-(-needed // MIB) * MIB, room.available)} (bytes)")
    if config.gpu_memory_utilization is not None and room.total:
        least = 1 - (room.available - needed) / room.total
        ways += [f"gpu_memory_utilization={least + 0.005:.2f}"] if least <= 0.99 else []
    elif config.kv_cache_memory is None and needed < room.available * 0.95:
        ways.append(f"kv_fraction={min(0.99, needed / room.available + 0.01):.2f}")
    if missing > 0:
        ways.append(f"to {f'free {_size(missing)} of memory' if room.limit is None else room.limit.raised_by(missing)}")
    raise NoMemoryError(
        f"a context of {context} tokens needs {_size(needed)} of KV cache and there are {_size(budget)}{room.kept}: "
        f"try {' or '.join(ways)}",
        "max_model_len" if config.max_model_len is not None else "kv_cache_memory",
    )


def free_memory(device: Device) -> int:
    """Return the free bytes of a device."""
    return available_memory() if device.type == "cpu" else gpu_memory(device)[0]


def available_memory() -> int:
    """Return the bytes of main memory that this process may still take, by the machine and by all limits."""
    return tightest_limit().left


class Limit(NamedTuple):
    """Limit of this process's memory.

    Attributes:
        left: bytes that may still be taken.
        name: name for messages.
        allowed: the limit in bytes; 0 for the machine's memory, which is no setting.
        unit: bytes of one unit in the command `name`, which sets the limit; 0 for a limit without a command.
        spare: bytes that a raised limit should leave.
    """

    left: int
    name: str
    allowed: int = 0
    unit: int = 0
    spare: int = SPARE

    def raised_by(self, missing: int) -> str:
        """Return the advice for raising the limit by `missing` bytes."""
        if self.unit:
            return f"raise it ({self.name} {-(-(self.allowed + missing + self.spare) // self.unit)})"
        if self.allowed:
            return f"raise it to {-(-(self.allowed + missing + self.spare) // MIB)} MiB"
        return "end other programs"


def tightest_limit(root: Path = Path("/")) -> Limit:
    """Return the tightest of the machine's memory, the limits of this process and those of its control groups."""
    return min((_machine_memory(root), *_process_limits(root), *_group_limits(root)), key=lambda limit: limit.left)


def _machine_memory(root: Path) -> Limit:
    if sys.platform == "win32":
        return Limit(_free_of_windows(), "this machine")
    left = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2  # if meminfo lacks MemAvailable
    for line in read_or_nothing(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            left = max(0, int(line.split()[1]) * 1024 - mapped_bytes())
    return Limit(left, "this machine")


class _MemoryStatus(ctypes.Structure):
    """Windows' MEMORYSTATUSEX; `total`, `free`: bytes of physical memory."""

    _fields_ = (
        *((name, ctypes.c_uint32) for name in ("size", "load")),
        *((name, ctypes.c_uint64) for name in ("total", "free", "pages", "free_pages", "space", "free_space", "more")),
    )


def _free_of_windows() -> int:
    """Return the free bytes of memory on Windows; 4 GiB are assumed if the system does not answer."""
    status = _MemoryStatus(size=ctypes.sizeof(_MemoryStatus))
    if sys.platform == "win32" and ctypes.WinDLL("kernel32").GlobalMemoryStatusEx(ctypes.byref(status)):
        return status.free
    return 4 << 30


def _process_limits(root: Path) -> Iterator[Limit]:
    """Yield limits of addresses and data (`ulimit -v`, `ulimit -d`), which count reserved memory, used or not."""
    if sys.platform == "win32":
        return
    import resource

    pages = read_or_nothing(root / "proc/self/statm").split()  # all, resident, shared, code, -, data and stacks, -
    for kind, place, name, spare in (
        (resource.RLIMIT_AS, 0, "ulimit -v", SPARE_ADDRESSES),
        (resource.RLIMIT_DATA, 5, "ulimit -d", SPARE),
    ):
        allowed = resource.getrlimit(kind)[0]
        if allowed != resource.RLIM_INFINITY and len(pages) > place:
            yield Limit(max(0, allowed - int(pages[place]) * resource.getpagesize()), name, allowed, 1024, spare)


def _group_limits(root: Path) -> Iterator[Limit]:
    """Yield limits of control groups; inactive pages of the file cache do not count as used."""
    for group in control_groups("memory", root):
        for limit, used, cached in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            allowed, taken = (read_or_nothing(group / name).strip() for name in (limit, used))
            if allowed.isdecimal() and taken.isdecimal():  # otherwise "max", or no such group
                lines = (line.split() for line in read_or_nothing(group / "memory.stat").splitlines())
                idle = sum(int(line[1]) for line in lines if len(line) == 2 and line[0] == cached) - mapped_bytes()
                left = int(allowed) - max(0, int(taken) - max(0, idle))
                yield Limit(max(0, left), "the control group (container)", int(allowed))


# ---- what does not fit -----------------------------------------------------------------------------------------------


@contextmanager
def room_for(
    what: str, size: int, setting: str | None = None, way: Callable[[int], str] | None = None
) -> Iterator[None]:
    """Report memory errors within the context as one sentence: what did not fit in main memory, and what would help.

    Args:
        what: what is allocated, such as "the weights of NAME".
        size: its bytes, as far as known. If a limit leaves less, the error is raised without trying.
        setting: field of `EngineConfig` that the size depends on.
        way: returns advice other than raising the limit, given the bytes that are left.

    Raises:
        NoMemoryError: instead of MemoryError, and of the system's errors when a thread or a mapping cannot be created.
    """
    limit = tightest_limit()
    if limit.allowed and size > limit.left:
        raise _no_room(what, size, setting, way)
    try:
        yield
    except MemoryError as error:
        raise _no_room(what, size, setting, way) from error
    except (OSError, ImportError) as error:  # libraries that cannot be mapped do not say why
        now = tightest_limit()
        if getattr(error, "errno", None) == errno.ENOMEM or (now.allowed and now.left < _SHORT):
            raise _no_room(what, size, setting, way) from error
        raise
    except RuntimeError as error:
        if "start new thread" not in str(error):
            raise
        if loading_threads() > 1:
            setting, way = "threads", lambda _: "set threads=1"
        raise _no_room(f"one more thread for {what}", STACK_BYTES, setting, way) from error


def _no_room(what: str, size: int, setting: str | None, way: Callable[[int], str] | None) -> NoMemoryError:
    limit = tightest_limit()
    ways = [] if way is None else [way(limit.left)]
    if limit.allowed:
        ways.append(limit.raised_by(max(size - limit.left, 0)))
        bound = f"{_size(limit.left)} are left of the {_size(limit.allowed)} that {limit.name} allows"
    else:
        bound = f"{_size(limit.left)} are free on {limit.name}"
    takes = f" ({_size(size)})" if size else ""
    return NoMemoryError(f"not enough memory for {what}{takes}: {bound}; {' or '.join(ways) or 'free some'}", setting)
