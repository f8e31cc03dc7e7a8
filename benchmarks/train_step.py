"""One training step of the transformer: pictures/s, MFU, peak memory and where the time goes.

    python benchmarks/train_step.py [--quick] [--against dense] [--model d30] [--resolution 256] [--profile TRACE.json]
        [--json FILE] [NAME=VALUE …]

A step is forward, backward, clipping and fused AdamW on one device, on random tokens and 77-token captions; the trainer
reports the same numbers of a whole DeepSpeed run as throughput/ in metrics.jsonl. On a GPU: d16 and d30 in bf16 with
fp32 optimizer states at the three resolutions, with their configs' micro-batch, activation checkpointing and
train.compile, or the values given (train.micro_batch=32); on a CPU: d8 in float32 at 256 and 512. --against dense also
runs the step that a dense additive mask through SDPA and logits of the whole batch make of the same model; --compile
our step with train.compile, too. --accumulate N runs N micro-batches before the optimizer's step, as a run does whose
global batch is N times what its GPUs take at once. Peak memory is what a step holds beyond weights and optimizer
states. --profile writes a Chrome trace (chrome://tracing, Perfetto) and the table of the largest kernels.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from attention import CONFIGS, TEXT_TOKENS, DenseMaskKernel, additive_mask
from measure import (
    at_least,
    chosen_device,
    device_name,
    fill_with_noise,
    median_seconds,
    peak_bytes,
    print_table,
    profiled,
    write_json,
)
from torch import Tensor
from tqdm import tqdm

from star_dist.cli import command_parser, run_command
from star_dist.config import RunConfig, load_config
from star_dist.errors import UserError
from star_dist.model.activation_checkpointing import Checkpointing
from star_dist.model.attention import PackedAttention
from star_dist.model.block_functions import PLAIN, BlockFunctions, compiled_blocks, compiled_functions
from star_dist.model.chunked_loss import fast_float32_products
from star_dist.model.config import StarConfig
from star_dist.model.flops import training_flops
from star_dist.model.layout import PackedLayout
from star_dist.model.rope import Rotary, rotate
from star_dist.model.star import STAR
from star_dist.scales import ScaleSchedule
from star_dist.train.metrics import device_peak_flops

# Which part of the step an operator or kernel belongs to, by a piece of its name; the first that fits.
PARTS = {
    "optimizer": ("adam", "foreach"),  # first: FusedAdamMathFunctor has an "mm"
    "attention": ("attention", "flash", "fmha", "attn"),
    "matrix products": ("mm", "gemm", "cutlass", "nvjet", "linear"),  # nvjet: cuBLAS on Hopper
    "norms": ("layer_norm", "vector_norm", "linalg"),
    "loss": ("softmax", "nll_loss", "cross_entropy", "argmax"),
}


@dataclass
class Case:
    depth: int
    resolution: int
    schedule: ScaleSchedule
    batch: int
    dtype: torch.dtype
    checkpointing: Checkpointing
    compile: str
    accumulate: int  # micro-batches of a step


def rotate_and_normalize(x_THd: Tensor, rotary: Rotary | None, factor_H1: Tensor | None = None) -> Tensor:
    """As `qk_norm.rotate_and_normalize`, in single operations whose results autograd keeps."""
    result_THd = F.normalize(x_THd.float(), dim=-1)
    if factor_H1 is not None:
        result_THd = result_THd * factor_H1
    return (result_THd if rotary is None else rotate(result_THd, rotary)).to(x_THd.dtype)


class SingleOperations(BlockFunctions):
    def __init__(self) -> None:
        super().__init__(lambda function: function)
        self.rotate_and_normalize = rotate_and_normalize


class DenseStar(STAR):
    """What published trainers run: a dense additive mask, logits of the whole batch at once, single operations."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options, functions=SingleOperations())

    def forward(
        self, inputs_TC: Tensor, text_SW: Tensor, pooled_BW: Tensor, targets_T: Tensor, *, layout: PackedLayout
    ) -> tuple[Tensor, Tensor]:
        dtype, device = self.word_embed.weight.dtype, inputs_TC.device
        x_TD = self.word_embed(inputs_TC.to(dtype))
        x_TD = x_TD.index_copy(0, layout.first_tokens(device), self.start_token(pooled_BW.to(dtype)))
        x_TD = self.add_positions(x_TD, layout.scale_ids(device), layout.positions(device))
        context = PackedAttention(layout, DenseMaskKernel(), device)
        x_TD = self.run_blocks(x_TD, text_SW.to(dtype), self.rotary(layout.schedules, device), context)
        logits_TV = self.head_logits(x_TD)
        return F.cross_entropy(logits_TV, targets_T, reduction="none"), logits_TV.argmax(-1) == targets_T


