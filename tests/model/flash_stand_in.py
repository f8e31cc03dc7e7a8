"""FlashAttention's two public functions on a CPU: the signature of flash-attn 2.8.3, its semantics, its demands.

Every argument is checked as the library's C++ code does (csrc/flash_attn/flash_api.cpp), and like the library it keeps
queries, keys, values, output and softmax statistics for the backward pass. `precise` lets float32 and float64 through,
for exact comparisons.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from star_dist.model.kernels.flash import FlashKernel, FlashLibrary, _flash_attn_library

HALF = (torch.float16, torch.bfloat16)


class Attention(torch.autograd.Function):
    """Segment by segment; offsets as Python lists."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, q_offsets: list, k_offsets: list) -> Tensor:
        output = _by_segment(query, key, value, q_offsets, k_offsets)
        statistics = query.new_zeros(query.shape[1], query.shape[0], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, statistics)
        ctx.offsets = q_offsets, k_offsets
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        query, key, value, _, _ = ctx.saved_tensors
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in (query, key, value)]
            output = _by_segment(*inputs, *ctx.offsets)
        return *torch.autograd.grad(output, inputs, gradient), None, None


def _by_segment(query: Tensor, key: Tensor, value: Tensor, q_offsets: list, k_offsets: list) -> Tensor:
    segments = []
    for q_start, q_end, k_start, k_end in zip(q_offsets, q_offsets[1:], k_offsets, k_offsets[1:]):
        dtype = torch.promote_types(query.dtype, torch.float32)
        q, k, v = (x.to(dtype) for x in (query[q_start:q_end], key[k_start:k_end], value[k_start:k_end]))
        segments.append(torch.einsum("hqk,khd->qhd", torch.einsum("qhd,khd->hqk", q, k).softmax(-1), v))
    return torch.cat(segments).to(query.dtype)


@dataclass
class StandIn:
    """calls: of every call so far, function, queries' and keys' shape. keys: weak references to the keys handed in."""

    precise: bool = False
    calls: list[tuple[str, tuple, tuple]] = field(default_factory=list)
    keys: list[weakref.ref] = field(default_factory=list)

    def library(self) -> FlashLibrary:
        return _flash_attn_library("stand-in", self.flash_attn_func, self.flash_attn_varlen_func)

    def kernel(self, gathered_tokens: int) -> FlashKernel:
        return FlashKernel(self.library(), gathered_tokens)

    def flash_attn_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
    ) -> Tensor:
        self._check(q, k, v, 4, softmax_scale, causal)
        assert q.shape[0] == k.shape[0], "batch sizes"
        self.calls.append(("dense", tuple(q.shape), tuple(k.shape)))
        offsets = [[i * x.shape[1] for i in range(x.shape[0] + 1)] for x in (q, k)]
        return Attention.apply(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), *offsets).view(q.shape)

    def flash_attn_varlen_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
        block_table: Tensor | None = None,
    ) -> Tensor:
        self._check(q, k, v, 3, softmax_scale, causal)
        for offsets, x, longest in ((cu_seqlens_q, q, max_seqlen_q), (cu_seqlens_k, k, max_seqlen_k)):
            assert offsets.dtype == torch.int32 and offsets.is_contiguous() and offsets.device == x.device
            assert isinstance(longest, int), "a tensor here would make the host wait for the device"
            lengths = offsets.diff()
            assert offsets[0] == 0 and offsets[-1] == x.shape[0], "offsets must cover the packed tokens"
            assert lengths.min() > 0 and lengths.max() == longest
        assert cu_seqlens_q.shape == cu_seqlens_k.shape
        self.calls.append(("varlen", tuple(q.shape), tuple(k.shape)))
        self.keys.append(weakref.ref(k))
        return Attention.apply(q, k, v, cu_seqlens_q.tolist(), cu_seqlens_k.tolist())

    def _check(self, q: Tensor, k: Tensor, v: Tensor, dimensions: int, softmax_scale: Any, causal: bool) -> None:
        assert softmax_scale == 1.0, "queries and keys are normalised"
        assert causal is False, "a scale sees its whole prefix"
        for x in (q, k, v):
            assert x.ndim == dimensions and x.stride(-1) == 1, "the last dimension must be contiguous"
            assert x.dtype == q.dtype and x.device == q.device
            assert self.precise or x.dtype in HALF, f"flash attention takes half precision, got {x.dtype}"
        assert k.shape == v.shape and q.shape[-2:] == k.shape[-2:]
        assert q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
