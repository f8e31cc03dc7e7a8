"""Whole trainings on a real GPU in bf16, each in a process of its own, because CUDA cannot be forked."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from star_dist.config import RunConfig, dump_config
from tests.train.runs import metrics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: nothing can be trained on one"),
]
ROOT = Path(__file__).parents[2]
STAGES = {"stage 3": {"zero_stage": 3}, "stage 1, whole blocks": {"zero_stage": 1, "compile": "blocks"}}


def train_on_gpu(config: RunConfig, folder: Path) -> dict[str, int]:
    """Trains to the end; returns how often the host waited for the GPU, by place."""
    config_path, waits_path = folder / "config.json", folder / "waits.json"
    config_path.write_text(dump_config(config))
    command = [sys.executable, "-m", "tests.train.gpu_run", str(config_path), str(waits_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(waits_path.read_text())


@pytest.fixture
def gpu_config(run_config: Callable[..., RunConfig], tmp_path: Path) -> Callable[..., RunConfig]:
    """Makes configs of runs in bf16 with heads of 64 channels, as flash kernels want them."""

    def make(name: str, **sections: dict) -> RunConfig:
        train = {"precision": "bf16", "micro_batch": 4} | sections.pop("train", {})
        model = {"depth": 2, "width": 128, "heads": 2}
        return run_config(run_dir=str(tmp_path / name), model=model, train=train, **sections)

    return make


@pytest.mark.parametrize("stage", STAGES)
def test_the_host_waits_for_its_gpu_at_reports_alone(
    gpu_config: Callable[..., RunConfig], tmp_path: Path, stage: str
) -> None:
    """Twice as many steps between as many reports: not one wait more."""

    def waits(steps: int) -> dict[str, int]:
        config = gpu_config(
            f"{steps}", train=STAGES[stage] | {"steps": steps}, logging={"every": steps // 2}, checkpoint={"every": 100}
        )
        return train_on_gpu(config, tmp_path)

    few, many = waits(8), waits(16)
    assert few and many == few


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_on_a_gpu_learns_validates_draws_and_resumes(
    gpu_config: Callable[..., RunConfig], tmp_path: Path, stage: str
) -> None:
    sections = {
        "train": STAGES[stage] | {"steps": 60},
        "logging": {"every": 10},
        "validation": {"every": 30, "num_samples": 4},
        "samples": {"every": 30, "prompts": ["red heart"]},
    }
    config = gpu_config("run", checkpoint={"every": 30}, **sections)
    train_on_gpu(config, tmp_path)
    whole = metrics(config)
    losses = [values["loss/total"] for values in whole.values() if "loss/total" in values]
    assert all(map(math.isfinite, losses)) and losses[-1] < 0.8 * losses[0]
    assert whole[60]["validation/loss/total"] < whole[30]["validation/loss/total"]
    assert (Path(config.run_dir) / "samples" / "step_00000060.png").is_file()

    train_on_gpu(gpu_config("run", checkpoint={"every": 30, "resume_step": 30}, **sections), tmp_path)
    resumed = metrics(config)
    for step in (40, 50, 60):  # sums of gradients of one embedding have no fixed order on a GPU
        assert resumed[step]["loss/total"] == pytest.approx(whole[step]["loss/total"], rel=0.01)
