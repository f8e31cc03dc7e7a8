"""Block-causal attention: every kernel of this machine at the three resolutions, against a dense mask through SDPA.

    python benchmarks/attention.py [--quick] [--json FILE]

Useful work counts visible pairs only (0.619, 0.652 and 0.638 of L^2): 4 FLOPs per pair and channel forward, 10
backward, where flash attention computes the scores again (as in the tables of the FlashAttention papers).
"square" is the same kernel without any mask on as many pairs: what the mask costs is the ratio to it. On a GPU times
are the kernels' alone, as in a training step whose host is ahead; wall_ms is forward and backward with the host. A
second table is of attention to text, captions of 77 tokens, where every image token sees its own caption.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measure import chosen_device, device_name, kernel_seconds, median_seconds, peak_bytes, print_table, write_json
from text_by_flex import TextByFlex
from torch import Tensor
from tqdm import tqdm

from star_dist.cli import command_parser, run_command
from star_dist.config import RunConfig, load_config
from star_dist.model.attention import PackedAttention, choose_kernel
from star_dist.model.block_functions import PLAIN, compiled_functions
from star_dist.model.kernels.base import Kernel, KernelUnavailable, TextAttention
from star_dist.model.kernels.flash import (
    GATHERED_TOKENS,
    LIBRARIES,
    FlashKernel,
    FlashLibrary,
    TextByVarlen,
    flash_attn_4,
)
from star_dist.model.kernels.flex import FlexKernel, has_flash_backend
from star_dist.model.kernels.reference import block_causal_mask
from star_dist.model.kernels.sdpa import SdpaKernel, scaled_dot_product
from star_dist.model.layout import PackedLayout
from star_dist.scales import ScaleSchedule
from star_dist.train.metrics import measured_matmul_flops

CONFIGS = {256: "d30.json", 512: "d30_512.json", 1024: "d30_1024.json"}
TEXT_TOKENS = 77
FORWARD_FLOPS, BACKWARD_FLOPS = 4, 10  # of each visible pair and channel


class DenseMaskKernel(SdpaKernel):
    """What published trainers do: one call with an additive L x L mask."""

    description = "dense mask"

    def block_causal(self, query_THd: Tensor, key_THd: Tensor, value_THd: Tensor, layout: PackedLayout) -> Tensor:
        (run,) = layout.runs
        query, key, value = (x.unflatten(0, (run.count, -1)) for x in (query_THd, key_THd, value_THd))
        mask = additive_mask(run.schedule, query.device, query.dtype)
        return scaled_dot_product(query, key, value, mask).flatten(0, 1)


@lru_cache(maxsize=1)
def additive_mask(schedule: ScaleSchedule, device: torch.device, dtype: torch.dtype) -> Tensor:
    """0 where a query sees a key, else -inf; (L, L). Such trainers keep it for the whole run."""
    visible = block_causal_mask(schedule, device)
    return torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill_(~visible, float("-inf"))


@dataclass
class Problem:
    """batch pictures of one schedule through attention layers of so many heads and channels."""

    resolution: int
    schedule: ScaleSchedule
    batch: int
    heads: int
    channels: int
    dtype: torch.dtype
    device: torch.device

    def inputs(self, tokens: int) -> list[Tensor]:
        shape = (tokens, self.heads, self.channels)
        query, key, value = torch.randn(3, *shape, device=self.device)
        return [
            x.to(self.dtype).requires_grad_() for x in (F.normalize(query, dim=-1), F.normalize(key, dim=-1), value)
        ]

    @property
    def pair_channels(self) -> int:
        return self.batch * self.schedule.visible_pairs * self.heads * self.channels


def kernels(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Kernel, FlashLibrary | None]]:
    """Every kernel of this machine: name, kernel, the library whose unmasked attention it is held against."""
    on_gpu = device.type == "cuda"
    sums = (compiled_functions() if on_gpu else PLAIN).sum_prefixes  # the same for all kernels
    yield "dense mask", DenseMaskKernel(), None
    yield "sdpa", SdpaKernel(sums), None
    if not on_gpu:
        yield "flex", choose_kernel("flex", device, dtype, training=False), None
        return
    generation = torch.cuda.get_device_capability(device)[0]
    for library in libraries(generation):
        for way, gathered in (("per scale", 0), ("leading gathered", GATHERED_TOKENS), ("gathered", 10**9)):
            yield f"{library.name}, {way}", FlashKernel(library, gathered, sums), library
    yield "flex, Triton", FlexKernel("TRITON", SdpaKernel()), None
    if has_flash_backend(generation):
        yield "flex, flash-attn 4", FlexKernel("FLASH", SdpaKernel()), flash_attn_4(generation)


def libraries(generation: int) -> Iterator[FlashLibrary]:
    """Those of this machine; says which are not."""
    for load in LIBRARIES:
        try:
            yield load(generation)
        except (ImportError, KernelUnavailable) as error:
            print(f"not measured: {load.__name__} ({error})")


def measure(problem: Problem, kernel: Kernel, backwards: bool, repeats: int) -> dict[str, Any]:
    """Seconds and memory of one layer's attention."""
    layout = PackedLayout.uniform(problem.schedule, problem.batch)
    attend = PackedAttention(layout, kernel, problem.device).attend_image
    return measure_call(attend, problem.inputs(layout.num_tokens), problem.pair_channels, backwards, repeats)


