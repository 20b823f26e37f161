# SPDX-License-Identifier: MIT
"""Precompiled kernels in the wheel, so that machines of a common CPU level need neither Numba nor time to compile.

    python -m candle_vllm.core.kernels.cpu_runtime.travelling

writes them to a folder beside the sources, for all of `level.LEVELS`. Each level is compiled in its own process, on a
machine of any level. Kernels that `functions` does not list are compiled at first use.
A kernel's file name contains a hash of the kernel's sources (`kernel_cache.sources`): after a change, the files of
kernels that depend on the changed module are no longer used, and the others still match. All kernels are compiled again
before wheels are built.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from candle_vllm.core.config import CACHE_TYPES
from candle_vllm.core.kernels.activation_quant import Prologue
from candle_vllm.core.kernels.activation_rows import FLOAT_FORMS, RowForm
from candle_vllm.core.kernels.attention.cpu_cache import CacheKind
from candle_vllm.core.kernels.attention.cpu_record import attend_isa
from candle_vllm.core.kernels.cpu_runtime import kernel_cache
from candle_vllm.core.kernels.cpu_runtime.level import LEVELS, Isa, Level, choose_level, host_level
from candle_vllm.core.kernels.cpu_runtime.operation import named_function
from candle_vllm.core.kernels.lora.layout import NumberForm
from candle_vllm.core.kernels.packed_linear.layout import PackedKind
from candle_vllm.core.kernels.plain_linear.layout import PlainKind
from candle_vllm.core.kernels.scaled_linear.layout import ScaledKind
from candle_vllm.core.kernels.weight_quant.searches import TYPES
from candle_vllm.core.quantization.ggml_types import GGMLQuantizationType

HEAD_DIMS = (32, 64, 80, 96, 128, 160, 192, 256, 512)
LATENT = ((64, 512), (0, 512))  # sizes of the rotary part and of the latent vector: DeepSeek, GLM-5.3-Flash
INDEX_KEY = 128  # elements of a key of DeepSeek's indexer
POOLS = (4, 16)  # positions of a group whose keys are pooled: GLM-5.3-Flash
_KINDS = [CacheKind.of(row.bits, row.minima, row.levels) for row in CACHE_TYPES.values() if row.device != "cuda"]
CACHES = [(k, v) for k in _KINDS for v in _KINDS if k == v or (k.bits == 8 and v.bits < 8)]
"""Kinds of (keys, values): equal kinds, or 8-bit keys with smaller values."""


def functions(isa: Isa) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Return the precompiled kernels for CPUs with these instructions, as arguments of `operation`."""
    for code in (
        "attention.cpu_choice:choose",
        "attention.cpu_choice:write_keys",
        "collectives.cpu:add_up",
        "collectives.cpu:stand_together",
        "column_order.cpu:column_order",
        "compressed_attention.cpu:write",
        "cpu_runtime.walk:do_parts",
        "cpu_runtime.walk:take_part",
        "delta_rule.cpu:keep",
        "delta_rule.cpu:prepare",
        "embedding.cpu:add",
        "lora.cpu_shrink:begin",
        "lora.cpu_tables:replace",
        "kv_write.cpu:measure",
        "moe.cpu:combine",
        "moe.cpu:experts",
        "moe.cpu:route",
        "ngram.cpu:gate_streams",
        "ngram.cpu:look_up",
        "position_scale.cpu:position_scale",
        "sampling.cpu:adjust",
        "sampling.cpu:draw_rows",
        "sampling.cpu:stand",
        "sampling.cpu_chain:narrow",
        "sampling.cpu_chain:repeats",
        "side_by_side.cpu:copy",
        "stream_mix.cpu:mix",
        "stream_mix.cpu:weigh",
        "whole_attention.cpu:lay_out",
    ):
        yield code, ()
    yield "attention.cpu_choice:make_score", (isa,)
    yield "whole_attention.cpu:make_attend_whole", (isa, 0)
    yield "whole_attention.cpu:make_attend_whole", (isa, 1)
    for prologue in Prologue:
        yield "activation_quant.cpu:make_quantise", (prologue, prologue.gated)
        for form in FLOAT_FORMS:
            yield "activation_quant.cpu:make_quantise", (prologue, prologue.gated, form.bytes)
        for form in RowForm:
            if form is not RowForm.I16 or isa & Isa.VNNI:  # at other levels F16 matrices take float32
                yield "activation_rows.cpu:make_rows", (prologue, prologue.gated, form, form.bytes)
    if isa & Isa.VNNI:
        yield "word_linear.cpu:make_linear", (isa,)
    for convolution in itertools.product((3, 4), (0, 1), (0, 1)):  # taps, SiLU, gates
        yield "short_conv.cpu:make_short_conv", convolution
    yield "short_conv.cpu:make_short_conv", (10, 1, 0)  # 4 taps, 3 tokens apart
    for kind in range(4):
        yield "scale_cap.cpu:make_scale_cap", (kind,)
    for gate in itertools.product(range(5), (0, 1)):
        yield "silu_mul.cpu:make_gated_rows", gate
    for scan in ((0, 0), (0, 2), (1, 0), (1, 1)):
        yield "delta_rule.cpu:make_scan", scan
    for flag in (0, 1):
        yield "compressed_attention.cpu:make_attend", (flag, isa)
        yield "compressed_attention.cpu:make_choose", (flag, isa)
        yield "compressed_attention.cpu:make_compress", (flag,)
        yield "rms_norm.cpu:make_head_norm", (flag,)
        yield "rms_norm.cpu:make_norm_onto", (flag,)
        yield "rotary.cpu:make_turn", (flag,)
        yield "latent_attention.cpu_heads:make_heads", (flag,)
        yield "latent_attention.cpu:make_choose", (INDEX_KEY, isa.bf16, flag)
    for keys, values in CACHES:
        yield "kv_write.cpu:make_rotate_and_write", (keys, values)
        for head_dim in filter(keys.fits, HEAD_DIMS):
            yield "attention.cpu:make_attend", (head_dim, attend_isa(isa, keys, values), keys, values, 0)
    for head_dim in HEAD_DIMS:
        for rotated in (0, 1):
            yield "attention.cpu:make_merge", (head_dim, rotated)
    for number_form in NumberForm:
        for name in (
            "cpu_shrink:make_shrink",
            "cpu_expand:make_expand",
            "cpu_experts:make_shrink",
            "cpu_experts:make_expand",
        ):
            yield f"lora.{name}", (number_form, isa)
    yield "latent_attention.cpu_write:make_prepare", (2,)
    for pool in POOLS:
        yield "latent_attention.cpu_pool:make_pool", (INDEX_KEY, pool)
    for form in FLOAT_FORMS:
        yield "lora.cpu_quantise:make_quantise", (form,)
        yield "lora.cpu_tables:make_lookup", (form,)
        yield "latent_attention.cpu_write:make_prepare", (form,)
        for rope, latent in LATENT:
            yield "latent_attention.cpu:make_attend", (rope, latent, form, isa.bf16)
            yield "latent_attention.cpu:make_merge", (latent, form)
    common = [kind for kind in PackedKind if kind.is_precompiled]
    for name, kinds in (("packed", common), ("plain", PlainKind), ("scaled", ScaledKind)):
        for kind in kinds:
            yield f"{name}_linear.cpu:make_linear", (kind, isa)
            if name != "scaled":
                yield f"{name}_linear.cpu:make_embedding", (kind,)
    for kind in common:
        for prologue in (Prologue.SILU, Prologue.GELU_GATE):
            yield "packed_linear.cpu_gated:make_gated", (kind, prologue, isa)
    for name in TYPES:
        yield "weight_quant.cpu:make_quantise", (GGMLQuantizationType[name],)


