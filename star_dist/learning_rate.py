"""The learning rate as a pure function of the step, for the transformer and for the tokenizer. Imports no torch."""

from __future__ import annotations

import math
from typing import Literal

RateSchedule = Literal["constant", "linear", "cosine"]


def learning_rate_fraction(
    step: int, total_steps: int, warmup_steps: int, schedule: RateSchedule, final_fraction: float
) -> float:
    """Rate of step `step` (from 0) over its peak: a linear rise, then `schedule` down to `final_fraction`."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    remaining = 1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return final_fraction + (1 - final_fraction) * remaining
