"""Block-causal attention as plain attention of each scale to its prefix: only visible pairs are computed, no mask.

Two exact ways, mixed at will. A scale can have a call of its own, on strided views of queries, keys and values. Or
leading scales share one variable-length call for the whole batch, with their prefixes gathered: fewer calls, but
copies of keys and values (all scales: 2.51, 2.09 and 2.32 times the keys at 256, 512 and 1024 pixels).

B samples of one run, L tokens of a sample, K scales, H heads, d channels of a head, G gathered keys of a sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from star_dist.model.kernels.base import join
from star_dist.model.layout import PackedLayout, copy_to_device
from star_dist.scales import ScaleSchedule

DenseAttention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(B, Lq, H, d), (B, Lk, H, d), (B, Lk, H, d), any strides but the last -> (B, Lq, H, d)."""

VarlenAttention = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int], Tensor]
"""Packed queries, keys and values, their int32 offsets (N + 1,), the longest query and key sequence -> (Tq, H, d)."""

Offsets = tuple[Tensor, Tensor, int, int]

SumPrefixes = Callable[[tuple[Tensor, ...]], Tensor]
"""Adds up tensors (B, end, H, d) of rising lengths, in float32; (B, L, H, d) in their own precision."""


def sum_prefixes(gradients: tuple[Tensor, ...]) -> Tensor:
    """Operation by operation, in one buffer."""
    dtype = gradients[-1].dtype
    total = gradients[-1].to(torch.promote_types(dtype, torch.float32), copy=True)
    for gradient in gradients[:-1]:
        total[:, : gradient.shape[1]] += gradient
    return total.to(dtype)


def sum_prefixes_for_compiler(gradients: tuple[Tensor, ...]) -> Tensor:
    """The same sum as the compiler makes one kernel of: every gradient is read once, and no sum is written in between.

    Of `sum_prefixes` it would make a chain in which every scale repeats what it does for all coarser ones.
    """
    dtype, longest = gradients[-1].dtype, gradients[-1].shape[1]
    precise = torch.promote_types(dtype, torch.float32)
    total = gradients[-1].to(precise)
    for gradient in gradients[:-1]:
        total = total + F.pad(gradient.to(precise), (0, 0, 0, 0, 0, longest - gradient.shape[1]))
    return total.to(dtype)


def attend_scale_by_scale(
    query_THd: Tensor,
    key_THd: Tensor,
    value_THd: Tensor,
    layout: PackedLayout,
    dense: DenseAttention,
    varlen: VarlenAttention | None = None,
    gathered_tokens: int = 0,
    sum_prefixes: SumPrefixes = sum_prefixes,
) -> Tensor:
    """Block-causal attention; (T, H, d).

    gathered_tokens: scales that end within the first so many tokens of a sample go through `varlen` together, the
    others through `dense` one by one; 0 gathers none.
    """
    parts = []  # of every run: queries, key prefixes and value prefixes by scale
    for run in layout.runs:
        query, key, value = (x[run.tokens].unflatten(0, (run.count, -1)) for x in (query_THd, key_THd, value_THd))
        leading = run.schedule.scales_within(gathered_tokens)
        lengths = run.schedule.lengths
        queries = query.split([sum(lengths[:leading]), *lengths[leading:]], dim=1)
        keys, values = (scale_prefixes(x, run.schedule, sum_prefixes) for x in (key, value))
        parts.append((leading, queries, keys, values))
    outputs = [
        [dense(q, k, v) for q, k, v in zip(queries[1:], keys[leading:], values[leading:])]
        for leading, queries, keys, values in parts
    ]
    if any(leading for leading, *_ in parts):
        offsets = gathered_offsets(layout.schedules, gathered_tokens, query_THd.device)
        counts = tuple(leading for leading, *_ in parts if leading)
        key = [prefix for leading, _, keys, _ in parts for prefix in keys[:leading]]
        value = [prefix for leading, _, _, values in parts for prefix in values[:leading]]
        query = join([queries[0].flatten(0, 1) for _, queries, _, _ in parts])
        mixed = _GatheredAttention.apply(varlen, offsets, counts, query, *key, *value)
        sizes = [queries[0].shape[:2].numel() for _, queries, _, _ in parts]
        for output, (_, queries, _, _), part in zip(outputs, parts, mixed.split(sizes)):
            output.insert(0, part.unflatten(0, queries[0].shape[:2]))
    return join([join(output, dim=1).flatten(0, 1) for output in outputs])


class _GatheredAttention(torch.autograd.Function):
    """One call over gathered prefixes: of every run, of every gathered scale, keys (B, end, H, d), then all values.

    It keeps its inputs alone, which are views of all keys and values. The backward pass gathers and attends again, so
    no copy waits for it, and activation checkpointing, which sees what a function saves, drops these views, too.
    """

    @staticmethod
    def forward(
        ctx: Any, varlen: VarlenAttention, offsets: Offsets, counts: tuple[int, ...], query: Tensor, *prefixes: Tensor
    ) -> Tensor:
        ctx.attend = partial(_attend_gathered, varlen, offsets, counts)
        ctx.save_for_backward(query, *prefixes)
        return ctx.attend(query, *prefixes)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            output = ctx.attend(*inputs)
        return None, None, None, *torch.autograd.grad(output, inputs, gradient)


def _attend_gathered(
    varlen: VarlenAttention, offsets: Offsets, counts: tuple[int, ...], query: Tensor, *prefixes: Tensor
) -> Tensor:
    half = len(prefixes) // 2
    return varlen(query, gather(prefixes[:half], counts), gather(prefixes[half:], counts), *offsets)


def gather(prefixes: Sequence[Tensor], counts: tuple[int, ...]) -> Tensor:
    """Prefixes as one packed tensor, sample by sample and scale by scale; (sum of B * G, H, d).

    counts: how many of them each run of samples has.
    """
    ends = list(accumulate(counts))
    runs = [prefixes[end - count : end] for end, count in zip(ends, counts)]
    return join([torch.cat(run, dim=1).flatten(0, 1) for run in runs])


@lru_cache(maxsize=32)
def gathered_offsets(schedules: tuple[ScaleSchedule, ...], gathered_tokens: int, device: torch.device) -> Offsets:
    """Where the gathered sequences of queries and keys start, (N + 1,) int32 each, and the longest of each."""
    queries, keys = [], []
    for schedule in schedules:
        leading = schedule.scales_within(gathered_tokens)
        queries += schedule.lengths[:leading]
        keys += schedule.ends[:leading]
    starts = [torch.tensor((0, *accumulate(lengths)), dtype=torch.int32) for lengths in (queries, keys)]
    return copy_to_device(starts[0], device), copy_to_device(starts[1], device), max(queries), max(keys)


def scale_prefixes(
    x_BLHd: Tensor, schedule: ScaleSchedule, sum_prefixes: SumPrefixes = sum_prefixes
) -> tuple[Tensor, ...]:
    """For every scale the view of what it sees, (B, end, H, d) each."""
    return ScalePrefixes.apply(x_BLHd, schedule.ends, sum_prefixes)


class ScalePrefixes(torch.autograd.Function):
    """Views of all prefixes, whose gradients are added up in float32.

    Slicing would make autograd pad each scale's gradient to full length and add those in the activations' precision.
    """

    @staticmethod
    def forward(ctx: Any, x_BLHd: Tensor, ends: tuple[int, ...], sum_prefixes: SumPrefixes) -> tuple[Tensor, ...]:
        ctx.sum_prefixes = sum_prefixes
        return tuple(x_BLHd[:, :end] for end in ends)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.sum_prefixes(gradients), None, None