def keep_here(named: Sequence[str]) -> None:
    """Compile operations that this machine's cache lacks; each of `named` is "code,constant,..."."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    folder = kernel_cache.kernel_cache()
    for text in named:
        code, *constants = text.split(",")
        name, make = named_function(code, *map(int, constants))
        if folder is not None and kernel_cache.is_missing(name):
            kernel_cache.keep_kernel(folder, name, host_level(), kernel_cache.compile_image(make(), host_level()))


def _end_with_parent() -> None:
    """End the process at the end of its standard input, which closes when its parent ends."""
    while os.read(0, 64):
        pass
    os._exit(1)


def write(level: Level, folder: Path) -> None:
    """Write a level's kernels below `folder`, and delete others, in a process whose Numba compiles for that level.

    Raises:
        SystemExit: a kernel could not be written.
    """
    wanted = dict(named_function(code, *constants) for code, constants in functions(level.isa))
    into, folder = folder, folder / level.name
    folder.mkdir(parents=True, exist_ok=True)
    kernel_cache.keep_imports({code.partition(":")[0] for code, _ in functions(level.isa)}, into)
    for path in set(folder.iterdir()) - {folder / kernel_cache.kept_name(name, level) for name in wanted}:
        path.unlink()
    for number, (name, make) in enumerate(wanted.items(), 1):
        kernel_cache.keep_kernel(folder, name, level, kernel_cache.compile_image(make(), level))
        if not (folder / kernel_cache.kept_name(name, level)).exists():
            raise SystemExit(f"the kernel {name} was not written to {folder}")
        if number % 20 == 0 or number == len(wanted):
            sys.stderr.write(f"{level.name}: {number} of {len(wanted)} functions\n")


def main(given: Sequence[str] | None = None) -> None:
    """Write the code of all levels, or of the given ones."""
    parser = argparse.ArgumentParser(prog="travelling", description="precompile the CPU kernels for the wheel")
    parser.add_argument("levels", nargs="*", metavar="LEVEL", help=", ".join(level.name for level in LEVELS))
    parser.add_argument("--into", type=Path, default=kernel_cache.TRAVELLING, help="another folder than the package's")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # in this process, set up for one level
    parser.add_argument("--keep", nargs="+", help=argparse.SUPPRESS)  # operations of `operation.compile_first`
    parser.add_argument("--level", help=argparse.SUPPRESS)  # the level of the operations of --keep
    options = parser.parse_args(given)
    if options.keep:
        choose_level(options.level)
        keep_here(options.keep)
        return
    levels = [level for level in LEVELS if not options.levels or level.name in options.levels]
    if unknown := set(options.levels) - {level.name for level in levels}:
        parser.error(f"no level is called {', '.join(sorted(unknown))}")
    if options.here:
        write(levels[0], options.into)
        return
    for level in levels:
        program = [sys.executable, "-m", __spec__.name if __name__ == "__main__" else __name__]
        environment = {**os.environ, "NUMBA_CPU_NAME": level.cpu, "NUMBA_CPU_FEATURES": ""}
        subprocess.run([*program, "--here", "--into", options.into, level.name], env=environment, check=True)


if __name__ == "__main__":
    main()
