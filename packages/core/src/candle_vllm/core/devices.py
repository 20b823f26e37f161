# SPDX-License-Identifier: MIT
"""Choose the device that an engine computes on, or report why a GPU cannot be used (before step 1 of a request's life).

`choose_device` imports torch only if a GPU is requested, or if the setting is "auto" and a driver reports a GPU.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from candle_vllm.core.errors import ConfigError, NoMemoryError, with_extra

logger = logging.getLogger(__name__)

LEAST_CAPABILITY = (7, 5)  # minimum compute capability of NVIDIA's GPUs


class Device(str):
    """Device that an engine computes on: "cpu" or "cuda:N", in torch's spelling."""

    @property
    def type(self) -> str:
        """Type of the device without its number: "cpu" or "cuda"."""
        return self.partition(":")[0]


CPU: Final = Device("cpu")


def choose_device(wanted: str) -> Device:
    """Return the device for a setting: "auto", "cpu", "cuda" or "cuda:N"; the first of a list like "cuda:0,cuda:1".

    "auto" is the first GPU, or the CPU without a usable GPU; the reason why a GPU cannot be used is logged. Raises
    ConfigError if the GPU that was asked for cannot be used.
    """
    wanted = wanted.partition(",")[0]
    if wanted == "cpu" or (wanted == "auto" and not _driver_has_gpu()):
        return CPU
    index = int(wanted.partition(":")[2] or 0)
    obstacle = gpu_obstacle(index)
    if obstacle is None:
        return Device(f"cuda:{index}")
    if wanted != "auto":
        raise ConfigError(
            f"device {wanted!r} cannot be used: {obstacle}. To compute on the CPU, set device='cpu'", "device"
        )
    logger.warning("a GPU was found but cannot be used, so the CPU is used: %s", obstacle)
    return CPU


def means_gpus(wanted: str) -> bool:
    """Whether a setting means GPUs: it names one, or is "auto" and a driver reports a GPU. Does not import torch."""
    return wanted.startswith("cuda") or (wanted == "auto" and _driver_has_gpu())


def gpu_obstacle(index: int) -> str | None:
    """Return the reason why GPU number `index` cannot be used, in one sentence; None if it can be used."""
    if importlib.util.find_spec("torch") is None:
        amd = _nvidia_driver() is None and _AMD_DRIVER.exists()
        return f"torch is not installed: {'install one that was built for ROCm' if amd else with_extra('cuda')}"
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library that torch needs is missing
        return f"torch cannot be imported: {_first_line(error)}"
    if torch.version.cuda is None and torch.version.hip is None:
        return "this torch was built without CUDA, and without ROCm: install one that was built with either"
    try:
        count = torch.cuda.device_count()
        if count:
            torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return _driver_fault(str(error))
    if not count:
        return _driver_fault("")
    if index >= count:
        return "there is one GPU, cuda:0" if count == 1 else f"there are {count} GPUs, cuda:0 to cuda:{count - 1}"
    capability = torch.cuda.get_device_capability(index)
    if torch.version.hip is None and capability < LEAST_CAPABILITY:
        name = torch.cuda.get_device_name(index)
        return (
            f"{name} has compute capability {_dotted(capability)} and {_dotted(LEAST_CAPABILITY)} is needed: torch for "
            "CUDA 13 has no code for older GPUs"
        )
    if importlib.util.find_spec("triton") is None:
        return f"triton is not installed: {with_extra('cuda')}"
    return _no_compiler() or _taken(index)


def require_torch(reason: str, instead: str = "") -> None:
    """Raise ConfigError if torch is not installed; the message has the command that installs it.

    `reason` is why torch is needed, `instead` what the user can do instead of installing it, if there is something.
    """
    if importlib.util.find_spec("torch") is None:
        missing = "so layers run op by op in torch, which is not installed"
        raise ConfigError(f"{reason}, {missing}: {instead and f'{instead}, or install torch: '}{with_extra('torch')}")


def use_threads(count: int) -> None:
    """Set the number of threads that torch computes with in this process."""
    import torch

    torch.set_num_threads(count)


def leave_cores_to_others() -> None:
    """Limit torch to one thread, if it is imported: its thread pool would take the cores from other threads."""
    if "torch" in sys.modules:
        use_threads(1)


def is_amd() -> bool:
    """Whether torch was built for AMD's GPUs (ROCm)."""
    import torch

    return torch.version.hip is not None


