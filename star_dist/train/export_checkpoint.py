"""From a sharded ZeRO checkpoint to an inference folder."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import torch
from torch import Tensor

from star_dist.config import DataSection, DataSource, RunConfig, load_config
from star_dist.data.fetch import read_remote_metadata
from star_dist.data.schema import METADATA_FILE, DatasetMetadata, read_metadata
from star_dist.errors import UserError
from star_dist.export import (
    ExportConfig,
    check_replaceable,
    fetch_inference_folder,
    read_export_config,
    write_inference_folder,
)
from star_dist.files import read_json_lines
from star_dist.model.star import STAR
from star_dist.model_card import ModelFacts
from star_dist.object_store import is_s3
from star_dist.public_layout import check_weights
from star_dist.run_folder import METRICS_FILE, is_export
from star_dist.tokenizer.io import load_tokenizer, tokenizer_hash
from star_dist.train.checkpoint import Checkpoint, CheckpointFolder, check_same_tokenizer
from star_dist.train.shards import ShardReader

logger = logging.getLogger(__name__)

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
    if is_export(run):
        raise UserError(f"{run} is an export already; name the folder of a run")
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
    return check_weights(ShardReader(checkpoint).weights(), model, checkpoint.path)


def run_facts(run: Path, config: RunConfig, step: int, licence: str | None) -> ModelFacts:
    """What the run folder and the data sets' own metadata say about the training.

    Data sets, and an earlier model that the run began with, which cannot be read are named in a warning.
    """
    options = json.loads(config.model_dump_json(include=set(CARD_SECTIONS)))
    training = {f"{section}.{name}": value for section in CARD_SECTIONS for name, value in options[section].items()}
    training = {name: value for name, value in training.items() if value is not None and name != "train.init_from"}
    known = list(filter(None, (_metadata(config.data, source) for source in config.data.all_sources)))
    samples: Counter[str] = Counter()
    for metadata in known:
        samples.update(metadata.splits)
    attributions = [_earlier_attribution(config.train.init_from), *(metadata.attribution for metadata in known)]
    return ModelFacts(
        source=f"training run {config.name}",
        licence=licence,
        dataset=", ".join(map(_public_name, config.data.all_sources)),
        samples=dict(samples),
        attribution="\n\n".join(dict.fromkeys(part for text in attributions for part in text.split("\n\n") if part)),
        training=training | {"pictures seen": step * config.train.global_batch},
        metrics=_last_metrics(run / METRICS_FILE, step),
        versions=_read_environment(run / "environment.json"),
    )


def _metadata(data: DataSection, source: DataSource) -> DatasetMetadata | None:
    """Of the local copy, which another node may not have, or of the remote."""
    try:
        if source.remote is None or (Path(source.local) / METADATA_FILE).is_file():
            return read_metadata(Path(source.local))
        return read_remote_metadata(data, source)
    except UserError as error:
        logger.warning("the model card says nothing of the pictures and the attribution of a data set: %s", error)
        return None


def _earlier_attribution(init_from: str | None) -> str:
    """What was to be said of the pictures that the run's first weights have learned from."""
    if init_from is None:
        return ""
    try:
        return read_export_config(fetch_inference_folder(init_from)).facts.attribution
    except UserError as error:
        logger.warning("the model card has no attribution of what train.init_from was trained on: %s", error)
        return ""


def _public_name(source: DataSource) -> str:
    """Of a data set, without bucket and without a machine's folders."""
    return urlsplit(source.place).path.strip("/") if is_s3(source.place) else Path(source.place).name


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
