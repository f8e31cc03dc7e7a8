"""Parameter groups and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from star_dist.config import OptimizerSection
from star_dist.learning_rate import learning_rate_fraction


def parameter_groups(named_parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Two named groups: matrices of the blocks and projections decay; biases, scales and embeddings do not.

    Every parameter is in exactly one group. Names decide, because under ZeRO-3 a parameter's own shape is empty.
    """
    groups = {
        "decay": {"name": "decay", "params": [], "weight_decay": weight_decay},
        "no_decay": {"name": "no_decay", "params": [], "weight_decay": 0.0},
    }
    for name, parameter in named_parameters:
        is_matrix = name.endswith(".weight") and not name.startswith(("lvl_embed", "pos_embed"))
        groups["decay" if is_matrix else "no_decay"]["params"].append(parameter)
    return list(groups.values())


class ClippedAdamW(torch.optim.AdamW):
    """AdamW that clips gradients, and skips an update of which one is not finite.

    DeepSpeed's engine asks for both by these names, as it does of its own optimizers.
    """

    def __init__(self, groups: list[dict[str, Any]], *, gradient_clipping: float, **options: Any) -> None:
        super().__init__(groups, **options)
        self.gradient_clipping = gradient_clipping
        self.overflow = False
        self._global_grad_norm = 0.0

    def step(self, closure: None = None) -> None:
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.gradient_clipping)
        self._global_grad_norm = norm.item()
        self.overflow = not math.isfinite(self._global_grad_norm)
        if not self.overflow:
            super().step(closure)


def build_optimizer(groups: list[dict[str, Any]], config: OptimizerSection, clips: bool = False) -> torch.optim.AdamW:
    """AdamW over the groups, in one fused kernel; `clips`: it clips gradients and checks them by itself."""
    options: dict[str, Any] = dict(lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True)
    if clips:
        return ClippedAdamW(groups, gradient_clipping=config.gradient_clipping, **options)
    return torch.optim.AdamW(groups, **options)


def learning_rate(config: OptimizerSection, step: int, total_steps: int) -> float:
    """Rate of optimizer step `step`, counted from 0 to total_steps - 1."""
    return config.learning_rate * learning_rate_fraction(
        step, total_steps, config.warmup_steps, config.schedule, config.final_fraction
    )
