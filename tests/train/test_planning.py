"""The planner's formulas against the real model: parameters, operator counts, measured peaks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.measure import peak_bytes
from star_dist.config import RunConfig, load_config
from star_dist.errors import UserError
from star_dist.model import size
from star_dist.model.attention import choose_kernel
from star_dist.model.block_functions import compiled_blocks
from star_dist.model.config import StarConfig
from star_dist.model.initialization import initialize_weights
from star_dist.model.kernels.base import KernelUnavailable
from star_dist.model.layout import PackedLayout
from star_dist.model.star import STAR
from star_dist.scales import ScaleSchedule
from star_dist.train import metrics
from star_dist.train.planning import (
    GPUS,
    at_stage,
    communication_bytes,
    largest_micro_batch,
    memory_bytes,
    plan,
    recommended_compile,
    recommended_zero_stage,
    state_bytes,
    usable_bytes,
)
from tests.ranks import run_script

ROOT = Path(__file__).parents[2]
SCHEDULE = ScaleSchedule((1, 2, 3, 4, 5, 6, 8, 10, 13, 16))


@pytest.mark.parametrize(
    "changes",
    [{}, {"depth": 30}, {"positions": "learned"}, {"cross_attention": False}, {"ffn_ratio": 3, "text_width": 384}],
)
def test_parameters_are_those_of_the_model(changes: dict) -> None:
    config = StarConfig(**{"depth": 3, "scales": SCHEDULE.sides} | changes)
    with torch.device("meta"):
        model = STAR(config)
    assert size.parameter_count(config) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize(
    ("depth", "batch", "dtype"), [(4, 1, torch.float32), (8, 1, torch.float32), (2, 2, torch.bfloat16)]
)
def test_activation_memory_is_within_a_tenth_of_the_measured_peak(
    depth: int, batch: int, dtype: torch.dtype, checkpointing: str
) -> None:
    """Measured: within 1 % in float32, 8 % in bf16."""
    config = StarConfig(depth=depth, scales=SCHEDULE.sides, text_width=64)
    layout = PackedLayout.uniform(SCHEDULE, batch, (8,) * batch)
    model = STAR(config, checkpointing=checkpointing).to(dtype)
    initialize_weights(model, seed=0)
    inputs = torch.randn(layout.num_tokens, 32), torch.randn(8 * batch, 64), torch.randn(batch, 64)
    targets = torch.zeros(layout.num_tokens, dtype=torch.long)

    def step() -> None:
        model(*inputs, targets, layout=layout)[0].mean().backward()

    with torch.no_grad():
        model(*inputs, targets, layout=layout)  # tables of positions are there then, and gradients
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    measured = peak_bytes(step, torch.device("cpu"))
    reckoned = sum(size.activation_bytes(config, layout.num_tokens, dtype.itemsize, checkpointing).values())
    assert reckoned == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(
    ("name", "batch", "checkpointing", "measured_gib"),
    [
        ("d30.json", 32, "none", 55.67),
        ("d30.json", 48, "none", 83.19),
        ("d30_512.json", 8, "none", 45.37),
        ("d30_512.json", 16, "none", 90.43),
        ("d30_1024.json", 4, "none", 95.08),
        ("d30_1024.json", 4, "selective", 54.31),
    ],
)
def test_activation_memory_is_what_an_h200_measured(
    name: str, batch: int, checkpointing: str, measured_gib: float
) -> None:
    """Of compiled blocks in bf16, 2026-11-28 (docs/performance.md)."""
    run = config(name)
    tokens = batch * run.schedule.num_tokens
    reckoned = sum(size.activation_bytes(run.star_config(), tokens, 2, checkpointing).values())
    assert reckoned / 2**30 == pytest.approx(measured_gib, rel=0.1)


def config(name: str, *overrides: str) -> RunConfig:
    return load_config(RunConfig, ROOT / "configs" / name, overrides)


def total(parts: dict[str, float]) -> float:
    return sum(parts.values())


def test_zero_stages_share_what_they_share() -> None:
    parameters = size.parameter_count(config("d30.json").star_config())
    for stage, parts in ((0, (1, 1, 1)), (1, (1, 1, 8)), (2, (1, 8, 8)), (3, (8, 8, 8))):
        state = state_bytes(config("d30.json", f"train.zero_stage={stage}"), 8)
        expected = [parameters * size / part for size, part in zip((2, 2, 12), parts)]
        assert list(state.values()) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("stage", "precision", "ranks", "measured"),
    [
        (0, "bf16", 1, 20.03),
        (0, "fp32", 1, 20.03),
        (1, "bf16", 1, 22.02),
        (1, "fp32", 1, 24.13),
        (2, "bf16", 1, 22.02),
        (3, "bf16", 1, 22.58),
        (3, "fp32", 1, 25.50),
        (1, "bf16", 2, 12.04),
        (1, "fp32", 2, 16.84),
        (2, "bf16", 2, 12.57),
        (3, "bf16", 2, 13.47),
    ],
)
def test_memory_is_what_deepspeed_took(stage: int, precision: str, ranks: int, measured: float) -> None:
    """Peak of a step in bytes per parameter, measured on gloo ranks with DeepSpeed 0.19.8 (2026-11-28): activations are
    small, so that at one rank the optimizer's step decides."""
    run = config(
        "d16.json",
        "model.depth=6",
        "text.width=64",
        f"train.global_batch={ranks}",
        "train.micro_batch=1",
        "train.activation_checkpointing=full",
        f"train.precision={precision}",
        f"train.zero_stage={stage}",
        "deepspeed.zero_optimization.reduce_bucket_size=4000000",
    )
    reckoned = total(memory_bytes(run, ranks, 1)) / size.parameter_count(run.star_config())
    assert reckoned == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_optimizers_step_counts_where_activations_are_small(stage: int) -> None:
    run = config("d30.json", f"train.zero_stage={stage}", "train.activation_checkpointing=full")
    assert "optimizer step" in memory_bytes(run, 1, 1)
    assert "optimizer step" not in memory_bytes(run, 1, 512)
    assert ("optimizer step" in memory_bytes(run, 64, 1)) == (stage == 0)  # where each GPU updates all weights
    if stage == 3:  # one part after the other
        smaller = config("d30.json", "deepspeed.zero_optimization.sub_group_size=1000000")
        assert "optimizer step" not in memory_bytes(smaller, 1, 1)
    if stage > 0:
        offloaded = config(
            "d30.json", f"train.zero_stage={stage}", "deepspeed.zero_optimization.offload_optimizer.device=cpu"
        )
        assert "optimizer step" not in memory_bytes(offloaded, 1, 1)


