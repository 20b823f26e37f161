"""Which device an engine computes on, and why a GPU cannot be used; before step 1 of a request's life."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from candle_vllm.core.errors import ConfigError

logger = logging.getLogger(__name__)

LEAST_CAPABILITY = (8, 0)


def choose_device(wanted: str) -> torch.device:
    """The device for a setting: "auto", "cpu", "cuda" or "cuda:N".

    "auto" is the first GPU, or the CPU where there is none that can be used; a GPU that is there and cannot be used is
    logged with the reason.

    Raises:
        ConfigError: the GPU that was asked for cannot be used.
    """
    if wanted == "cpu":
        return torch.device("cpu")
    index = int(wanted.partition(":")[2] or 0)
    obstacle = gpu_obstacle(index)
    if obstacle is None:
        return torch.device("cuda", index)
    if wanted != "auto":
        raise ConfigError(
            f"device {wanted!r} cannot be used: {obstacle}. To compute on the CPU, set --device cpu", "device"
        )
    if _has_gpu():
        logger.warning("computing on the CPU: %s", obstacle)
    return torch.device("cpu")


def gpu_obstacle(index: int) -> str | None:
    """Why GPU number `index` cannot be used, in one sentence; None if it can."""
    if torch.version.cuda is None:
        return "this torch was built without CUDA: install one that was"
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
    if capability < LEAST_CAPABILITY:
        name = torch.cuda.get_device_name(index)
        return f"{name} has compute capability {_dotted(capability)} and {_dotted(LEAST_CAPABILITY)} is needed"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: install it"
    return _taken(index)


@contextmanager
def fitting(device: torch.device, what: str, size: int) -> Iterator[None]:
    """Names what did not fit where a GPU's memory ran out.

    Args:
        device: where memory is taken.
        what: what takes it, "the weights of NAME".
        size: its bytes, as far as known.

    Raises:
        ConfigError: instead of torch's OutOfMemoryError.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info(device)
        raise ConfigError(
            f"{what} take about {size >> 20} MiB and {device} has {total >> 20} MiB, of which {free >> 20} are left: "
            "take a model with fewer bits, another GPU (--device cuda:N) or --device cpu",
            "device",
        ) from error


def give_back() -> None:
    """Memory of GPUs that torch keeps for tensors to come goes back to the system, so that others see it as free."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _driver_fault(message: str) -> str:
    """What torch says of a driver that is missing or too old, in a few words."""
    if "too old" in message:
        return f"the NVIDIA driver is too old for torch {torch.__version__}: update it, or install an older torch"
    if "NVIDIA driver" in message or not message:
        return "no GPU was found, or no NVIDIA driver is installed"
    return f"CUDA does not start: {message.splitlines()[0]:.200}"


def _taken(index: int) -> str | None:
    """A context takes some hundred MB: a full GPU refuses even that."""
    try:
        free, total = torch.cuda.mem_get_info(index)
    except RuntimeError as error:
        return f"its memory is taken or it does not answer: {str(error).splitlines()[0]:.200}"
    if free < total // 50:
        return f"its memory is taken: {free >> 20} of {total >> 20} MB are free"
    return None


def _has_gpu() -> bool:
    """Whether a GPU is there, whatever stands against it."""
    try:
        return torch.version.cuda is not None and torch.cuda.device_count() > 0
    except (RuntimeError, AssertionError):
        return True


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
