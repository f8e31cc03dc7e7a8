"""Losses and hits of tokens, by scale: T tokens of a micro-batch, B samples of L tokens over K scales."""

from __future__ import annotations

import torch
from torch import Tensor

from star_dist.scales import ScaleSchedule


def by_scale(values_T: Tensor, schedule: ScaleSchedule, weights_B: Tensor | None = None) -> Tensor:
    """Sums over the tokens of each scale; (T,) -> (K,) float32."""
    values_BL = values_T.detach().float().unflatten(0, (-1, schedule.num_tokens))
    if weights_B is not None:
        values_BL = values_BL * weights_B[:, None]
    return torch.stack([part.sum() for part in values_BL.split(schedule.lengths, dim=1)])


def loss_report(
    schedule: ScaleSchedule, losses_K: Tensor, correct_K: Tensor, samples: float, group: str = ""
) -> dict[str, float]:
    """Mean loss and accuracy, in total and by scale, from sums over `samples` samples."""
    lengths = schedule.lengths
    losses, correct = losses_K.tolist(), correct_K.tolist()
    report = {
        f"{group}loss/total": sum(losses) / (samples * sum(lengths)),
        f"{group}accuracy/total": sum(correct) / (samples * sum(lengths)),
    }
    for side, length, loss, hits in zip(schedule.sides, lengths, losses, correct):
        report[f"{group}loss/scale_{side}"] = loss / (samples * length)
        report[f"{group}accuracy/scale_{side}"] = hits / (samples * length)
    return report


def scale_loss_weights(schedule: ScaleSchedule, power: float) -> list[float]:
    """Weight of every token of a picture, length**-power of its scale; they add up to the number of tokens."""
    factor = schedule.num_tokens / sum(length ** (1 - power) for length in schedule.lengths)
    return [factor * length**-power for length in schedule.lengths for _ in range(length)]
