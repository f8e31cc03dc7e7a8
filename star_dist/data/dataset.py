"""Captioned token maps streamed from MDS shards: samples, and micro-batches of them.

B samples of a micro-batch, L tokens of a sample.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from time import sleep
from typing import Any

import numpy as np
import torch
from streaming import StreamingDataset
from streaming.base.constant import TICK
from streaming.base.dataset import _Iterator, _ShardState
from streaming.base.world import World
from torch import Tensor

from star_dist.config import DataSection
from star_dist.data.captions import choose_caption
from star_dist.data.fetch import check_local_shards
from star_dist.data.schema import FEATURE_DTYPE, DatasetMetadata, decode_captions, decode_features, decode_tokens
from star_dist.data.shared_memory import one_number_for_all_ranks, record_segments
from star_dist.data.streams import CORRUPT_MARK, CorruptShard, UnreadableIndex, build_streams, remove_leftovers
from star_dist.errors import Unavailable, UserError
from star_dist.files import FULL_DISK
from star_dist.scales import ScaleSchedule

BLANK = ""  # the name of the only caption of a sample that is skipped
SHARD_ADVICE = "check the remote, or remove the cache and start again"


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


@dataclass(frozen=True)
class Samples:
    """A micro-batch before its captions are chosen: captions, and features where stored, of each sample by name.

    tokens_BL: as stored. Arrays go from a loader worker to its rank in the message itself, which is faster than as
    tensors: each of those travels in shared memory of its own and keeps a file open until its batch is trained on, and
    a few batches of features were more than the usual limit of 1,024 files.
    """

    sample_ids: tuple[int, ...]
    tokens_BL: np.ndarray
    captions: tuple[dict[str, str], ...]
    features: tuple[dict[str, tuple[np.ndarray, np.ndarray]], ...] | None
    present: tuple[bool, ...]

    def choose_captions(self, weights: Mapping[str, float], *, seed: int, step: int) -> MicroBatch:
        """Takes one caption of each sample (`choose_caption`)."""
        names = [
            choose_caption(captions, weights, seed=seed, step=step, sample_id=sample_id) if present else BLANK
            for sample_id, captions, present in zip(self.sample_ids, self.captions, self.present)
        ]
        return MicroBatch(
            sample_ids=self.sample_ids,
            tokens_BL=torch.from_numpy(self.tokens_BL.astype(np.int64)),
            captions=tuple(captions[name] for captions, name in zip(self.captions, names)),
            features=self.features
            and tuple(tuple(map(torch.from_numpy, features[name])) for features, name in zip(self.features, names)),
            present=self.present,
        )


class SkippedShard(Exception):
    """A sample of a shard that is corrupt and skipped was asked for."""


class CaptionedTokens(StreamingDataset):
    """One split; samples as dicts of `sample_id`, `present`, `tokens`, `captions` and optionally `features`.

    metadata: of every source. position: where the next pass begins, an epoch and how many of its samples (over all
    ranks) are left out.

    Raises:
        UserError: no such split, a local shard that is missing or cut short, an index that cannot be read, or a cache
            limit that is too small.
    """

    def __init__(
        self, data: DataSection, split: str, metadata: Sequence[DatasetMetadata], *, text_width: int, **options: Any
    ):
        check_local_shards(data, split)
        self.place = f"{data.place}/{split}"
        self.cache = ", ".join(source.local for source in data.all_sources)
        on_first_rank_of_host = os.environ.get("LOCAL_RANK", "0") == "0"
        if on_first_rank_of_host:
            remove_leftovers(data, split)
        try:
            with one_number_for_all_ranks():
                super().__init__(streams=build_streams(data, split), cache_limit=data.cache_limit, **options)
        except ValueError as error:
            raise UserError(f"the data set at {self.place} cannot be streamed: {error}") from None
        except UnreadableIndex as error:
            raise self._explained(error.__cause__) from None
        if on_first_rank_of_host:
            record_segments(self._shm_prefix_int)
        self.metadata = metadata
        self.feature_width = text_width if data.text_features else None
        self.skip_corrupt = data.corrupt_shards == "skip"
        self.num_tokens = ScaleSchedule(metadata[0].scales).num_tokens
        self.position = (0, 0)
        self.failure: BaseException | None = None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Streams this rank's samples.

        Raises:
            UserError: a shard that cannot be downloaded, or whose bytes are not those that the index promises.
        """
        self.failure = None
        yield from super().__iter__()
        if self.failure is not None:
            raise self._explained(self.failure)

    def _resume(self, world: World, epoch: int) -> tuple[int, int]:
        """The library takes the place from shared memory instead, which every pass opens anew and none closes."""
        self._set_shuffle_block_size(world)
        return self.position

    def on_exception(self, future: Future) -> None:
        """Keeps what a download thread died of: the library would end the epoch early and say nothing."""
        if future.exception() is not None:
            self.failure = future.exception()
            self._event.set()
            self._iterator.on_exit()  # a thread that dies does not count itself, and the epoch's end waits for two

    def _ready_thread(self, it: _Iterator) -> None:
        """Lets the reader go on to samples whose shards are there.

        The library's own waits for ever for a shard that the cache's limit evicts before it looks again.
        """
        while it.ready_index < it.total and not it.should_exit() and not self._event.is_set():
            if self.predownload is not None and it.ready_index - it.yield_index > self.predownload:
                sleep(TICK)
                continue
            sample_id = it.sample_ids[it.ready_index]
            shard_id = None if sample_id == -1 else self.spanner[sample_id][0]  # -1 fills up a rank's samples
            if shard_id is None or self._shard_states[shard_id] == _ShardState.LOCAL:
                it.ready_index += 1
            elif self._shard_states[shard_id] == _ShardState.REMOTE:
                self.prepare_shard(shard_id, blocking=False)
            else:
                sleep(TICK)
        it.on_exit()

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
            except Exception as error:
                if self._cache_filelock.is_locked:  # the library keeps it when the cache has no room
                    self._cache_filelock.release(force=True)
                try:
                    if not (self.skip_corrupt and isinstance(error, CorruptShard)):
                        raise
                    mark.write_text(str(error))
                    print(f"warning: skipping the samples of corrupt shard {error}", file=sys.stderr, flush=True)
                finally:
                    # The library leaves it as being prepared, and whoever else needs it would wait for ever. So they
                    # look for the file, and come here for the mark or the error.
                    self._shard_states[shard_id] = _ShardState.LOCAL
        self._shard_states[shard_id] = _ShardState.LOCAL  # a cache with a limit evicts skipped shards, too
        if blocking:
            raise SkippedShard

    def give_up_downloads(self) -> None:
        """For a loader worker that ends in the middle of some: the library would leave their shards as being prepared,
        and whoever else needs one would wait for ever."""
        for stream in self.streams:
            for shard in tuple(stream.downloading):
                self._shard_states[self.shards.index(shard)] = _ShardState.REMOTE

    def _corrupt_mark(self, shard_id: int) -> Path:
        """A file in the cache, which all processes of the host see."""
        stream, (raw_file, _) = self.streams[self.stream_per_shard[shard_id]], self.shards[shard_id].file_pairs[0]
        return Path(stream.local) / stream.split / f"{raw_file.basename}{CORRUPT_MARK}"

    def _explained(self, error: BaseException) -> UserError:
        """What ends the training when an index or a shard cannot be read."""
        problem = f"cannot read the data set at {self.place}: "
        if isinstance(error, OSError) and error.errno in FULL_DISK:
            return UserError(f"{problem}no room in the cache {self.cache}; set data.cache_limit, or another data.local")
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if "cache limit" in reason or "cache_limit" in reason:
            return UserError(
                f"{problem}data.cache_limit {self.cache_limit} has no room for the shards in use; raise it"
            )
        kind = UserError if isinstance(error, CorruptShard) else Unavailable
        return kind(f"{problem}{reason}; {SHARD_ADVICE}")

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample; a blank one (`present` False) of a corrupt shard that is skipped.

        Raises:
            UserError: its shard cannot be downloaded or has not the bytes that the index promises, or it is damaged.
        """
        metadata = self.metadata[self.stream_per_shard[self.spanner[index][0]]]
        try:
            stored = super().__getitem__(index)
        except SkippedShard:
            return self._blank(index, metadata)
        except Exception as error:  # of any client of any store
            raise self._explained(self.failure or error) from None
        captions = decode_captions(stored, metadata)
        if problem := self._damage_of_tokens(stored, metadata) or ("" if captions else "no caption"):
            raise UserError(
                f"sample {index} of {self.place} (key {stored['key']!r}) is damaged: it has {problem}; find all such "
                f"samples with python -m data_prep.verify, and copy or tokenize the data set again"
            )
        sample = {
            "sample_id": int(index),
            "present": True,
            "tokens": decode_tokens(stored, metadata),
            "captions": captions,
        }
        if self.feature_width is not None:
            sample["features"] = {name: decode_features(stored, name, self.feature_width) for name in captions}
        return sample

    def _damage_of_tokens(self, stored: Mapping[str, Any], metadata: DatasetMetadata) -> str | None:
        """What is wrong with a sample's tokens: nobody compares the shards of a local data set with their hashes, and
        of a wrong token a GPU says no more than that an assertion failed."""
        num_bytes = self.num_tokens * np.dtype(metadata.token_dtype).itemsize
        if len(stored["tokens"]) != num_bytes:
            return f"{len(stored['tokens'])} bytes of tokens, scales {list(metadata.scales)} take {num_bytes}"
        largest = decode_tokens(stored, metadata).max()
        return f"token {largest}, the codebook has {metadata.vocab_size}" if largest >= metadata.vocab_size else None

    def _blank(self, index: int, metadata: DatasetMetadata) -> dict[str, Any]:
        """Stands for a sample of a skipped shard, so that batches keep their shape."""
        tokens = np.zeros(self.num_tokens, metadata.token_dtype)
        sample = {"sample_id": int(index), "present": False, "tokens": tokens, "captions": {BLANK: ""}}
        if self.feature_width is not None:
            hidden = np.zeros((1, self.feature_width), FEATURE_DTYPE)
            sample["features"] = {BLANK: (hidden, hidden[0])}
        return sample


def collate(samples: Sequence[dict[str, Any]]) -> Samples:
    """Stacks samples of one schedule."""
    return Samples(
        sample_ids=tuple(sample["sample_id"] for sample in samples),
        tokens_BL=np.stack([sample["tokens"] for sample in samples]),
        captions=tuple(sample["captions"] for sample in samples),
        features=tuple(sample["features"] for sample in samples) if "features" in samples[0] else None,
        present=tuple(sample["present"] for sample in samples),
    )