Kind = Callable[..., STAR]
DENSE = "dense mask"
ROUNDS = "rounds_s"  # in the JSON alone


def our_kinds(case: Case, arguments: argparse.Namespace) -> dict[str, Kind]:
    """A STAR as the case's `train.compile` runs it, and as the values of --compile do, by name."""
    functions = {"none": lambda: PLAIN, "functions": compiled_functions, "blocks": compiled_blocks}
    return {
        "star-dist" + f", {compile} compiled" * (compile != "none"): partial(STAR, functions=functions[compile]())
        for compile in dict.fromkeys([case.compile, *(arguments.compile or [])])
    }


def build_step(kind: Kind, case: Case, device: torch.device) -> Callable[[], None]:
    """A closure that runs one step."""
    torch.manual_seed(0)
    config = StarConfig(depth=case.depth, scales=case.schedule.sides)
    with device:
        model = kind(config, checkpointing=case.checkpointing).to(case.dtype)
    fill_with_noise(model)
    masters = [p.detach().float().requires_grad_() for p in model.parameters()] if case.dtype != torch.float32 else None
    parameters = list(model.parameters())
    for master in masters or ():
        master.grad = torch.empty_like(master)
    optimizer = torch.optim.AdamW(masters or parameters, lr=1e-4, fused=True)
    layout = PackedLayout.uniform(case.schedule, case.batch, (TEXT_TOKENS,) * case.batch)
    inputs = torch.randn(layout.num_tokens, config.code_dim, device=device)
    text = torch.randn(TEXT_TOKENS * case.batch, config.text_width, device=device)
    pooled = torch.randn(case.batch, config.text_width, device=device)
    targets = torch.randint(config.vocab_size, (layout.num_tokens,), device=device)

    def step() -> None:
        with fast_float32_products(case.dtype, device):  # ours does it by itself, in the head
            for _ in range(case.accumulate):
                losses, _ = model(inputs, text, pooled, targets, layout=layout)
                (losses.mean() / case.accumulate).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        if masters is not None:
            with torch.no_grad():
                torch._foreach_copy_([master.grad for master in masters], [p.grad for p in parameters])
        optimizer.step()
        if masters is not None:
            with torch.no_grad():
                torch._foreach_copy_(parameters, masters)
        model.zero_grad(set_to_none=True)

    return step


def measure(
    kinds: dict[str, Kind], case: Case, device: torch.device, peak_flops: float, repeats: int
) -> list[dict[str, Any]]:
    """A row for each kind, by name. A CPU takes their steps in turns, because its speed changes by the minute."""
    facts = {"model": f"d{case.depth}", "resolution": case.resolution, "batch": case.batch}
    if case.accumulate > 1:
        facts["accumulated"] = case.accumulate
    rows: list[dict[str, Any]] = []
    for names in [list(kinds)] if device.type == "cpu" else [[name] for name in kinds]:
        try:
            found = take_turns([kinds[name] for name in names], case, device, peak_flops, repeats)
        except torch.OutOfMemoryError:
            found = [{"failed": "out of memory"} for _ in names]
        rows += [facts | {"step": name} | row for name, row in zip(names, found)]
    measured = [row for row in rows if "failed" not in row]
    for dense in [row for row in measured if row["step"] == DENSE]:
        for row in measured:
            row["speedup"] = median(theirs / ours for theirs, ours in zip(dense[ROUNDS], row[ROUNDS]))
            row["memory_ratio"] = row["peak_gib"] / dense["peak_gib"]
    return rows


def take_turns(
    kinds: list[Kind], case: Case, device: torch.device, peak_flops: float, repeats: int
) -> list[dict[str, Any]]:
    """What is measured of each kind; all of their memory is given back, also where it was short."""
    torch.compiler.reset()  # a case after another of other shapes would be compiled for all shapes
    steps = [build_step(kind, case, device) for kind in kinds]
    _, *rounds = [[median_seconds(step, device, 1, warmup=0) for step in steps] for _ in range(1 + repeats)]
    return [facts_of_step(step, case, device, peak_flops, list(of_step)) for step, of_step in zip(steps, zip(*rounds))]


