"""Configurations of tokenizer trainings that take a second."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from star_dist.config import TokenizerTrainConfig, parse_config

MakeConfig = Callable[..., TokenizerTrainConfig]


@pytest.fixture
def make_config(pictures_folder: Path, tmp_path: Path) -> MakeConfig:
    """Configs of a training that takes a second; keyword arguments change single values or sections."""
    values = {
        "run_dir": str(tmp_path / "run"),
        "seed": 3,
        "resolution": 16,
        "tokenizer": {
            "vocab_size": 32,
            "code_dim": 4,
            "channels": 8,
            "channel_multipliers": [1, 2, 2],
            "blocks_per_level": 1,
            "norm_groups": 2,
            "scales": [1, 2, 4],
        },
        "data": {"pictures": str(pictures_folder), "num_workers": 0, "keep_in_memory": True},
        "steps": 6,
        "global_batch": 4,
        "learning_rate": 3e-3,
        "muon_learning_rate": 0.02,
        "warmup_steps": 2,
        "restart_codes_every": 2,
        "checkpoint_every": 2,
        "log_every": 1,
        "sample_pictures": 5,
    }

    def make(**changes: Any) -> TokenizerTrainConfig:
        merged = dict(values)
        for name, change in changes.items():
            merged[name] = {**values.get(name, {}), **change} if isinstance(change, dict) else change
        return parse_config(TokenizerTrainConfig, merged)

    return make
