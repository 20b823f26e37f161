"""The literal way to draw tokens, in plain torch on any device: the reference of `cpu.py` (step 7 of ten).

Every step works on the whole vocabulary in float64, so that it can be checked by eye. Logits on an accelerator are
drawn this way until a kernel takes over; nothing here waits for the device.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

import torch

from candle_vllm.core.sampling.controls import Controls


def draw(logits: torch.Tensor, controls: Controls) -> torch.Tensor:
    """Draws one token per row: temperature, min_p, top_k, top_p, then the inverse of the cumulated distribution.

    The rules, which `cpu.py` shares:
      - weights are exp((logit - largest logit) / temperature), so that the largest is 1;
      - min_p keeps weights of at least `min_p`;
      - top_k keeps every logit that is at least the k-th largest, so ties at the k-th are all kept (as in vLLM);
      - top_p keeps, from the largest weight down and the lowest id first among equals, each token before which the
        kept mass is still below top_p of the whole (whole: what min_p and top_k left); the first is always kept;
      - the token is the first, in order of id, at which the cumulated kept weight exceeds uniform * kept mass. A token
        of weight 0 is never taken.

    Args:
        logits: [R, V] float32.
        controls: of the R rows.

    Returns:
        [R] int64. Rows without a finite largest logit get an arbitrary id; the caller reports them.
    """

    def column(values: object) -> torch.Tensor:
        return torch.as_tensor(values, device=logits.device).unsqueeze(1)

    largest = logits.amax(1, keepdim=True).double()
    weights = ((logits.double() - largest) / column(controls.temperature)).exp()  # [R, V]
    weights = weights.masked_fill(weights < column(controls.min_p), 0.0)
    top_k = int(controls.top_k.max())
    if top_k:
        place = column(controls.top_k)
        smallest = logits.topk(top_k, dim=1).values.gather(1, (place - 1).clamp(min=0))  # [R, 1]
        weights = weights.masked_fill((logits < smallest) & (place > 0), 0.0)
    if (controls.top_p < 1).any():
        falling, order = weights.sort(dim=1, descending=True, stable=True)
        before = falling.cumsum(1)
        limit = column(controls.top_p) * before[:, -1:]
        dropped = (before - falling >= limit) & (column(controls.top_p) < 1)
        dropped[:, 0] = False
        weights = weights.masked_fill(torch.zeros_like(dropped).scatter(1, order, dropped), 0.0)
    cumulated = weights.cumsum(1)
    target = column(controls.uniform) * cumulated[:, -1:]
    # Rounding may lift the target to the whole mass; the last token of weight above 0 is then the answer.
    last = (cumulated < cumulated[:, -1:]).sum(1)
    return torch.minimum((cumulated <= target).sum(1), last)
