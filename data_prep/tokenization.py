"""The tokenization job: source -> decode -> crop -> VQ-VAE -> chunks -> MDS shards of one partition -> output."""

from __future__ import annotations

import os
import tempfile
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from data_prep.assembly import assemble, upload
from data_prep.job import (
    JobDescription,
    check_same_job,
    describe_job,
    identity,
    is_merged,
    join_job,
    manifest_name,
    output_store,
    read_job,
    read_manifest,
    stored_config,
)
from data_prep.journal import Chunk, Journal
from data_prep.merging import merge
from data_prep.partition import Partition
from data_prep.preparation import Prepared, prepare_all
from data_prep.sources import SourceBase, SourceItem, open_source, open_units
from data_prep.summary import Summary
from data_prep.work import TEMPORARY, named_if_full, unfinished_work, work_root
from star_dist.config import PrepConfig, ResolutionSection
from star_dist.data.pictures import normalize
from star_dist.data.schema import DatasetMetadata, columns, encode_captions, encode_tokens
from star_dist.device import find_device
from star_dist.errors import UserError
from star_dist.object_store import ObjectStore
from star_dist.text import TextEncoder
from star_dist.tokenizer.io import load_tokenizer, tokenizer_hash
from star_dist.tokenizer.vqvae import MultiScaleVQVAE


def tokenize(
    config: PrepConfig, device_name: str | None = None, workers: int | None = None
) -> dict[int, DatasetMetadata]:
    """Runs a whole job in this process: its one partition, then the merge. Returns what it wrote, by resolution.

    Raises:
        UserError: a source, tokenizer or output that cannot be used, or no usable picture at all.
    """
    tokenize_partition(config, Partition(), device_name, workers)
    return merge(config.output, config.storage)


def tokenize_partition(
    config: PrepConfig, partition: Partition, device_name: str | None = None, workers: int | None = None
) -> Summary | None:
    """Tokenizes one partition and prints a summary; None where the partition was complete already.

    Goes on after the last complete chunk of a job that was killed. `workers` threads decode pictures (default: one
    per CPU that this process may use); their number leaves the result as it is.

    Raises:
        UserError: a source, tokenizer or output that cannot be used, or another worker is at the same partition.
    """
    store = output_store(config)
    work_root(config.output, config.work)  # a mistake in it shows before the models are loaded
    device = find_device(device_name)
    tokenizer = load_tokenizer(Path(config.tokenizer))
    _check_resolutions(config, tokenizer.config.downsampling)
    hash_of_tokenizer = tokenizer_hash(tokenizer)
    stored = read_job(store)
    if stored is not None:
        before = identity(stored_config(PrepConfig, stored.config, store.url))
        before |= {"tokenizer_hash": stored.dataset.tokenizer_hash, "partitions": stored.partitions}
        now = identity(config) | {"tokenizer_hash": hash_of_tokenizer, "partitions": partition.count}
        check_same_job(store, before, now)
        if is_merged(store, config):  # needs neither source nor device
            print(f"{config.output} is complete, nothing to do")
            return None
    source = open_source(config.source, config.storage, tuple(config.min_scores))
    if not source.caption_names:
        raise UserError("source.captions and source.recaptions are both empty; name the captions to train on")
    units = partition.of(source.units)
    job = join_job(store, describe_job(config, source, tokenizer.config, hash_of_tokenizer, partition.count))
    with unfinished_work(config.output, config.work, job.hash, partition) as work:
        if read_manifest(store, manifest_name(partition)) is not None:
            print(f"partition {partition} of {config.output} is complete, nothing to do")
            return None
        worker = _Worker(config, partition, job, source, tokenizer.to(device), workers or len(os.sched_getaffinity(0)))
        summary = worker.run(store, work, units)
    print(summary)
    return summary


