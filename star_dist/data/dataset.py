"""Streaming of captioned token maps in an order that is a function of the step alone.

The position in the data is `step x global batch`: every epoch gives as many whole global batches as fit, and starting
at a step means skipping the samples of all earlier ones. Nothing about the loader has to be saved (the loader's own
counter is wrong for packed batches, deepspeed-notes.md).

B samples of a micro-batch, L tokens of a sample.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from streaming import StreamingDataset
from streaming.base.storage import CloudDownloader
from torch import Tensor
from torch.utils.data import DataLoader

from star_dist.config import DataSection, RunConfig
from star_dist.data.captions import choose_caption
from star_dist.data.schema import (
    EMPTY_CAPTION_FILE,
    METADATA_FILE,
    SHARD_HASH,
    DatasetMetadata,
    decode_captions,
    decode_features,
    decode_tokens,
    read_metadata,
)
from star_dist.errors import UserError
from star_dist.text import TextFeatures
from star_dist.weights import read_weights

SHARD_ADVICE = "check the remote, or remove the cache and start again"
WORKER_ERROR_PREFIX = f"{UserError.__module__}.{UserError.__qualname__}: "


@dataclass(frozen=True)
class MicroBatch:
    """sample_ids: of the data set, (B,). tokens_BL: int64. captions: text. features: stored per-caption features."""

    sample_ids: tuple[int, ...]
    tokens_BL: Tensor
    captions: tuple[str, ...]
    features: tuple[tuple[Tensor, Tensor], ...] | None

    def __len__(self) -> int:
        return len(self.sample_ids)


@dataclass(frozen=True)
class Samples:
    """A micro-batch before its captions are chosen: captions, and features where stored, of each sample by name."""

    sample_ids: tuple[int, ...]
    tokens_BL: Tensor
    captions: tuple[dict[str, str], ...]
    features: tuple[dict[str, tuple[Tensor, Tensor]], ...] | None

    def choose_captions(self, weights: Mapping[str, float], *, seed: int, step: int) -> MicroBatch:
        """Takes one caption of each sample (`choose_caption`)."""
        names = [
            choose_caption(captions, weights, seed=seed, step=step, sample_id=sample_id)
            for sample_id, captions in zip(self.sample_ids, self.captions)
        ]
        return MicroBatch(
            sample_ids=self.sample_ids,
            tokens_BL=self.tokens_BL,
            captions=tuple(captions[name] for captions, name in zip(self.captions, names)),
            features=self.features and tuple(features[name] for features, name in zip(self.features, names)),
        )


class CaptionedTokens(StreamingDataset):
    """One split of a data set; samples as dicts of `sample_id`, `tokens`, `captions` and optionally `features`.

    Raises:
        UserError: no such split, or a local shard that is missing or cut short.
    """

    def __init__(self, data: DataSection, split: str, metadata: DatasetMetadata, *, text_width: int, **options: Any):
        check_local_shards(data, split)
        super().__init__(
            remote=data.remote,
            local=data.local,
            split=split,
            cache_limit=data.cache_limit,
            download_timeout=data.download_timeout_s,
            download_retry=data.download_attempts,
            validate_hash=SHARD_HASH if data.remote is not None else None,
            **options,
        )
        self.metadata = metadata
        self.feature_width = text_width if data.text_features else None
        self.place = f"{data.remote or data.local}/{split}"
        self.failure: BaseException | None = None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Streams this rank's samples.

        Raises:
            UserError: a shard that cannot be downloaded, or whose bytes are not those that the index promises.
        """
        self.failure = None
        yield from super().__iter__()
        if self.failure is not None:
            reason = str(self.failure).strip().splitlines() or [type(self.failure).__name__]
            raise UserError(f"cannot read the data set at {self.place}: {reason[0]}; {SHARD_ADVICE}")

    def on_exception(self, future: Future) -> None:
        """Keeps what a download thread died of: the library would end the epoch early and say nothing."""
        if future.exception() is not None:
            self.failure = future.exception()
            self._event.set()

    def __getitem__(self, index: int) -> dict[str, Any]:
        stored = super().__getitem__(index)
        sample = {
            "sample_id": int(index),
            "tokens": decode_tokens(stored, self.metadata),
            "captions": decode_captions(stored, self.metadata),
        }
        if self.feature_width is not None:
            decoded = {name: decode_features(stored, name, self.feature_width) for name in sample["captions"]}
            sample["features"] = {name: tuple(map(torch.from_numpy, parts)) for name, parts in decoded.items()}
        return sample