def measure_square(problem: Problem, library: FlashLibrary, repeats: int) -> dict[str, Any]:
    """The library's unmasked attention on squares of as many pairs."""
    side = round(math.sqrt(problem.schedule.visible_pairs))
    split = lambda x: x.unflatten(0, (problem.batch, side))
    dense = lambda q, k, v: library.dense(split(q), split(k), split(v)).flatten(0, 1)
    return measure_call(dense, problem.inputs(problem.batch * side), problem.pair_channels, True, repeats)


def text_kernels(device: torch.device) -> Iterator[tuple[str, TextAttention]]:
    """Every kernel of attention to text, by name. Flex has no backward pass on a CPU."""
    yield "sdpa, padded", SdpaKernel()
    if device.type == "cuda":
        generation = torch.cuda.get_device_capability(device)[0]
        for library in libraries(generation):
            yield library.name, TextByVarlen(library)
        yield "flex, Triton, padded", TextByFlex("TRITON")
        if has_flash_backend(generation):
            yield "flex, flash-attn 4, padded", TextByFlex("FLASH")


def measure_text(problem: Problem, kernel: TextAttention, repeats: int) -> dict[str, Any]:
    """Of one layer's attention to captions of `TEXT_TOKENS` tokens."""
    layout = PackedLayout.uniform(problem.schedule, problem.batch, (TEXT_TOKENS,) * problem.batch)
    text = kernel.prepare_text(layout, problem.device)
    query, *_ = problem.inputs(layout.num_tokens)
    _, key, value = problem.inputs(TEXT_TOKENS * problem.batch)
    cross = lambda query, key, value: kernel.cross(query, key, value, layout, text)
    return measure_call(cross, [query, key, value], TEXT_TOKENS * query.numel(), True, repeats)


def measure_call(
    attend: Callable[..., Tensor], inputs: list[Tensor], pair_channels: int, backwards: bool, repeats: int
) -> dict[str, Any]:
    """pair_channels: visible pairs times heads and channels."""
    device, work = inputs[0].device, pair_channels / 1e12
    gradient = torch.randn_like(inputs[0])

    def forward() -> Tensor:
        with torch.set_grad_enabled(backwards):
            return attend(*(inputs if backwards else [x.detach() for x in inputs]))

    def step() -> None:
        output = forward()
        if backwards:
            torch.autograd.grad(output, inputs, gradient)

    on_gpu = device.type == "cuda"
    seconds = kernel_seconds if on_gpu else median_seconds
    forward_s = seconds(forward, device, repeats)
    step_s = seconds(step, device, repeats) if backwards else None
    wall = {"wall_ms": 1e3 * median_seconds(step, device, repeats)} if on_gpu else {}
    return {
        "forward_ms": 1e3 * forward_s,
        "step_ms": None if step_s is None else 1e3 * step_s,
        "forward_tflops": FORWARD_FLOPS * work / forward_s,
        "step_tflops": None if step_s is None else (FORWARD_FLOPS + BACKWARD_FLOPS) * work / step_s,
        "peak_mib": peak_bytes(step, device) / 2**20,
    } | wall


