# SPDX-License-Identifier: MIT
"""Load a model's weights from a checkpoint, by the family's table of weight names.

The table has one line per tensor: its parameter in the model, its Hugging Face name and its GGUF name, with `{i}` for
the layer and `{e}` for the expert. Missing, unexpected and misshapen tensors are reported before memory is allocated.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any, Protocol, TypeAlias, runtime_checkable

from candle_vllm.core.errors import WeightsError
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.views import Spare, View, entry
from candle_vllm.core.quantization.tensors import StoredTensor
from candle_vllm.core.threads import LOADED_PART, LOADING_THREADS, loading_threads

logger = logging.getLogger(__name__)

_PART = re.compile(r":\d+\.")  # number in a target such as "...:0.weight" (gemma3n.py): GGUF has one tensor for all
_SHOWN = 64  # maximum number of names of one kind in an error message


class Parameter(Protocol):
    """Parameter that one stored tensor fills."""

    @property
    def sections(self) -> int:
        """Number of matrices that are stacked along the rows; a shard has a part of each matrix."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Required shape of the stored tensor."""

    def fill(self, stored: StoredTensor) -> str | None:
        """Load the tensor; return why it takes more memory than in the file (for the log), or None."""


class Loadable(Protocol):
    """Layer whose weights are named parameters ("weight", "bias", "q.weight", ...)."""

    def parameters(self) -> Mapping[str, Parameter]:
        """Return every parameter that must be loaded."""


@runtime_checkable
class Finishes(Protocol):
    """Layer with a method that is called when all of its parameters are loaded."""

    def finish(self) -> None: ...


Cut: TypeAlias = Callable[[str, StoredTensor], StoredTensor]
_Job = tuple[StoredTensor, Parameter, str]  # the tensor, its parameter, and the layer's path


class Counted(Protocol):
    """Config values that determine how often the lines of a table are repeated."""

    @property
    def num_layers(self) -> int:
        """Number of layers, for lines with `{i}`."""

    @property
    def num_experts(self) -> int:
        """Number of experts, for lines with `{e}`; 0 without experts."""


@dataclasses.dataclass(frozen=True)
class Seen:
    """A stored name with its own view, for lines whose tensors are stored in several ways (separate, fused)."""

    name: str
    view: View


Names: TypeAlias = str | Seen | tuple[str | Seen, ...] | None


@dataclasses.dataclass(frozen=True)
class WeightName:
    """One line of a family's table.

    Attributes:
        target: attribute path of the layer and the parameter, such as "layers.{i}.attention.qkv:q.weight".
        hf, gguf: the stored name, or alternatives, of which the first one in the checkpoint is used; None for a format
            without the tensor. In a line with `{e}`, a name without `{e}` is one tensor with all experts.
        hf_view, gguf_view: view of the stored tensor, or of one expert of it, for names without their own view.
    """

    target: str
    hf: Names
    gguf: Names
    hf_view: View | None = None
    gguf_view: View | None = None

    @property
    def hf_names(self) -> tuple[str, ...]:
        """The names in safetensors files."""
        names = self.hf if isinstance(self.hf, tuple) else (self.hf,)
        return tuple(each.name if isinstance(each, Seen) else each for each in names if each is not None)


@dataclasses.dataclass(frozen=True)
class Line:
    """Line of a table for one layer, expert and format.

    Attributes:
        target: as in `WeightName`, with layer and expert numbers.
        names: stored names with layer numbers, each with its view; empty for a format without the tensor.
        expert: the expert's number, or None.
    """

    target: str
    names: tuple[tuple[str, View | None], ...]
    expert: int | None

    def find(self, tensors: Mapping[str, StoredTensor]) -> str | None:
        """Return the first name in `tensors`: the target (after ISQ or a merge, and in dummies), or a stored name.

        None without such a name, and for a format without the tensor.
        """
        names = (self.target, *self.spelled) if self.names else ()
        return next((name for name in names if name in tensors), None)

    def look(self, stored: StoredTensor, name: str, config: Counted) -> StoredTensor:
        """Apply the view of `name` to its stored tensor."""
        if name == self.target:
            return stored
        written, view = next(pair for pair, known in zip(self.names, self.spelled) if known == name)
        if self.expert is not None and written == name:
            stored = entry(stored, self.expert)
        return stored if view is None else view(stored, config)

    @property
    def first(self) -> str:
        """The first name, for messages."""
        return self.spelled[0]

    @property
    def spelled(self) -> tuple[str, ...]:
        """Names with layer and expert spelled out."""
        number = "{e}" if self.expert is None else str(self.expert)
        return tuple(name.replace("{e}", number) for name, _ in self.names)


