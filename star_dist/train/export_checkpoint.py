"""From a sharded ZeRO checkpoint to an inference folder."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from star_dist.config import RunConfig, load_config
from star_dist.errors import UserError
from star_dist.export import check_replaceable, check_weights, write_inference_folder
from star_dist.model.star import STAR
from star_dist.tokenizer.io import load_tokenizer, tokenizer_hash
from star_dist.train.checkpoint import Checkpoint, CheckpointFolder, check_same_tokenizer
from star_dist.train.shards import ShardReader


def export_checkpoint(run: Path, out: Path, step: int | None, dtype: Literal["bf16", "fp32"]) -> int:
    """Writes the inference folder of a run's checkpoint; returns the exported step.

    Raises:
        UserError: no run, no complete checkpoint, a damaged one, or an `out` that holds something else.
    """
    if not (run / "config.json").is_file():
        raise UserError(f"{run} is no run folder: it has no config.json")
    config = load_config(RunConfig, run / "config.json")
    check_replaceable(out)
    checkpoint = CheckpointFolder(run, config.checkpoint).find(step)
    if checkpoint is None:
        raise UserError(f"{run} has no complete checkpoint yet")
    check_same_tokenizer(checkpoint, tokenizer_hash(load_tokenizer(Path(config.tokenizer.path))))
    write_inference_folder(out, checkpoint_weights(checkpoint, config), config, checkpoint.step, dtype)
    return checkpoint.step


def checkpoint_weights(checkpoint: Checkpoint, config: RunConfig) -> dict[str, Tensor]:
    """All weights of a checkpoint in fp32, by name, whatever its ZeRO stage and number of ranks."""
    with torch.device("meta"):
        model = STAR(config.star_config(), config.model.attention)
    with ShardReader(checkpoint) as reader:
        weights = dict(reader.weights())
    return check_weights(weights, model, checkpoint.path)