class _Worker:
    """One partition's way from the source to the output."""

    def __init__(
        self,
        config: PrepConfig,
        partition: Partition,
        job: JobDescription,
        source: SourceBase,
        tokenizer: MultiScaleVQVAE,
        workers: int,
    ) -> None:
        self.config, self.partition, self.job, self.source = config, partition, job, source
        self.tokenizer, self.workers = tokenizer, workers
        self.device = next(tokenizer.parameters()).device
        self.dtype = np.dtype(job.dataset.token_dtype)
        self.text_encoder = TextEncoder(config.text_features, self.device) if config.text_features else None
        self.seconds: Counter[str] = Counter()

    def run(self, store: ObjectStore, work: Path, units: list[str]) -> Summary:
        """Tokenizes what is missing, then assembles and uploads the partition, its manifest last."""
        started = time.perf_counter()
        names = [f"tokens_{section.resolution}" for section in self.config.all_resolutions]
        plain = columns(self.source.caption_names, self.text_encoder is not None)
        del plain["tokens"]
        journal = Journal(work, plain | dict.fromkeys(names, "bytes"))
        resumed_at = journal.position.items
        self._fill(journal, units)
        with tempfile.TemporaryDirectory(dir=work, prefix=TEMPORARY) as folder:
            with self._timed("assemble"):
                empty_caption = self.text_encoder([""])[0] if self.text_encoder else None
                partition = assemble(journal, Path(folder), self.config, self.partition, self.job, empty_caption)
            with self._timed("upload"), named_if_full(store.url):
                upload(partition, store, manifest_name(self.partition))
        return Summary.of(
            partition.manifest,
            items_now=journal.position.items - resumed_at,
            seconds=time.perf_counter() - started,
            stages=dict(self.seconds),
            place=f"partition {self.partition} of {store.url}",
        )

    def _fill(self, journal: Journal, units: list[str]) -> None:
        """Appends chunks until the partition's end."""
        position = journal.position
        if position.last:
            return
        with tqdm(
            initial=position.items,
            unit="picture",
            desc=f"tokenize {self.partition}",
            smoothing=0.05,
            dynamic_ncols=True,
        ) as bar:
            stream = _Stream(self.source, units, position, bar)
            prepared = prepare_all(iter(stream), self.config, self.source.caption_names, self.workers)
            while not journal.position.last:
                group = islice(prepared, self.config.chunk)
                samples, rejects, too_small = self._tokenize_chunk(group, bar)
                items = journal.position.items + len(samples) + len(rejects)
                unit, offset = stream.place_of(items)
                chunk = Chunk(
                    items=items,
                    unit=unit,
                    offset=offset,
                    last=len(samples) + len(rejects) < self.config.chunk,
                    rejected=dict(sorted(Counter(reject["reason"] for reject in rejects).items())),
                    too_small=dict(sorted(too_small.items())),
                )
                with self._timed("journal"):
                    journal.append(chunk, samples, rejects)

    def _tokenize_chunk(
        self, group: Iterator[Prepared], bar: tqdm
    ) -> tuple[list[dict[str, Any]], list[dict[str, str]], Counter[str]]:
        """Samples and rejects of a chunk in the source's order.

        Batches are filled with usable pictures and never cross a chunk, so that what shares a batch (which the last
        bits of a float can depend on) is the same however often the job was killed.
        """
        samples: list[dict[str, Any]] = []
        rejects: list[dict[str, str]] = []
        too_small: Counter[str] = Counter()
        pending: dict[int, list[tuple[dict[str, Any], torch.Tensor]]] = {
            section.resolution: [] for section in self.config.all_resolutions
        }
        while True:
            with self._timed("wait for pictures"):
                prepared = next(group, None)
            if prepared is None:
                break
            bar.update()
            self.seconds["read (all threads)"] += prepared.read_s
            self.seconds["decode and resize (all threads)"] += prepared.decode_s
            if prepared.reason is not None:
                rejects.append({"key": prepared.key, "reason": prepared.reason})
                continue
            sample: dict[str, Any] = {"key": prepared.key, "captions": prepared.captions}
            sample |= {f"tokens_{resolution}": b"" for resolution in prepared.too_small}
            samples.append(sample)
            too_small.update(map(str, prepared.too_small))
            for section in self.config.all_resolutions:
                if section.resolution in prepared.pictures:
                    waiting = pending[section.resolution]
                    waiting.append((sample, prepared.pictures[section.resolution]))
                    if len(waiting) == (section.batch or self.config.batch):
                        self._tokenize_batch(waiting, section)
        for section in self.config.all_resolutions:
            if pending[section.resolution]:
                self._tokenize_batch(pending[section.resolution], section)
        with self._timed("text features"):
            for start in range(0, len(samples), self.config.batch):
                self._add_captions(samples[start : start + self.config.batch])
        return samples, rejects, too_small

    def _tokenize_batch(self, waiting: list[tuple[dict[str, Any], torch.Tensor]], section: ResolutionSection) -> None:
        """Puts the tokens of waiting pictures into their samples, and empties the list."""
        with self._timed("tokenize"):
            pictures = torch.stack([picture for _, picture in waiting]).to(self.device)
            tokens_BL = self.tokenizer.encode(normalize(pictures), section.schedule).cpu().numpy()
            for (sample, _), tokens_L in zip(waiting, tokens_BL):
                sample[f"tokens_{section.resolution}"] = encode_tokens(tokens_L, self.dtype)
            waiting.clear()

    def _add_captions(self, samples: list[dict[str, Any]]) -> None:
        """Turns the captions of samples into columns, with their features where they are stored."""
        texts = [caption for sample in samples for caption in sample["captions"].values() if caption]
        encoded = iter(())
        if self.text_encoder is not None:
            features = self.text_encoder(texts)
            encoded = (tuple(part.float().cpu().numpy() for part in features[i]) for i in range(len(texts)))
        for sample in samples:
            captions = sample.pop("captions")
            stored = None
            if self.text_encoder is not None:
                stored = {name: next(encoded) for name, caption in captions.items() if caption}
            sample |= encode_captions(sample["key"], captions, stored)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - started


class _Stream:
    """Items of a partition from a position on; keeps where each unit ended, and estimates how many items will come."""

    def __init__(self, source: SourceBase, units: list[str], start: Chunk, bar: tqdm) -> None:
        self.source, self.units, self.start, self.bar = source, units, start, bar
        self.first_items = [start.items - start.offset]  # of the starting unit and each one after it

    def __iter__(self) -> Iterator[SourceItem]:
        offset = self.start.offset
        opened = open_units(self.source, islice(self.units, self.start.unit, None))
        for number, unit in enumerate(opened, start=self.start.unit):
            end = self.first_items[-1] + len(unit)
            self.first_items.append(end)
            self.bar.total = round(end * len(self.units) / (number + 1))
            yield from islice(unit, offset, None)
            offset = 0

    def place_of(self, items: int) -> tuple[int, int]:
        """Unit and offset of the item after the first `items` ones."""
        unit = min(bisect_right(self.first_items, items), len(self.first_items)) - 1
        return self.start.unit + unit, items - self.first_items[unit]


def _check_resolutions(config: PrepConfig, downsampling: int) -> None:
    for section in config.all_resolutions:
        if section.schedule.resolution(downsampling) != section.resolution:
            raise UserError(
                f"resolution {section.resolution} is not the last of scales ({section.schedule.latent_side}) x the "
                f"tokenizer's downsampling ({downsampling}); change one of them"
            )
