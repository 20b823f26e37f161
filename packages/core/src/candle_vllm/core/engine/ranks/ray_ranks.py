# SPDX-License-Identifier: MIT
"""Ranks on the machines of a Ray cluster: Ray assigns their devices, and starts all ranks after the first.

Source: placement groups and actors of Ray, docs.ray.io.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import secrets
import time
from typing import Any

import msgspec

from candle_vllm.core.config import EngineConfig
from candle_vllm.core.engine.ranks.nodes import JOINING, Invitation, RankListener, share_of_threads, start_rank
from candle_vllm.core.errors import ConfigError, NotReadyError
from candle_vllm.core.shown import log_style

logger = logging.getLogger(__name__)

_NOTICE = 30.0  # seconds between two log lines about missing resources
_SETTING = "distributed_executor_backend"


class RankActor:
    """The Ray actor of a rank: it reserves a device, and starts the process of a rank after the first."""

    def device(self) -> str | None:
        """Return Ray's id of the actor's GPU; None without a GPU."""
        import ray

        found = ray.get_gpu_ids()
        return str(found[0]) if found else None

    def run(self, invitation: bytes, share: int) -> int:
        """Run the rank until it ends; return its exit status. `invitation` is JSON; the `share` ranks on this machine
        divide its cores unless the threads are set."""
        given = msgspec.json.decode(invitation, type=Invitation)
        if given.own["device"] == "cpu":
            given.own["threads"] = share_of_threads(given.own["threads"], share)
        with start_rank(given) as process:
            return process.wait()


class RayRanks:
    """A Ray placement group for the ranks of an engine; the first rank is on the machine of this process.

    Attributes:
        config: the first rank's configuration.
        listener: the listener to which the other ranks connect.

    Raises:
        ConfigError: Ray is not installed, has no cluster or resources, or assigned a GPU that this process cannot use.
    """

    def __init__(self, config: EngineConfig) -> None:
        ray = _connected()
        from ray.util.placement_group import placement_group, placement_group_table
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        self._ray, self._actors = ray, list[Any]()
        self.listener: RankListener | None = None
        gpu = config.device != "cpu"
        here = ray.get_runtime_context().get_node_id()
        bundles = [{"GPU": 1.0} if gpu else {"CPU": 1.0}] * config.ranks
        where = [{"ray.io/node-id": here}, *[{}] * (config.ranks - 1)]
        self._group = placement_group(bundles, "PACK", bundle_label_selector=where)
        try:
            self._wait(bundles)
            found: dict[int, str] = placement_group_table(self._group)["bundles_to_node_id"]
            # Ranks of one machine are consecutive, because they exchange most; the first rank's machine is first.
            order = sorted(found, key=lambda bundle: (bundle != 0, found[bundle] != here, found[bundle], bundle))
            on_each = [found[bundle] for bundle in order]
            actor: Any = ray.remote(RankActor)
            for bundle in order:
                strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=bundle)
                asked: dict[str, Any] = {"num_gpus": 1, "num_cpus": 0} if gpu else {"num_cpus": 1}
                self._actors.append(actor.options(**asked, scheduling_strategy=strategy, max_concurrency=2).remote())
            share = share_of_threads(config.threads, on_each.count(here))
            self.config = self._with_gpu(config) if gpu else dataclasses.replace(config, threads=share)
            key = secrets.token_hex(32)
            self.listener = RankListener(
                ray.util.get_node_ip_address(), 0, key, range(1, config.ranks), config.ranks, 1
            )
            logger.info("Ray has reserved resources for %d ranks on %d machines", config.ranks, len(set(on_each)))
            own = {"device": "cuda:0" if gpu else "cpu", "hf_token": config.hf_token, "threads": config.threads}
            own["prompt_cache_url"] = config.prompt_cache_url
            for rank in range(1, config.ranks):
                said = Invitation(self.listener.host, self.listener.port, key, rank, config.ranks, 1, own, log_style())
                self._actors[rank].run.remote(msgspec.json.encode(said), on_each.count(on_each[rank]))
        except BaseException:
            self.close()
            raise

    def _wait(self, bundles: list[dict[str, float]]) -> None:
        """Wait until the placement group is ready; machines may have to be started first."""
        until, ready = time.monotonic() + JOINING, self._group.ready()
        while not self._ray.wait([ready], timeout=min(_NOTICE, max(0.0, until - time.monotonic())))[0]:
            free = {name: self._ray.available_resources().get(name, 0.0) for name in bundles[0]}
            wanted = f"{len(bundles)} times {bundles[0]}, the first on this machine; the cluster has {free} free"
            if time.monotonic() > until:
                raise NotReadyError(f"Ray has no free resources for the ranks: it needs {wanted}", _SETTING)
            logger.info("waiting for free resources in the Ray cluster: %s", wanted)

    def _with_gpu(self, config: EngineConfig) -> EngineConfig:
        """Set the first rank's device to the GPU that Ray assigned, by its number in this process."""
        given = self._ray.get(self._actors[0].device.remote()).strip()
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        visible = [*map(str, range(1 << 10))] if seen is None else [name.strip() for name in seen.split(",")]
        if given not in visible:
            raise ConfigError(
                f"Ray gave the first rank GPU {given}, and this process sees {seen} (CUDA_VISIBLE_DEVICES): set that "
                "variable to the same value here and for `ray start`, or leave it out of both",
                _SETTING,
            )
        return dataclasses.replace(config, device=f"cuda:{visible.index(given)}")

    def close(self) -> None:
        """Close the listener, end the actors and their ranks, and free the placement group."""
        if self.listener is not None:
            self.listener.close()
        from ray.util.placement_group import remove_placement_group

        with contextlib.suppress(Exception):  # the cluster may have gone
            for each in self._actors:
                self._ray.kill(each)
            remove_placement_group(self._group)


def _connected() -> Any:
    """Connect to a Ray cluster, whose workers run in the machines' own environments; return the module `ray`."""
    # Otherwise Ray, in a process of `uv run`, would send its working directory to all machines and create an
    # environment there, which `--no-sync` forbids; then no rank would ever join.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    try:
        import ray
    except ImportError:
        raise ConfigError(
            'Ray is not installed: `pip install "candle-vllm-core[ray]"`, on every machine of the cluster', _SETTING
        ) from None
    if not ray.is_initialized():
        try:
            ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), logging_level=logging.WARNING)
        except (ConnectionError, ValueError) as error:
            raise NotReadyError(
                "there is no Ray cluster here: `ray start --head` starts one, `ray start --address=HOST:6379` on the "
                f"other machines joins it, and RAY_ADDRESS says where it is ({error})",
                _SETTING,
            ) from None
    return ray
