"""What the tests of training share: running one, and reading what it wrote."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from star_dist.config import RunConfig
from tests.ranks import Ranks, run_ranks

FACTS_OF_TIME = ("throughput/", "time/", "memory/")
STEP_TIMEOUT_S = 150


def train(config: RunConfig) -> None:
    """What a rank runs: everything after `launcher/train.py` has read its config."""
    from star_dist.process import prepare_process_environment
    from star_dist.train.run import train as train_run

    train_run(config, prepare_process_environment(config.train.omp_threads))


def train_on(config: RunConfig, world_size: int) -> dict[int, dict[str, float]]:
    """Trains to the end on gloo ranks; returns the metrics."""
    run_ranks(train, world_size, config)
    return metrics(config)


def start_training(config: RunConfig, world_size: int) -> Ranks:
    return Ranks(train, world_size, config)


def metrics(config: RunConfig) -> dict[int, dict[str, float]]:
    """Step -> what metrics.jsonl says of it, without measurements of time and memory."""
    by_step: dict[int, dict[str, float]] = {}
    path = Path(config.run_dir) / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.is_file() else ():
        values = json.loads(line)
        kept = {key: value for key, value in values.items() if not key.startswith(FACTS_OF_TIME)}
        by_step.setdefault(values["step"], {}).update(kept)
    return by_step


def last_step(config: RunConfig) -> int:
    """The last reported step of a run that may be writing just now; 0 before the first."""
    try:
        return max(metrics(config), default=0)
    except json.JSONDecodeError:  # a line that is being written
        return 0


def wait_for_step(config: RunConfig, step: int, alive: Callable[[], bool] = lambda: True) -> None:
    """Returns when a running training has reported a step; also when it has ended, or after STEP_TIMEOUT_S."""
    deadline = time.monotonic() + STEP_TIMEOUT_S
    while last_step(config) < step and alive() and time.monotonic() < deadline:
        time.sleep(0.01)


def weights(config: RunConfig) -> dict[str, torch.Tensor]:
    """fp32 weights of the newest checkpoint."""
    from star_dist.train.checkpoint import CheckpointFolder
    from star_dist.train.export_checkpoint import checkpoint_weights

    return checkpoint_weights(CheckpointFolder(Path(config.run_dir), config.checkpoint).find(None), config)