@pytest.mark.parametrize(("micro_batch", "counts"), [(16, (2, 3, 3, 3)), (8, (2, 3, 5, 6))])
def test_communication_by_zero_stage(micro_batch: int, counts: tuple[int, ...]) -> None:
    """In sizes of the weights that a step sends, of one and of two micro-batches; stages 0 to 2 as counted (gloo)."""
    parameter_bytes = 2 * size.parameter_count(config("d30.json").star_config()) * 63 / 64
    for stage, count in enumerate(counts):
        run = config("d30.json", f"train.zero_stage={stage}", f"train.micro_batch={micro_batch}")
        sent = communication_bytes(run, 64)
        assert sent == pytest.approx(count * parameter_bytes), stage


def test_what_is_not_on_the_gpu_is_not_counted() -> None:
    whole, kept = config("d30_1024.json"), config("d30_1024.json", "train.token_keep=0.5")
    share = kept.training_schedule.num_tokens / whole.schedule.num_tokens
    assert share == pytest.approx(6251 / 9451)
    reckoned, all_tokens = (memory_bytes(run, 8, 4)["activations"] for run in (kept, whole))
    assert reckoned == pytest.approx(share * all_tokens, rel=0.01)
    plans = [plan(run, 8, "h200", 8, 0.4, 1e8) for run in (kept, whole)]
    assert plans[0]["flops_per_picture"] < 0.6 * plans[1]["flops_per_picture"]
    assert plans[0]["storage_bytes_per_picture"] == plans[1]["storage_bytes_per_picture"]
    offloaded = state_bytes(config("d30.json", "deepspeed.zero_optimization.offload_optimizer.device=cpu"), 8)
    assert offloaded["optimizer"] == 0 < offloaded["parameters"]