def collate(samples: Sequence[dict[str, Any]]) -> Samples:
    """Stacks samples of one schedule."""
    return Samples(
        sample_ids=tuple(sample["sample_id"] for sample in samples),
        tokens_BL=torch.from_numpy(np.stack([sample["tokens"] for sample in samples])),
        captions=tuple(sample["captions"] for sample in samples),
        features=tuple(sample["features"] for sample in samples) if "features" in samples[0] else None,
    )


class TrainBatches:
    """This rank's micro-batches of the training split, from any step on.

    Raises:
        UserError: the split is smaller than one global batch.
    """

    def __init__(self, config: RunConfig, metadata: DatasetMetadata, world_size: int) -> None:
        data = config.data
        self.micro_batches_per_step = config.accumulation_steps(world_size)
        self.global_batch = config.train.global_batch
        self.seed = config.seed
        self.caption_weights = data.caption_weights
        self.num_canonical_nodes = data.num_canonical_nodes
        self.dataset = CaptionedTokens(
            data,
            data.train_split,
            metadata,
            text_width=config.text.width,
            batch_size=config.train.micro_batch,
            num_canonical_nodes=data.num_canonical_nodes,
            shuffle=data.shuffle,
            shuffle_algo=data.shuffle_algorithm,
            shuffle_seed=config.seed,
            shuffle_block_size=data.shuffle_block_size,
        )
        self.steps_per_epoch = self.dataset.epoch_size // self.global_batch
        if self.steps_per_epoch == 0:
            raise UserError(
                f"split {data.train_split!r} has {self.dataset.epoch_size} samples, fewer than one global batch; "
                f"train.global_batch is {self.global_batch}, make it smaller or add data"
            )
        self.loader = DataLoader(
            self.dataset,
            batch_size=config.train.micro_batch,
            num_workers=data.num_workers,
            prefetch_factor=data.prefetch_batches if data.num_workers else None,
            collate_fn=collate,
            drop_last=True,
            # A worker that waits for a shard whose download failed in another worker would wait for ever.
            timeout=data.batch_timeout_s if data.num_workers else 0,
        )

    def starting_at(self, step: int) -> Iterator[MicroBatch]:
        """Endless micro-batches, the first being this rank's first one of optimizer step `step` (counted from 0)."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        while True:
            self.dataset.load_state_dict(
                {
                    "epoch": epoch,
                    "sample_in_epoch": step_in_epoch * self.global_batch,
                    "num_canonical_nodes": self.num_canonical_nodes,
                    "shuffle_seed": self.seed,
                    "initial_physical_nodes": None,
                }
            )
            remaining = (self.steps_per_epoch - step_in_epoch) * self.micro_batches_per_step
            batches = iter(self.loader)
            for i in range(remaining):
                try:
                    samples = next(batches)
                except UserError as error:  # a loader worker sends it with its traceback before the message
                    raise UserError(str(error).strip().splitlines()[-1].removeprefix(WORKER_ERROR_PREFIX)) from None
                except RuntimeError as error:
                    if "timed out" not in str(error):
                        raise
                    raise UserError(
                        f"no batch from {self.dataset.place} within data.batch_timeout_s {self.loader.timeout:.0f} s; "
                        f"{SHARD_ADVICE}"
                    ) from None
                step = epoch * self.steps_per_epoch + step_in_epoch + i // self.micro_batches_per_step
                yield samples.choose_captions(self.caption_weights, seed=self.seed, step=step)
            del batches  # stops this epoch's workers before the next epoch's start
            epoch, step_in_epoch = epoch + 1, 0


class HeldOutBatches:
    """The first `num_samples` of the validation split, split over the ranks; the same on every call.

    Every rank gets the same number of micro-batches, because all ranks take part in every forward pass of ZeRO-3; a
    short one is filled up with samples of weight 0.
    """

    def __init__(self, config: RunConfig, metadata: DatasetMetadata, rank: int, world_size: int) -> None:
        self.dataset = CaptionedTokens(
            config.data,
            config.data.validation_split,
            metadata,
            text_width=config.text.width,
            batch_size=config.train.micro_batch,
            num_canonical_nodes=1,
        )
        self.num_samples = min(config.validation.num_samples, self.dataset.num_samples)
        self.micro_batch = config.train.micro_batch
        self.seed, self.caption_weights = config.seed, config.data.caption_weights
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[tuple[MicroBatch, Tensor]]:
        """Yields micro-batches and the weight of each sample, (B,) float of 0 and 1."""
        per_round = self.micro_batch * self.world_size
        for start in range(0, self.num_samples, per_round):
            indices = range(start + self.rank * self.micro_batch, start + (self.rank + 1) * self.micro_batch)
            samples = [self.dataset[min(index, self.num_samples - 1)] for index in indices]
            weights = torch.tensor([float(index < self.num_samples) for index in indices])
            # As if all were of step 0: the same captions every time, in the shares that training draws.
            yield collate(samples).choose_captions(self.caption_weights, seed=self.seed, step=0), weights


def drop_captions(sample_ids: Sequence[int], *, seed: int, step: int, rate: float) -> list[bool]:
    """Which captions guidance training replaces by the empty one: a function of (seed, step, sample) alone."""
    return [bool(np.random.default_rng([seed, step, sample_id]).random() < rate) for sample_id in sample_ids]


def fetch_metadata(data: DataSection) -> DatasetMetadata:
    """Reads `dataset.json` of a data set, and for a remote one keeps it in the local cache.

    Raises:
        UserError: no data set there, a remote that cannot be read, or a cache that holds another version of it.
    """
    local = Path(data.local)
    if data.remote is None:
        return read_metadata(local)
    local.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=local) as fetched:
        _download(data, METADATA_FILE, Path(fetched))
        metadata = read_metadata(Path(fetched))
        # Streaming takes whatever shard it finds in the cache for the remote's.
        if (local / METADATA_FILE).is_file() and read_metadata(local) != metadata:
            raise UserError(f"the cache {local} holds another version of {data.remote}; remove the folder")
        os.replace(Path(fetched) / METADATA_FILE, local / METADATA_FILE)
    return metadata


def fetch_empty_caption(data: DataSection) -> TextFeatures:
    """Stored features of the empty caption, for data sets with text features.

    Raises:
        UserError: the file is missing or damaged, or the remote cannot be read.
    """
    with tempfile.TemporaryDirectory() as fetched:
        folder = Path(data.local) if data.remote is None else Path(fetched)
        if data.remote is not None:
            _download(data, EMPTY_CAPTION_FILE, folder)
        tensors = read_weights(folder / EMPTY_CAPTION_FILE)
    return TextFeatures.pack([(tensors["text_hidden"], tensors["text_pooled"])])


def _download(data: DataSection, name: str, folder: Path) -> None:
    """Copies one small file of a remote data set into a folder."""
    try:
        downloader = CloudDownloader.get(data.remote)
        downloader.download(f"{data.remote.rstrip('/')}/{name}", str(folder / name), data.download_timeout_s)
    except Exception as error:  # every cloud client has its own exceptions
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"cannot read {name} of the data set at {data.remote}: {reason}") from None


def check_local_shards(data: DataSection, split: str) -> None:
    """Compares every shard of a local data set with the size that its index records.

    Raises:
        UserError: naming the split or the shard that is missing or damaged.
    """
    if data.remote is not None:
        return  # shards of a remote are checked as they are downloaded
    index = Path(data.local) / split / "index.json"
    if not index.is_file():
        raise UserError(f"no split {split!r} in the data set at {data.local}: {index} does not exist")
    for shard in json.loads(index.read_text())["shards"]:
        file = shard["zip_data"] or shard["raw_data"]
        path = index.parent / file["basename"]
        size = path.stat().st_size if path.is_file() else None
        if size != file["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes"
            raise UserError(f"shard {path} {found}, its index says {file['bytes']}; copy the data set again")
