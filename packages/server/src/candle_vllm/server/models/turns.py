"""A turn: one request's claim on a model that is loaded and has a place for it.

Between steps 1 and 2 of a request's life: by the name in `model` to the manager, which may have to load it, and by the
request's API key into the model's queue. Released when the answer is complete, or the client has gone.
"""

from __future__ import annotations

from dataclasses import dataclass

from candle_vllm.server.models.admission import Place, RetiredError
from candle_vllm.server.models.manager import ModelManager
from candle_vllm.server.models.slot import Lease, ServedModel


@dataclass
class Turn:
    """The right to use a model now; `release` gives it back, once."""

    lease: Lease
    place: Place

    @property
    def model(self) -> ServedModel:
        """The model."""
        return self.lease.model

    def release(self) -> None:
        """The request is over."""
        self.place.leave()
        self.lease.release()


async def take_turn(
    manager: ModelManager, name: str | None, key: str, *, sequences: int = 1, priority: int = 0
) -> Turn:
    """Waits for a model and for a place in it. Cancelling it gives the wait up.

    Args:
        manager: knows the models.
        name: what the request calls its model.
        key: whose request it is; "" without API keys.
        sequences: how many it makes.
        priority: lower ones go first, where the operator lets requests go before others.

    Raises:
        ModelNotServedError, HttpError, EngineDeadError: as `ModelManager.acquire` and `Admission.enter`.
    """
    while True:
        lease = await manager.acquire(name)
        try:
            allowed = lease.model.entry.settings.enable_request_priority
            place = await lease.model.admission.enter(key, sequences, priority if allowed else 0)
        except RetiredError:  # its engine has died, or had to go: it is waited for again
            lease.release()
        except BaseException:
            lease.release()
            raise
        else:
            return Turn(lease, place)