@contextmanager
def noted_failure(row: dict[str, Any]) -> Iterator[None]:
    """Writes into the row why it lacks something, so that one kernel does not end the others' table."""
    try:
        yield
    except RuntimeError as error:  # out of memory and what the compiler raises are such
        row["failed"] = traceback.format_exception_only(error)[-1].strip().splitlines()[0][:100]


def problems(device: torch.device, quick: bool) -> list[Problem]:
    """On a GPU d30's layers at full batches; on a CPU few heads and single pictures."""
    on_gpu = device.type == "cuda"
    batches = {256: (8, 64), 512: (2, 16), 1024: (1, 4)} if on_gpu else {256: (1, 4), 512: (1,), 1024: (1,)}
    found = []
    for resolution, name in CONFIGS.items():
        config = load_config(RunConfig, Path(__file__).parents[1] / "configs" / name)
        heads = config.star_config().heads if on_gpu else 2
        dtype = torch.bfloat16 if on_gpu else torch.float32
        for batch in batches[resolution][:1] if quick else batches[resolution]:
            found.append(Problem(resolution, config.schedule, batch, heads, 64, dtype, device))
    return found[:1] if quick and not on_gpu else found


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="the smallest problem of each resolution, few repeats")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device = chosen_device()
    repeats = 3 if arguments.quick else 10
    todo = [
        (problem, *entry) for problem in problems(device, arguments.quick) for entry in kernels(device, problem.dtype)
    ]
    rows: list[dict[str, Any]] = []
    for problem, name, kernel, library in tqdm(todo, desc="attention", unit="case"):
        row = {"resolution": problem.resolution, "batch": problem.batch, "kernel": name}
        with noted_failure(row):
            row |= measure(problem, kernel, device.type == "cuda" or name != "flex", repeats)
            if isinstance(kernel, DenseMaskKernel):
                mask = additive_mask(problem.schedule, problem.device, problem.dtype)
                row["peak_mib"] += mask.numel() * mask.element_size() / 2**20
            if library is not None:
                square = measure_square(problem, library, repeats)
                row["of_square"] = square["step_ms"] / row["step_ms"]
        rows.append(row)
    for row in rows:
        dense = next(r for r in rows if (r["resolution"], r["batch"]) == (row["resolution"], row["batch"]))
        for kind in ("forward", "step"):
            if row.get(f"{kind}_ms") and dense.get(f"{kind}_ms"):
                row[f"{kind}_speedup"] = dense[f"{kind}_ms"] / row[f"{kind}_ms"]
    todo_text = [(problem, *entry) for problem in problems(device, arguments.quick) for entry in text_kernels(device)]
    text_rows: list[dict[str, Any]] = []
    for problem, name, kernel in tqdm(todo_text, desc="attention to text", unit="case"):
        row = {"resolution": problem.resolution, "batch": problem.batch, "kernel": name}
        with noted_failure(row):
            row |= measure_text(problem, kernel, repeats)
        text_rows.append(row)
    matmul = measured_matmul_flops(device, 8192 if device.type == "cuda" else 1024, dtype=problem.dtype)
    print_table(
        f"One layer's attention on {device_name(device)}; matrix products there: {matmul / 1e12:.4g} TFLOP/s "
        f"({str(problem.dtype).removeprefix('torch.')})",
        rows,
    )
    print_table(f"Attention to captions of {TEXT_TOKENS} tokens", text_rows)
    write_json(arguments.json, device, {"matmul_tflops": matmul / 1e12, "attention": rows, "text": text_rows})


if __name__ == "__main__":
    run_command(main)
