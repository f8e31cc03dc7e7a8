"""Every benchmark at its smallest: it runs, and what it writes for scripts has numbers where they belong."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from benchmarks.measure import peak_bytes
from star_dist.config import RunConfig, dump_config, load_config
from star_dist.model.block_functions import compiled_functions
from star_dist.model.flops import forward_flops
from star_dist.model.kernels.flash import FlashLibrary
from star_dist.model.kernels.sdpa import scaled_dot_product
from star_dist.scales import ScaleSchedule
from tests.ranks import run_script
from tests.s3 import S3Bucket

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parents[1] / "benchmarks"


def results(name: str, path: Path, *arguments: str) -> dict[str, Any]:
    """Runs a benchmark; what it wrote with --json."""
    found = run_script(FOLDER / f"{name}.py", *arguments, "--json", str(path))
    assert found.returncode == 0, found.stderr
    return json.loads(path.read_text())


@pytest.fixture
def small_config(run_config: Callable[..., RunConfig], tmp_path: Path) -> str:
    path = tmp_path / "config.json"
    path.write_text(dump_config(run_config(train={"steps": 40}, optimizer={"warmup_steps": 30})))
    return str(path)


def test_attention(tmp_path: Path) -> None:
    rows = results("attention", tmp_path / "out.json", "--quick")["attention"]
    assert {row["kernel"] for row in rows} >= {"dense mask", "sdpa"}
    assert all(row["forward_ms"] > 0 and row["forward_speedup"] > 0 for row in rows)


def test_every_kernel_of_a_gpu_adds_up_gradients_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    attention = importlib.import_module("attention")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    library = FlashLibrary("a library", scaled_dot_product, scaled_dot_product)
    monkeypatch.setattr(attention, "LIBRARIES", [lambda generation: library])
    found = {name: kernel for name, kernel, _ in attention.kernels(torch.device("cuda"), torch.bfloat16)}
    compiled = compiled_functions().sum_prefixes
    names = [name for name, kernel in found.items() if getattr(kernel, "sum_prefixes", None) is compiled]
    assert names == ["sdpa", "a library, per scale", "a library, leading gathered", "a library, gathered"]


def test_the_mask_counts_as_memory_of_a_dense_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    train_step = importlib.import_module("train_step")
    schedule, cpu = ScaleSchedule((1, 2, 4, 8)), torch.device("cpu")
    case = train_step.Case(1, 128, schedule, 1, torch.float32, "none", "none", 1)
    step = train_step.build_step(train_step.DenseStar, case, cpu)
    step()
    warm = peak_bytes(step, cpu)
    found = train_step.facts_of_step(step, case, cpu, 1e12, [1.0])["peak_gib"] * 2**30
    assert found - warm == pytest.approx(4 * schedule.num_tokens**2, rel=0.01)


def test_train_step_against_dense_with_a_profile(tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    options = ["--quick", "--against", "dense", "--profile", str(trace)]
    if shutil.which("g++"):
        options += ["--compile", "functions", "--compile", "blocks"]
    ours, *compiled, dense = results("train_step", tmp_path / "out.json", *options)["train_step"]
    assert len(compiled) == options.count("--compile")
    rounds = zip(dense["rounds_s"], ours["rounds_s"])
    assert ours["step"] == "star-dist" and ours["speedup"] == pytest.approx(
        median(theirs / own for theirs, own in rounds)
    )
    assert ours["memory_ratio"] < 1
    assert json.loads(trace.read_text())["traceEvents"]


def test_sample(tmp_path: Path) -> None:
    found = results("sample", tmp_path / "out.json", "--quick")
    (row,) = found["drawing"]
    assert len(found["scales"]) == 10 and row["batch"] == 1
    config = load_config(RunConfig, found["config"], ["model.depth=2"])
    flops = sum(sum(forward_flops(config.star_config(), config.schedule, tokens).values()) for tokens in (20, 2))
    assert row["flops_s"] * row["matmul_tflops"] == pytest.approx(flops / 1e12)  # the rate that the ratios are of


def test_tokenization(tmp_path: Path) -> None:
    found = results("tokenization", tmp_path / "out.json", "--quick")
    assert found["pictures"] == 8 and {row["source"] for row in found["tokenization"]} == {"webdataset", "folder"}


def test_loader_from_disk_and_from_s3(s3: S3Bucket, tmp_path: Path) -> None:
    found = results("loader", tmp_path / "out.json", "--quick", "--s3", f"{s3.url}/set")
    names = [row["what"] for row in found["loader"]]
    assert names[-2:] == ["star-dist, S3, cold cache", "star-dist, S3, warm cache"]
    assert all(row["samples_per_s"] > 0 for row in found["loader"])


def test_zero(small_config: str, tmp_path: Path) -> None:
    """Of a config whose warm-up is longer than the benchmark; a setting that fails costs the others nothing."""
    settings = ["ours=", "none such=train.zero_stage=9"]
    options = ["--steps", "20", "--ranks", "1", "--config", small_config]
    found = results("zero", tmp_path / "out.json", *options, *settings)
    ours, failed = found["zero"]
    assert found["ranks"] == 1 and ours["pictures/s"] > 0 and (ours["setting"], ours["of the first"]) == ("ours", 1)
    assert failed["setting"] == "none such" and "input should be 0, 1, 2 or 3, got 9" in failed["failed"]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("train_step", ["--model", "x30"]),
        ("train_step", ["--model", "d0"]),
        ("train_step", ["--accumulate", "0"]),
        ("loader", ["--workers", "-1"]),
        ("tokenization", ["--pictures", "-5"]),
        ("tokenization", ["--workers", "0"]),
        ("tokenization", ["--batch", "0"]),
        ("sample", ["--batches", "1,0"]),
        ("sample", ["--repeats", "0"]),
        ("zero", ["--ranks", "-1"]),
        ("zero", ["--steps", "19"]),
    ],
)
def test_a_wrong_option_is_one_line(name: str, options: list[str]) -> None:
    found = run_script(FOLDER / f"{name}.py", *options)
    assert found.returncode == 2
    said = found.stderr.splitlines()[-1]
    assert (
        f"error: argument {options[0]}: must be a whole number of at least" in said and "Traceback" not in found.stderr
    )
