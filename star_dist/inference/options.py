"""How tokens are drawn: guidance, temperature, top-k, top-p and smoothing, each for all scales or scale by scale.

Imports no torch, so that commands check what was typed at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from star_dist.errors import UserError

INFINITY = float("inf")
SMALLEST_DIVISOR = 1e-6  # what is divided by less could overflow float32
BY_SCALE = ("top_k", "top_p", "temperature", "smoothing")


@dataclass(frozen=True)
class ScaleOptions:
    """What holds at one scale. guidance: the strength t of logits = (1 + t) conditional - t unconditional."""

    guidance: float = 0.0
    top_k: int = 0
    top_p: float = 0.0
    temperature: float = 1.0
    smoothing: float = 0.0


@dataclass(frozen=True)
class SamplingOptions:
    """One value for all scales, or a tuple with one for each scale, coarse to fine.

    guidance: 0 is off; it grows linearly over the scales, from 0 at the first to this value at the last (the published
    rule, tests/golden/README.md). guidance_by_scale: strengths of the scales, 0 for none, in place of that ramp.
    top_k: keep the k likeliest tokens; 0 is off, 1 is greedy. top_p: keep the likeliest tokens that together hold p;
    0 is off. temperature: divides the logits; 1e-6 or more. smoothing: 0 is off; else, from 1e-6 on, the code that goes
    on to the next scale and into the picture is a mixture of the kept codes, softmax((log p + Gumbel noise) /
    smoothing), whose largest weight is the drawn token's; VAR's demonstration pictures use 0.27 at the first scale down
    to 0.005.

    Raises:
        UserError: a value out of range.
    """

    guidance: float = 4.0
    top_k: int | tuple[int, ...] = 0
    top_p: float | tuple[float, ...] = 0.0
    temperature: float | tuple[float, ...] = 1.0
    smoothing: float | tuple[float, ...] = 0.0
    guidance_by_scale: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        checks: tuple[tuple[str, Sequence[float], Callable[[float], bool], str], ...] = (
            ("guidance", (self.guidance, *(self.guidance_by_scale or ())), lambda v: 0 <= v < INFINITY, "be 0 or more"),
            ("top_k", _values(self.top_k), lambda v: v >= 0, "be 0 or more"),
            ("top_p", _values(self.top_p), lambda v: 0 <= v <= 1, "lie in 0..1"),
            ("temperature", _values(self.temperature), lambda v: SMALLEST_DIVISOR <= v < INFINITY,
             f"be {SMALLEST_DIVISOR} or more (top_k 1 is greedy)"),
            ("smoothing", _values(self.smoothing), lambda v: v == 0 or SMALLEST_DIVISOR <= v < INFINITY,
             f"be 0 (off) or {SMALLEST_DIVISOR} or more"),
        )  # fmt: skip
        for name, values, holds, said in checks:
            for value in values:
                if not holds(value):
                    raise UserError(f"{name} must {said}, got {value}")

    def by_scale(self, num_scales: int) -> list[ScaleOptions]:
        """The options of every scale.

        Raises:
            UserError: an option has several values, but not as many as there are scales.
        """
        columns: dict[str, Sequence[Any]] = {}
        for name in BY_SCALE:
            values = _values(getattr(self, name))
            columns[name] = values * num_scales if len(values) == 1 else values
        if self.guidance_by_scale is not None:
            columns["guidance_by_scale"] = self.guidance_by_scale
        for name, values in columns.items():
            if len(values) != num_scales:
                one = "" if name == "guidance_by_scale" else "one value or "
                raise UserError(
                    f"{name} has {len(values)} values, the model has {num_scales} scales; give {one}{num_scales}"
                )
        ramp = [self.guidance * scale / max(num_scales - 1, 1) for scale in range(num_scales)]
        columns["guidance"] = columns.pop("guidance_by_scale", ramp)
        return [ScaleOptions(**dict(zip(columns, row))) for row in zip(*columns.values())]


def _values(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, Sequence) else (value,)