def test_hpz_holds_the_weights_twice() -> None:
    """At stage 3, where DeepSpeed was seen to keep the second copy from the forward to the backward pass."""
    run = config("d30.json", "deepspeed.zero_optimization.zero_hpz_partition_size=8")
    weights = 2 * size.parameter_count(run.star_config())
    more = {stage: total(memory_bytes(at_stage(run, stage), 64, 1)) for stage in (2, 3)}
    for stage, copy in ((2, 0), (3, weights / 8)):
        assert more[stage] - total(memory_bytes(config("d30.json", f"train.zero_stage={stage}"), 64, 1)) == copy


@pytest.mark.parametrize("value", ["auto", "null", "true", "-1"])
@pytest.mark.parametrize(
    "name", ["reduce_bucket_size", "stage3_max_live_parameters", "sub_group_size", "zero_hpz_partition_size"]
)
def test_a_number_of_deepspeed_that_is_none_is_a_users_mistake(name: str, value: str) -> None:
    with pytest.raises(UserError, match=rf"zero_optimization\.{name}.* number .*{value}"):
        memory_bytes(config("d30.json", f"deepspeed.zero_optimization.{name}={value}"), 8, 16)


def test_the_largest_micro_batch_is_also_told_for_the_recommended_stage() -> None:
    """On two H200s stage 1 has no room for the micro-batch that stage 3 has."""
    found = plan(config("d30.json"), 2, "h200", 8, 0.4, 1e8)
    assert (found["zero_stage"], found["recommended_zero_stage"]) == (3, 1)
    assert (found["largest_micro_batch"], found["largest_micro_batch_there"]) == (64, 32)
    shown = run_script(ROOT / "launcher/plan.py", "--config", str(ROOT / "configs/d30.json"), "--gpus", "2")
    assert "largest micro-batch     64 at ZeRO stage 3, 32 at 1\n" in shown.stdout, shown.stderr