def beside_gguf(table: Sequence[WeightName], config: Counted) -> Iterator[tuple[Line, Line]]:
    """Pair each safetensors line with its GGUF line; several tensors that are one in GGUF get the same GGUF line."""
    both = list(zip(expand(table, config, "safetensors"), expand(table, config, "gguf"), strict=True))
    wholes = {line.target: line for stored_line, line in both if line.names and not stored_line.names}
    for stored_line, line in both:
        yield stored_line, line if line.names else wholes.get(_PART.sub(":", line.target), line)


def check_weights(
    build: Callable[[], object],
    table: Sequence[WeightName],
    checkpoint: Checkpoint,
    config: Counted,
    *,
    ignored: Sequence[str] = (),
) -> None:
    """Compare the model of a config with the checkpoint, before memory is allocated.

    A config may claim any size. So `build` makes the model without memory (shapes only), and its shapes are compared:
    every parameter that is allocated later has a stored tensor of its shape. The other arguments are as for
    `load_weights`.

    Raises:
        WeightsError: as `load_weights`, or the config has more layers than the checkpoint has tensors.
    """
    if config.num_layers > len(checkpoint.tensors):
        raise WeightsError(
            f"{checkpoint.path}: the model's config asks for {config.num_layers} layers and there are only "
            f"{len(checkpoint.tensors)} tensors"
        )
    _match(build(), table, checkpoint, config, ignored)


def load_weights(
    model: object,
    table: Sequence[WeightName],
    checkpoint: Checkpoint,
    config: Counted,
    *,
    ignored: Sequence[str] = (),
    progress: Callable[[int, int], object] = lambda *_: None,
    cut: Cut | None = None,
) -> None:
    """Load every tensor of `checkpoint` into `model`, by the family's `table` of names; views get the `config`.

    Args:
        ignored: patterns of stored names that are not used (buffers in old checkpoints).
        progress: called with the loaded bytes and the total.
        cut: returns a rank's part of the tensor for a target; None loads whole tensors.

    Raises:
        WeightsError: names or shapes differ; the message lists them.
    """
    jobs = _match(model, table, checkpoint, config, ignored, cut)

    def run(job: _Job, number: int) -> str | None:
        stored, place, _ = job
        LOADED_PART.set(number)  # in this job's own context
        why = place.fill(stored)
        stored.release()
        return why

    done, total = 0, sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    decoded: dict[str, list[StoredTensor]] = {}
    left = Counter(path for _, _, path in jobs)
    context = copy_context()
    context.run(LOADING_THREADS.set, loading_threads())  # read from the system once
    with ThreadPoolExecutor(2) as pool:  # one thread dequantises while the other copies
        whys = pool.map(lambda job, number: context.copy().run(run, job, number), jobs, range(len(jobs)))
        for (stored, _, path), why in zip(jobs, whys):
            done += stored.nbytes
            progress(done, total)
            if why is not None:
                decoded.setdefault(why, []).append(stored)
            left[path] -= 1
            layer = layer_at(model, path)
            if not left[path] and isinstance(layer, Finishes):
                layer.finish()  # at once, so that later layers reuse memory that this frees
    for why, tensors in decoded.items():
        logger.warning(
            "%s: %d quantised tensors (%s ...) are decoded, which takes more memory: %s",
            *(checkpoint.path, len(tensors), tensors[0].name, why),
        )