def device_name(device: Device) -> str:
    """Return the device's name, so that data of one type of GPU is not used on another."""
    if device.type == "cpu":
        return "cpu"
    import torch

    return torch.cuda.get_device_name(device)


def gpu_memory(device: Device) -> tuple[int, int]:
    """Return the free bytes and all bytes of a GPU's memory."""
    import torch

    return torch.cuda.mem_get_info(device)


@contextmanager
def fitting(device: Device, what: str, size: int) -> Iterator[None]:
    """Raise NoMemoryError instead of torch's OutOfMemoryError within the context.

    `what` is allocated on the device, such as "the weights of NAME"; `size` are its bytes, as far as known.
    """
    if device.type == "cpu":
        yield
        return
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info(device)
        raise NoMemoryError(
            f"{what} take about {size >> 20} MiB and {device} has {total >> 20} MiB, of which {free >> 20} are left: "
            "use a model with fewer bits, another GPU (device='cuda:N') or device='cpu'",
            "device",
        ) from error


def give_back() -> None:
    """Return the GPU memory and pinned main memory that torch caches, so that other processes see it as free."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        getattr(torch.accelerator, "empty_host_cache", lambda: None)()  # not in the oldest supported torch


def _driver_fault(message: str) -> str:
    """Shorten torch's message about a driver that is missing or too old."""
    import torch

    if "too old" in message:
        return f"the NVIDIA driver is too old for torch {torch.__version__}: update it, or install an older torch"
    if "NVIDIA driver" in message or not message:
        return f"no GPU was found, or no {'NVIDIA' if torch.version.hip is None else 'AMD'} driver is installed"
    return f"{'CUDA' if torch.version.hip is None else 'ROCm'} cannot be initialised: {_first_line(message)}"


def _no_compiler() -> str | None:
    """Return why Triton cannot compile: it needs a C compiler and Python's header on this machine. None if it can.

    Triton builds its access to the driver with the compiler (version 3.6 also a launcher for each signature of a
    kernel) and caches the result. Neither is needed if the cache has this result, or for a Triton that builds nothing.
    """
    import torch

    spec, vendor = importlib.util.find_spec("triton"), "amd" if torch.version.hip else "nvidia"
    for folder in (spec and spec.submodule_search_locations) or ():
        driver = Path(folder, "backends", vendor, "driver.py")
        if driver.is_file() and "compile_module_from" not in driver.read_text(encoding="utf-8", errors="replace"):
            return None
    home = os.environ.get("TRITON_HOME") or Path.home()  # Triton's own settings, as Triton reads them
    kept = Path(os.environ.get("TRITON_CACHE_DIR") or Path(home, ".triton", "cache"))
    if any(kept.glob(f"*/*_utils{sysconfig.get_config_var('EXT_SUFFIX')}")):
        return None
    given = os.environ.get("CC")
    if shutil.which(given or "gcc") is None and (given or shutil.which("clang") is None):
        found = "CC names a compiler that does not exist" if given else "none was found"
        return f"triton needs a C compiler and {found}: install one (apt install gcc python3-dev), or set CC to it"
    scheme = sysconfig.get_default_scheme()
    scheme = "posix_prefix" if scheme == "posix_local" else scheme  # Debian's scheme, which has no headers
    header = Path(sysconfig.get_paths(scheme)["include"], "Python.h")
    if not header.is_file():
        return f"triton compiles C against Python and {header} is missing: install it (apt install python3-dev)"
    return None


def _taken(index: int) -> str | None:
    """Return why GPU number `index` is unusable: too little memory for a context, or no response; None if usable."""
    import torch

    try:
        free, total = torch.cuda.mem_get_info(index)
    except RuntimeError as error:
        return f"its memory is in use or it does not respond: {_first_line(error)}"
    if free < total // 50:
        return f"its memory is in use: {free >> 20} of {total >> 20} MB are free"
    return None


def _driver_has_gpu() -> bool:
    """Whether NVIDIA's driver reports a GPU or fails (the caller explains that), or else AMD's driver is loaded."""
    driver = _nvidia_driver()
    if driver is None:
        return _AMD_DRIVER.exists()
    count = ctypes.c_int()
    if driver.cuInit(0) in _NO_GPU:
        return False
    return driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value > 0


def _nvidia_driver() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None


_AMD_DRIVER = Path("/dev/kfd")
_NO_GPU = (34, 100)
"""CUDA_ERROR_STUB_LIBRARY and CUDA_ERROR_NO_DEVICE."""


def _first_line(message: object) -> str:
    return str(message).partition("\n")[0][:200]


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