def test_the_largest_micro_batch_fits_and_the_next_does_not() -> None:
    for name, memory_gib in (("d30.json", 80), ("d30_512.json", 140), ("d30_1024.json", 140)):
        run = config(name)
        found = largest_micro_batch(run, 8, memory_gib)
        divisors = [n for n in range(1, run.train.global_batch // 8 + 1) if run.train.global_batch // 8 % n == 0]
        used = {n: sum(memory_bytes(run, 8, n).values()) for n in divisors}
        assert used[found] <= usable_bytes(memory_gib)
        assert all(used[n] > usable_bytes(memory_gib) for n in divisors if n > found)


def test_the_recommended_zero_stage_communicates_little_and_fits() -> None:
    run = config("d30.json")
    for gpus, memory_gib, stage in ((1, 140, 0), (8, 140, 1), (64, 140, 2), (8, 39, 2), (8, 38, 3), (8, 34, None)):
        assert recommended_zero_stage(run, gpus, memory_gib) == stage, (gpus, memory_gib)
    blocks = run.model_copy(update={"train": run.train.model_copy(update={"compile": "blocks"})})
    assert recommended_zero_stage(blocks, 8, 38) is None  # whole blocks are not compiled at stage 3
    in_fp32 = config("d30.json", "deepspeed.data_types.grad_accum_dtype=fp32")
    assert recommended_zero_stage(in_fp32, 8, 140) == 2  # which stages 0 and 1 cannot do


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("attention", ["sdpa", "flash"])
def test_blocks_are_recommended_only_where_a_training_takes_them(attention: str, checkpointing: str) -> None:
    change = f"train.activation_checkpointing={checkpointing}"
    found = recommended_compile(config("d30_1024.json", change, f"model.attention={attention}"), 1)
    assert found == ("functions" if checkpointing == "selective" else "blocks")
    if found == "functions":
        with pytest.raises(KernelUnavailable, match="set model.attention to flex .*train.compile to functions"):
            choose_kernel(
                attention,
                torch.device("cpu"),
                torch.bfloat16,
                training=True,
                functions=compiled_blocks(),
                checkpointing=checkpointing,
            )
    assert recommended_compile(config("d30_1024.json", change), 1) == "blocks"
    assert recommended_compile(config("d30_1024.json", "train.precision=fp32"), 1) == "functions"


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H200", GPUS["h200"].peak_tflops),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA H100 80GB HBM3", GPUS["h100"].peak_tflops),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H800", 989),
        ("NVIDIA H800 PCIe", 756),
        ("NVIDIA A800-SXM4-80GB", GPUS["a100-80"].peak_tflops),
        ("NVIDIA H20", 148),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA GB200", 2500),
        ("NVIDIA B200", GPUS["b200"].peak_tflops),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA Abacus", None),
    ],
)
def test_mfu_is_of_the_bf16_peak(name: str, tflops: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the data sheet, else measured in bf16 at a size that fills a GPU."""
    measured: list[tuple[int, torch.dtype]] = []

    def measure(device: torch.device, size: int = 1024, *, dtype: torch.dtype = torch.float32) -> float:
        measured.append((size, dtype))
        return 1e12

    monkeypatch.setattr(metrics, "measured_matmul_flops", measure)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    found, source = metrics.device_peak_flops(torch.device("cuda"))
    if tflops is None:
        assert (found, source, measured) == (1e12, "measured bf16 matrix product", [(8192, torch.bfloat16)])
    else:
        assert found == tflops * 1e12 and source.startswith("data sheet of ") and not measured


def test_a_matrix_product_is_two_operations_for_each_pair_of_numbers() -> None:
    clock = iter([0.0, 1.0]).__next__
    assert metrics.measured_matmul_flops(torch.device("cpu"), size=8, repeats=2, clock=clock) == 2 * 2 * 8**3


def test_the_command_prints_and_refuses() -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "launcher/plan.py", "--config", "configs/d30_512.json", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)

    shown = run("--gpus", "64", "--gpu", "h200")
    assert shown.returncode == 0 and "largest micro-batch" in shown.stdout and "GPU-hours" in shown.stdout
    assert "DOES NOT FIT" not in shown.stdout and "3; recommended: 2" in shown.stdout
    assert "none; recommended: blocks" in shown.stdout
    numbers = json.loads(run("--gpus", "64", "--json", "--pictures", "1e7").stdout)
    assert numbers["days"] == pytest.approx(1e7 / numbers["images_per_s"] / 86400)
    refused = run("--gpus", "8", "--pictures", "nan")
    assert refused.returncode == 2 and refused.stderr == "error: --pictures must be at least 1, got nan\n"
    refused = run("--gpus", "0")
    assert refused.returncode == 2 and refused.stderr == "error: --gpus must be at least 1, got 0\n"
    refused = run("--gpus", "7")
    assert refused.returncode == 2 and "is not a multiple of" in refused.stderr


@pytest.mark.parametrize(("gpus", "gb_per_s"), [(8, 450), (64, 50)])
def test_a_step_takes_the_longer_of_compute_and_communication(gpus: int, gb_per_s: float) -> None:
    run = config("d30.json")
    for mfu in (0.4, 1.0):
        found = plan(run, gpus, "h200", 8, mfu, 1e8)
        compute_s = run.train.global_batch * found["flops_per_picture"] / (gpus * 989e12 * mfu)
        sent_s = communication_bytes(run, gpus) / (gb_per_s * 1e9)
        assert found["step_s"] == pytest.approx(max(compute_s, sent_s)) and compute_s != sent_s
        assert found["gpu_hours"] == pytest.approx(24 * gpus * found["days"])
        assert found["days"] == pytest.approx(1e8 / run.train.global_batch * found["step_s"] / 86400)