def facts_of_step(
    step: Callable[[], None], case: Case, device: torch.device, peak_flops: float, seconds: list[float]
) -> dict[str, Any]:
    config = StarConfig(depth=case.depth, scales=case.schedule.sides)
    images = case.batch * case.accumulate
    flops = training_flops(config, case.schedule, TEXT_TOKENS) * images
    typical_s = median(seconds)
    additive_mask.cache_clear()  # a dense step then makes its mask again, which counts as its memory
    return {
        "images_per_s": images / typical_s,
        "tokens_per_s": images * case.schedule.num_tokens / typical_s,
        "step_s": typical_s,
        ROUNDS: seconds,
        "mfu": flops / typical_s / peak_flops,
        "peak_gib": peak_bytes(step, device) / 2**30,
    } | shares(step, device, typical_s)


def shares(step: Callable[[], None], device: torch.device, seconds: float) -> dict[str, float]:
    """Share of each part of the step in the time of all operators.

    On a GPU: of all kernels, and `% busy`, their time of the step's; what lacks to 100 the GPU waits for the host.
    """
    record = profiled(step, device)
    times: Counter[str] = Counter()
    for event in record.key_averages():
        spent = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        name = event.key.lower()
        times[next((part for part, pieces in PARTS.items() if any(p in name for p in pieces)), "other")] += spent
    total = sum(times.values())
    busy = {"% busy": 100 * total / 1e6 / seconds} if device.type == "cuda" else {}
    return busy | {f"% {part}": 100 * times[part] / total for part in (*PARTS, "other")}


def cases(device: torch.device, arguments: argparse.Namespace) -> list[Case]:
    found = []
    on_gpu, quick = device.type == "cuda", arguments.quick
    for resolution, name in CONFIGS.items():
        config = load_config(RunConfig, Path(__file__).parents[1] / "configs" / name, arguments.overrides)
        depths = (30,) if quick else (16, 30)
        batches = (config.train.micro_batch,)
        if not on_gpu:
            depths = (4,) if quick else (8,)
            batches = () if resolution > 512 else (1,) if quick or resolution > 256 else (1, 4)
        if arguments.model:
            depths = tuple(arguments.model)
        if arguments.resolution and resolution not in arguments.resolution:
            continue
        dtype = torch.bfloat16 if on_gpu else torch.float32
        settings = (dtype, config.train.activation_checkpointing, config.train.compile, arguments.accumulate)
        found += [Case(depth, resolution, config.schedule, batch, *settings) for depth in depths for batch in batches]
    return found[:1] if quick and not on_gpu else found


def depth(model: str) -> int:
    """Of a model by its name, such as d30."""
    return at_least(1)(model.removeprefix("d"))


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer and smaller cases, fewer repeats")
    parser.add_argument("--against", choices=["dense"], help="also measure the step with a dense mask")
    parser.add_argument(
        "--compile", action="append", choices=["functions", "blocks"], help="also measure so; may be repeated"
    )
    parser.add_argument(
        "--model", action="append", type=depth, metavar="dN", help="of this depth alone; may be repeated"
    )
    parser.add_argument("--resolution", action="append", type=int, choices=CONFIGS, help="alone; may be repeated")
    parser.add_argument(
        "--accumulate", type=at_least(1), default=1, metavar="N", help="micro-batches of a step (default 1)"
    )
    parser.add_argument("--profile", type=Path, metavar="TRACE", help="write a Chrome trace of the last case")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change values of the configs")
    arguments = parser.parse_args()
    device = chosen_device()
    peak, peak_source = device_peak_flops(device)
    repeats = 2 if arguments.quick else 5
    todo = cases(device, arguments)
    if not todo:
        raise UserError(f"--resolution {arguments.resolution[0]} is measured on a GPU alone; give 256 or 512")
    rows: list[dict[str, Any]] = []
    for case in tqdm(todo, desc="train step", unit="case"):
        kinds = our_kinds(case, arguments) | ({DENSE: DenseStar} if arguments.against else {})
        rows += measure(kinds, case, device, peak, repeats)
    title = f"Training step on {device_name(device)}; MFU of {peak / 1e12:.4g} TFLOP/s ({peak_source})"
    print_table(title, [{head: value for head, value in row.items() if head != ROUNDS} for row in rows])
    if arguments.profile is not None:
        *_, kind = our_kinds(todo[-1], arguments).values()
        step = build_step(kind, todo[-1], device)
        step()  # makes the optimizer's states
        record = profiled(step, device)
        record.export_chrome_trace(str(arguments.profile))
        order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
        print(record.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=100))
        print(f"trace written to {arguments.profile}")
    write_json(arguments.json, device, {"peak_tflops": peak / 1e12, "train_step": rows})


if __name__ == "__main__":
    run_command(main)
