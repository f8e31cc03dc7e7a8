"""Streaming of captioned token maps in an order that is a function of the step alone.

The position in the data is `step x global batch`: every epoch gives as many whole global batches as fit, and starting
at a step means skipping the samples of all earlier ones. Nothing about the loader has to be saved (the loader's own
counter is wrong for packed batches, deepspeed-notes.md).

B samples of a micro-batch, L tokens of a sample.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from streaming import StreamingDataset
from streaming.base.dataset import _ShardState
from streaming.base.storage import CloudDownloader
from torch import Tensor
from torch.utils.data import DataLoader

from star_dist.config import DataSection, DataSource, RunConfig
from star_dist.data.schema import (
    EMPTY_CAPTION_FILE,
    FEATURE_DTYPE,
    METADATA_FILE,
    DatasetMetadata,
    decode_features,
    decode_tokens,
    read_metadata,
)
from star_dist.data.shared_memory import record_segments
from star_dist.data.streams import CorruptShard, apply_s3_settings, build_streams
from star_dist.errors import UserError
from star_dist.scales import ScaleSchedule
from star_dist.text import TextFeatures
from star_dist.weights import read_weights

CORRUPT_MARK = ".corrupt"
SHARD_ADVICE = "check the remote, or remove the cache and start again"
WORKER_ERROR_PREFIX = f"{UserError.__module__}.{UserError.__qualname__}: "


@dataclass(frozen=True)
class MicroBatch:
    """sample_ids: of the data set, (B,). tokens_BL: int64. captions: text. features: stored per-caption features.

    present: False for a sample of a corrupt shard that is skipped; its other values are blanks.
    """

    sample_ids: tuple[int, ...]
    tokens_BL: Tensor
    captions: tuple[str, ...]
    features: tuple[tuple[Tensor, Tensor], ...] | None
    present: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.sample_ids)


class SkippedShard(Exception):
    """A sample of a shard that is corrupt and skipped was asked for."""


class CaptionedTokens(StreamingDataset):
    """One split; samples as dicts of `sample_id`, `present`, `tokens`, `caption` and optionally `features`.

    Raises:
        UserError: no such split, a local shard that is missing or cut short, or a cache limit that is too small.
    """

    def __init__(self, data: DataSection, split: str, metadata: DatasetMetadata, *, text_width: int, **options: Any):
        check_local_shards(data, split)
        on_first_rank_of_host = os.environ.get("LOCAL_RANK", "0") == "0"
        if on_first_rank_of_host:
            for source in data.all_sources:
                for mark in Path(source.local, split).glob(f"*{CORRUPT_MARK}"):
                    mark.unlink()  # another start, another try
        try:
            super().__init__(streams=build_streams(data, split), cache_limit=data.cache_limit, **options)
        except ValueError as error:
            raise UserError(f"the data set at {data.place}/{split} cannot be streamed: {error}") from None
        if on_first_rank_of_host:
            record_segments(self._shm_prefix_int)
        self.metadata = metadata
        self.feature_width = text_width if data.text_features else None
        self.skip_corrupt = data.corrupt_shards == "skip"
        self.place = f"{data.place}/{split}"
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

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Brings a shard into the cache. Background threads call it with blocking=False, readers without.

        Raises:
            CorruptShard: it stays corrupt and the run is to stop then.
            SkippedShard: it stays corrupt and is skipped, and a reader asks for it.
        """
        mark = self._corrupt_mark(shard_id)
        if not mark.exists():
            try:
                return super().prepare_shard(shard_id, blocking)
            except CorruptShard as error:
                if not self.skip_corrupt:
                    raise
                mark.write_text(str(error))
                print(f"warning: skipping the samples of corrupt shard {error}", file=sys.stderr, flush=True)
                self._shard_states[shard_id] = _ShardState.LOCAL  # lets those that wait for it go on to its mark
        if blocking:
            raise SkippedShard

    def _corrupt_mark(self, shard_id: int) -> Path:
        """A file in the cache, which all processes of the host see."""
        stream, (raw_file, _) = self.streams[self.stream_per_shard[shard_id]], self.shards[shard_id].file_pairs[0]
        return Path(stream.local) / stream.split / f"{raw_file.basename}{CORRUPT_MARK}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            stored = super().__getitem__(index)
        except SkippedShard:
            return self._blank(index)
        sample = {
            "sample_id": int(index),
            "present": True,
            "tokens": decode_tokens(stored, self.metadata),
            "caption": stored["caption"],
        }
        if self.feature_width is not None:
            sample["features"] = decode_features(stored, self.feature_width)
        return sample

    def _blank(self, index: int) -> dict[str, Any]:
        """Stands for a sample of a skipped shard, so that batches keep their shape."""
        num_tokens = ScaleSchedule(self.metadata.scales).num_tokens
        tokens = np.zeros(num_tokens, np.int64)
        sample = {"sample_id": int(index), "present": False, "tokens": tokens, "caption": ""}
        if self.feature_width is not None:
            width = self.feature_width
            sample["features"] = np.zeros((1, width), FEATURE_DTYPE), np.zeros(width, FEATURE_DTYPE)
        return sample


