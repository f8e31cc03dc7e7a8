"""Micro-batches in an order that is a function of the step alone.

The position in the data is `step x global batch`: every epoch gives as many whole global batches as fit, and starting
at a step means skipping the samples of all earlier ones. Nothing about the loader has to be saved (its own
counter, of mosaicml-streaming 0.13, is wrong for packed batches).

B samples of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from star_dist.config import RunConfig
from star_dist.data.dataset import SHARD_ADVICE, CaptionedTokens, MicroBatch, collate
from star_dist.data.loading import leave_sigterm_to_the_rank, next_batch
from star_dist.data.schema import DatasetMetadata
from star_dist.errors import Unavailable, UserError


class TrainBatches:
    """This rank's micro-batches of the training split, from any step on.

    Raises:
        UserError: the split is smaller than one global batch, or has too few samples to be shuffled.
    """

    def __init__(self, config: RunConfig, metadata: Sequence[DatasetMetadata], world_size: int) -> None:
        data = config.data
        self.micro_batches_per_step = config.accumulation_steps(world_size)
        self.global_batch = config.train.global_batch
        self.seed = config.seed
        self.caption_weights = data.caption_weights
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
        # The library would refuse it in the middle of the first step; its other algorithms repeat samples instead.
        if data.shuffle and data.shuffle_algorithm == "py1e" and self.dataset.epoch_size < data.num_canonical_nodes:
            raise UserError(
                f"split {data.train_split!r} has {self.dataset.epoch_size} samples, fewer than "
                f"data.num_canonical_nodes {data.num_canonical_nodes}; make that smaller or add data"
            )
        self.loader = DataLoader(
            self.dataset,
            batch_size=config.train.micro_batch,
            num_workers=data.num_workers,
            prefetch_factor=data.prefetch_batches if data.num_workers else None,
            collate_fn=collate,
            drop_last=True,
            worker_init_fn=partial(leave_sigterm_to_the_rank, last=self.dataset.give_up_downloads),
            # A worker that waits for a shard whose download failed in another worker would wait for ever.
            timeout=data.batch_timeout_s if data.num_workers else 0,
        )

    def starting_at(self, step: int) -> Iterator[MicroBatch]:
        """Endless micro-batches, the first being this rank's first one of optimizer step `step` (counted from 0)."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        while True:
            self.dataset.position = epoch, step_in_epoch * self.global_batch
            remaining = (self.steps_per_epoch - step_in_epoch) * self.micro_batches_per_step
            batches = iter(self.loader)
            for i in range(remaining):
                try:
                    samples = next_batch(batches)
                except RuntimeError as error:
                    if "timed out" not in str(error):
                        raise
                    raise Unavailable(
                        f"no batch from {self.dataset.place} within data.batch_timeout_s {self.loader.timeout:.0f} s; "
                        f"{SHARD_ADVICE}"
                    ) from None
                step = epoch * self.steps_per_epoch + step_in_epoch + i // self.micro_batches_per_step
                yield samples.choose_captions(self.caption_weights, seed=self.seed, step=step)
            del batches  # stops this epoch's workers before the next epoch's start
            epoch, step_in_epoch = epoch + 1, 0


class HeldOutBatches:
    """The first samples of the validation split of every source, `num_samples` in all; the same on every call.

    Every rank gets the same number of micro-batches, because all ranks take part in every forward pass of ZeRO-3; a
    short one is filled up with samples of weight 0.
    """

    def __init__(self, config: RunConfig, metadata: Sequence[DatasetMetadata], rank: int, world_size: int) -> None:
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
        self.seed, self.caption_weights = config.seed, config.data.caption_weights
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[tuple[MicroBatch, Tensor]]:
        """Yields micro-batches and the weight of each sample, (B,) float of 0 and 1."""
        per_round = self.micro_batch * self.world_size
        for start in range(0, self.num_samples, per_round):
            positions = range(start + self.rank * self.micro_batch, start + (self.rank + 1) * self.micro_batch)
            samples = [self.dataset[self.sample_ids[min(p, self.num_samples - 1)]] for p in positions]
            weights = [float(p < self.num_samples and sample["present"]) for p, sample in zip(positions, samples)]
            # As if all were of step 0: the same captions every time, in the shares that training draws.
            batch = collate(samples).choose_captions(self.caption_weights, seed=self.seed, step=0)
            yield batch, torch.tensor(weights)


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