def _match(
    model: object,
    table: Sequence[WeightName],
    checkpoint: Checkpoint,
    config: Counted,
    ignored: Sequence[str],
    cut: Cut | None = None,
) -> list[_Job]:
    """Assign tensors to parameters, layer by layer; raises `WeightsError` if names or shapes differ."""
    jobs: list[_Job] = []
    missing: list[str] = []
    misshapen: list[str] = []
    used: set[str] = set()
    find, order = finder(model), dict[str, int]()
    for line in expand(table, config, checkpoint.format):
        path = line.target.partition(":")[0]
        order.setdefault(path, len(order))
        place = find(line.target)
        if not line.names or place is None:
            continue
        name = line.find(checkpoint.tensors)
        if name is None:
            missing.append(line.first)
            continue
        used.add(name)
        stored = line.look(checkpoint.tensors[name], name, config)
        stored = stored if cut is None else cut(line.target, stored)
        if tuple(stored.shape) != place.shape:
            misshapen.append(
                f"tensor {name} has shape {list(stored.shape)}; the model's config asks for {list(place.shape)}"
            )
        jobs.append((stored, place, path))
    rest = (
        name
        for name, tensor in checkpoint.tensors.items()
        if name not in used and tensor.numel and not isinstance(tensor, Spare)
    )
    unexpected = [name for name in rest if not any(re.fullmatch(each, name) for each in ignored)]
    if missing or unexpected or misshapen:
        raise WeightsError(f"{checkpoint.path}: {_mismatch(list(dict.fromkeys(missing)), unexpected, misshapen)}")
    return sorted(jobs, key=lambda job: order[job[2]])


def expand(table: Iterable[WeightName], config: Counted, format: str = "safetensors") -> Iterator[Line]:
    """Expand a table's lines: `{i}` once for each layer, `{e}` once for each expert of the layer."""
    for line in table:
        names = line.hf if format == "safetensors" else line.gguf
        usual = line.hf_view if format == "safetensors" else line.gguf_view
        seen = [
            (name.name, name.view) if isinstance(name, Seen) else (name, usual)
            for name in (names if isinstance(names, tuple) else (names,))
            if name is not None
        ]
        for i in range(config.num_layers) if "{i}" in line.target else (0,):
            target, spelled = line.target.replace("{i}", str(i)), tuple((n.replace("{i}", str(i)), v) for n, v in seen)
            if "{e}" not in target:
                yield Line(target, spelled, None)
                continue
            for e in range(config.num_experts):
                yield Line(target.replace("{e}", str(e)), spelled, e)


def stored_lines(table: Iterable[WeightName], config: Counted, checkpoint: Checkpoint) -> Iterator[tuple[Line, str]]:
    """Yield the expanded lines that have a tensor in the checkpoint, each with the tensor's name."""
    for line in expand(table, config, checkpoint.format):
        if (name := line.find(checkpoint.tensors)) is not None:
            yield line, name


def parameters_of(model: object, table: Iterable[WeightName], config: Counted, format: str) -> Mapping[str, Parameter]:
    """Return the table's parameters that the model has, by their target."""
    find = finder(model)
    found = {line.target: find(line.target) for line in expand(table, config, format)}
    return {target: parameter for target, parameter in found.items() if parameter is not None}


def places(model: object) -> Callable[[str], bool]:
    """Return a predicate that tests whether the model has the parameter of a table line's target."""
    find = finder(model)
    return lambda target: find(target) is not None


def finder(model: object) -> Callable[[str], Parameter | None]:
    """Return a function that returns the model's parameter for a table line's target; None for an unknown target."""

    @functools.cache
    def parameters(path: str) -> Mapping[str, Parameter]:
        layer = layer_at(model, path)
        return {} if layer is None else layer.parameters()

    def find(target: str) -> Parameter | None:
        path, part = target.split(":")
        return parameters(path).get(part)

    return find


def layer_at(model: object, path: str) -> Loadable | None:
    """Return the layer at a path like "layers.3.attention.qkv"; None if the model has no such layer (a tied head)."""
    found: Any = model
    for name in path.split("."):
        part = found[int(name) : int(name) + 1] if name.isdigit() else [getattr(found, name, None)]
        found = part[0] if part else None
        if found is None:
            return None
    return found


def _mismatch(missing: list[str], unexpected: list[str], misshapen: list[str]) -> str:
    lines = []
    for what, names in (("missing", missing), ("unexpected", unexpected)):
        if names:
            lines.append(f"{what} tensors ({len(names)}): {', '.join(names[:_SHOWN])}{_more(names)}")
    if misshapen:
        lines.append(f"{'; '.join(misshapen[:_SHOWN])}{_more(misshapen)}")
    return "; ".join(lines)


def _more(names: list[str]) -> str:
    return f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
