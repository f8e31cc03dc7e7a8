"""From a sharded ZeRO checkpoint to an inference folder."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from star_dist.config import RunConfig, load_config
from star_dist.data.schema import METADATA_FILE, read_metadata
from star_dist.errors import UserError
from star_dist.export import ExportConfig, check_replaceable, write_inference_folder
from star_dist.files import read_json_lines
from star_dist.model.star import STAR
from star_dist.model_card import ModelFacts
from star_dist.public_layout import check_weights
from star_dist.run_folder import METRICS_FILE
from star_dist.tokenizer.io import load_tokenizer, tokenizer_hash
from star_dist.train.checkpoint import Checkpoint, CheckpointFolder, check_same_tokenizer
from star_dist.train.shards import ShardReader

# What a reader of a model card asks of a training, and nothing that names hosts, users or buckets.
CARD_SECTIONS = ("train", "optimizer", "model")
CARD_METRICS = ("loss/total", "accuracy/total", "validation/loss/total", "validation/accuracy/total")


def export_checkpoint(
    run: Path, out: Path, step: int | None, dtype: Literal["bf16", "fp32"], licence: str | None = None
) -> int:
    """Writes the inference folder of a run's checkpoint; returns the exported step. licence: for the model card.

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
    tokenizer = load_tokenizer(Path(config.tokenizer.path))
    check_same_tokenizer(checkpoint, tokenizer_hash(tokenizer))
    export = ExportConfig(
        model=config.star_config(),
        text=config.text,
        tokenizer_hash=tokenizer_hash(tokenizer),
        resolution=config.resolution,
        dtype=dtype,
        run_name=config.name,
        step=checkpoint.step,
        facts=run_facts(run, config, checkpoint.step, licence),
    )
    write_inference_folder(out, checkpoint_weights(checkpoint, config), export, tokenizer)
    return checkpoint.step


def checkpoint_weights(checkpoint: Checkpoint, config: RunConfig) -> dict[str, Tensor]:
    """All weights of a checkpoint in fp32, by name, whatever its ZeRO stage and number of ranks."""
    with torch.device("meta"):
        model = STAR(config.star_config(), config.model.attention)
    with ShardReader(checkpoint) as reader:
        weights = dict(reader.weights())
    return check_weights(weights, model, checkpoint.path)


def run_facts(run: Path, config: RunConfig, step: int, licence: str | None) -> ModelFacts:
    """What the run folder and the data set's own metadata say about the training."""
    options = json.loads(config.model_dump_json(include=set(CARD_SECTIONS)))
    training = {f"{section}.{name}": value for section in CARD_SECTIONS for name, value in options[section].items()}
    training = {name: value for name, value in training.items() if value is not None and name != "train.init_from"}
    folders = [Path(source.local) for source in config.data.all_sources]
    known = [read_metadata(folder) for folder in folders if (folder / METADATA_FILE).is_file()]
    samples: Counter[str] = Counter()
    for metadata in known:
        samples.update(metadata.splits)
    return ModelFacts(
        source=f"training run {config.name}",
        licence=licence,
        dataset=", ".join(folder.name for folder in folders),
        samples=dict(samples),
        attribution="\n\n".join(dict.fromkeys(filter(None, (metadata.attribution for metadata in known)))),
        training=training | {"pictures seen": step * config.train.global_batch},
        metrics=_last_metrics(run / METRICS_FILE, step),
        versions=_read_environment(run / "environment.json"),
    )


def _read_environment(path: Path) -> dict[str, str | None]:
    try:
        values = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return {}  # a run folder without it can be exported all the same
    return values.get("packages", {}) | {"python": values.get("python"), "git commit": values.get("git_commit")}


def _last_metrics(path: Path, step: int) -> dict[str, float]:
    """The last value of each of `CARD_METRICS` up to a step."""
    metrics: dict[str, float] = {}
    for report in read_json_lines(path):
        if report["step"] <= step:
            metrics |= {name: report[name] for name in CARD_METRICS if report.get(name) is not None}
    return metrics