def collate(samples: Sequence[dict[str, Any]]) -> MicroBatch:
    """Stacks samples of one schedule."""
    features = None
    if "features" in samples[0]:
        features = tuple(
            (torch.from_numpy(hidden), torch.from_numpy(pooled)) for hidden, pooled in (s["features"] for s in samples)
        )
    return MicroBatch(
        sample_ids=tuple(sample["sample_id"] for sample in samples),
        tokens_BL=torch.from_numpy(np.stack([sample["tokens"] for sample in samples])),
        captions=tuple(sample["caption"] for sample in samples),
        features=features,
        present=tuple(sample["present"] for sample in samples),
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
            for _ in range(remaining):
                try:
                    batch = next(batches)
                except UserError as error:  # a loader worker sends it with its traceback before the message
                    raise UserError(str(error).strip().splitlines()[-1].removeprefix(WORKER_ERROR_PREFIX)) from None
                except RuntimeError as error:
                    if "timed out" not in str(error):
                        raise
                    raise UserError(
                        f"no batch from {self.dataset.place} within data.batch_timeout_s {self.loader.timeout:.0f} s; "
                        f"{SHARD_ADVICE}"
                    ) from None
                yield batch
            del batches  # stops this epoch's workers before the next epoch's start
            epoch, step_in_epoch = epoch + 1, 0


class HeldOutBatches:
    """The first samples of the validation split of every source, `num_samples` in all; the same on every call.

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
        self.sample_ids = spread_over_sources(config.validation.num_samples, self.dataset.samples_per_stream.tolist())
        self.num_samples = len(self.sample_ids)
        self.micro_batch = config.train.micro_batch
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[tuple[MicroBatch, Tensor]]:
        """Yields micro-batches and the weight of each sample, (B,) float of 0 and 1."""
        per_round = self.micro_batch * self.world_size
        for start in range(0, self.num_samples, per_round):
            positions = range(start + self.rank * self.micro_batch, start + (self.rank + 1) * self.micro_batch)
            samples = [self.dataset[self.sample_ids[min(p, self.num_samples - 1)]] for p in positions]
            weights = [float(p < self.num_samples and sample["present"]) for p, sample in zip(positions, samples)]
            yield collate(samples), torch.tensor(weights)


def spread_over_sources(num_samples: int, available: Sequence[int]) -> list[int]:
    """Ids of `num_samples` samples, in equal shares of all sources as far as they reach, each source's first ones.

    available: samples of each source, whose ids follow one another.
    """
    shares = [0] * len(available)
    left = min(num_samples, sum(available))
    while left:
        open_sources = [i for i, count in enumerate(available) if shares[i] < count]
        for position, i in enumerate(open_sources):
            added = min(-(-left // (len(open_sources) - position)), available[i] - shares[i])
            shares[i], left = shares[i] + added, left - added
    starts = [sum(available[:i]) for i in range(len(available))]
    return [start + k for start, share in zip(starts, shares) for k in range(share)]


def drop_captions(sample_ids: Sequence[int], *, seed: int, step: int, rate: float) -> list[bool]:
    """Which captions guidance training replaces by the empty one: a function of (seed, step, sample) alone."""
    return [bool(np.random.default_rng([seed, step, sample_id]).random() < rate) for sample_id in sample_ids]


def fetch_metadata(data: DataSection) -> list[DatasetMetadata]:
    """Reads `dataset.json` of every source, and keeps that of a remote one in its local cache.

    Raises:
        UserError: no data set there, a remote that cannot be read, or a cache that holds another version of it.
    """
    apply_s3_settings(data)
    return [_fetch_metadata(source, data.download_timeout_s) for source in data.all_sources]


def _fetch_metadata(source: DataSource, timeout_s: float) -> DatasetMetadata:
    local = Path(source.local)
    if source.remote is None:
        return read_metadata(local)
    local.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=local) as fetched:
        _download(source.remote, METADATA_FILE, Path(fetched), timeout_s)
        metadata = read_metadata(Path(fetched))
        # Streaming takes whatever shard it finds in the cache for the remote's.
        if (local / METADATA_FILE).is_file() and read_metadata(local) != metadata:
            raise UserError(f"the cache {local} holds another version of {source.remote}; remove the folder")
        os.replace(Path(fetched) / METADATA_FILE, local / METADATA_FILE)
    return metadata


def fetch_empty_caption(data: DataSection) -> TextFeatures:
    """Stored features of the empty caption, for data sets with text features.

    Raises:
        UserError: the file is missing or damaged, or the remote cannot be read.
    """
    source = data.all_sources[0]  # the text encoder is the same for all, so the features of "" are too
    with tempfile.TemporaryDirectory() as fetched:
        folder = Path(source.local) if source.remote is None else Path(fetched)
        if source.remote is not None:
            _download(source.remote, EMPTY_CAPTION_FILE, folder, data.download_timeout_s)
        tensors = read_weights(folder / EMPTY_CAPTION_FILE)
    return TextFeatures.pack([(tensors["text_hidden"], tensors["text_pooled"])])


def _download(remote: str, name: str, folder: Path, timeout_s: float) -> None:
    """Copies one small file of a remote data set into a folder."""
    try:
        downloader = CloudDownloader.get(remote)
        downloader.download(f"{remote.rstrip('/')}/{name}", str(folder / name), timeout_s)
    except Exception as error:  # every cloud client has its own exceptions
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"cannot read {name} of the data set at {remote}: {reason}") from None


def check_local_shards(data: DataSection, split: str) -> None:
    """Compares every shard of a local data set with the size that its index records.

    Raises:
        UserError: naming the split or the shard that is missing or damaged.
    """
    for source in data.all_sources:
        if source.remote is None:  # shards of a remote are checked as they are downloaded
            _check_local_shards(Path(source.local), split)


def _check_local_shards(root: Path, split: str) -> None:
    index = root / split / "index.json"
    if not index.is_file():
        raise UserError(f"no split {split!r} in the data set at {root}: {index} does not exist")
    for shard in json.loads(index.read_text())["shards"]:
        file = shard["zip_data"] or shard["raw_data"]
        path = index.parent / file["basename"]
        size = path.stat().st_size if path.is_file() else None
        if size != file["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes"
            raise UserError(f"shard {path} {found}, its index says {file['bytes']}; copy the data set again")
