"""Re-captioning: new captions of a source's pictures by an image-to-text or vision-language model, as in the paper.

OUTPUT/job.json        the job's config
OUTPUT/UNIT.jsonl      {"key": …, "caption": …} per picture; a folder's pictures have one file per partition
OUTPUT/UNIT.rejects    pictures that could not be read, with the reason; written where there are any
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from data_prep.captioner import Captioner
from data_prep.job import JOB_FILE, JOB_HASH_DIGITS, check_same_job, identity, source_hash, stored_config
from data_prep.partition import Partition
from data_prep.preparation import Rejected, check_picture, read_item
from data_prep.recaptions import caption_line
from data_prep.sources import SourceBase, SourceItem, Unit, open_source, open_units
from data_prep.work import named_if_full, unfinished_work, work_root
from star_dist.config import CaptionConfig
from star_dist.data.pictures import UnreadablePicture, decode_picture
from star_dist.device import find_device
from star_dist.errors import UserError
from star_dist.object_store import ObjectStore, open_store

REJECTS_SUFFIX = ".rejects"
MIN_SIDE = 4  # transformers takes a picture of 1 or 3 rows for one whose first dimension are its channels
MAX_ASPECT = 200  # processors of Qwen's models raise an error beyond it


def caption(
    config: CaptionConfig, partition: Partition, device_name: str | None = None, workers: int | None = None
) -> dict[str, int]:
    """Captions one partition of a source; returns how many pictures were captioned and rejected by this run.

    A file of the output appears when all its pictures are done; files that are there are skipped, and one that was
    begun goes on after its last whole line.

    Raises:
        UserError: a source, model or output that cannot be used, or another worker is at the same partition.
    """
    store = open_store(config.output, endpoint=config.storage.endpoint, region=config.storage.region)
    work_root(config.output, config.work)  # a mistake in it shows before the source is listed
    source = open_source(config.source, config.storage)
    units = partition.of(source.units)
    job_hash = _join_job(store, config, partition, source)
    counts = {"captioned": 0, "rejected": 0}
    with unfinished_work(config.output, config.work, job_hash, partition) as work:
        groups = groupby(units, key=lambda unit: source.caption_file(unit, partition.name))
        missing = [(file, list(members)) for file, members in groups if not store.exists(file)]
        if missing:
            device = find_device(device_name)
            captioner = Captioner(config, device)
            names = [unit for _, members in missing for unit in members]
            opened = open_units(source, names)
            with tqdm(unit="picture", desc=f"caption {partition}", dynamic_ncols=True) as bar:
                progress = _Progress(bar, len(names))
                job = _CaptionJob(config, captioner, store, work, workers or len(os.sched_getaffinity(0)), progress)
                for file, members in missing:
                    captioned, rejected = job.run(file, islice(opened, len(members)))
                    counts["captioned"] += captioned
                    counts["rejected"] += rejected
    print(
        f"partition {partition} of {config.output} is complete: {counts['captioned']} captioned, "
        f"{counts['rejected']} rejected by this run"
    )
    return counts


def _join_job(store: ObjectStore, config: CaptionConfig, partition: Partition, source: SourceBase) -> str:
    """Begins a job at its output, or checks that it is this one; returns its identity.

    Raises:
        UserError: the output belongs to another job; names the first difference.
    """
    facts = {"partitions": partition.count, "units": len(source.units), "source_hash": source_hash(source)}
    if not store.exists(JOB_FILE):
        store.write(JOB_FILE, (json.dumps(_identity(config) | facts, indent=2) + "\n").encode())
    try:
        stored = json.loads(store.read(JOB_FILE))
        options = {name: value for name, value in stored.items() if name not in facts}
        stored_facts = {name: stored[name] for name in facts}
    except (ValueError, LookupError, AttributeError):
        raise UserError(f"{store.url}/{JOB_FILE} is not of a captioning job; change output, or remove it") from None
    before = _identity(stored_config(CaptionConfig, options, store.url))
    check_same_job(store, before | stored_facts, _identity(config) | facts)
    return hashlib.sha256(json.dumps(stored, sort_keys=True).encode()).hexdigest()[:JOB_HASH_DIGITS]


def _identity(config: CaptionConfig) -> dict[str, Any]:
    """Unlike tokens, captions do not go into anything that would have to be the same bit for bit: batch may change."""
    return {name: value for name, value in identity(config).items() if name != "batch"}


class _Progress:
    """Pictures of this run; how many will come is estimated by the units that are open or done."""

    def __init__(self, bar: tqdm, units: int) -> None:
        self.bar, self.units = bar, units
        self.opened_units = self.opened_items = self.done_before = 0

    def items_of(self, units: Iterable[Unit], done_before: int) -> Iterator[SourceItem]:
        """All items of units, without those that an earlier run has done."""
        self.done_before += done_before
        for unit in units:
            self.opened_units += 1
            self.opened_items += len(unit)
            self.bar.total = round(self.opened_items * self.units / self.opened_units) - self.done_before
            yield from islice(unit, done_before, None)
            done_before = max(0, done_before - len(unit))


class _CaptionJob:
    """Captions the units that share one output file."""

    def __init__(
        self,
        config: CaptionConfig,
        captioner: Captioner,
        store: ObjectStore,
        work: Path,
        workers: int,
        progress: _Progress,
    ) -> None:
        self.config, self.captioner, self.store = config, captioner, store
        self.work, self.workers, self.progress = work, workers, progress

    def run(self, file: str, units: Iterable[Unit]) -> tuple[int, int]:
        """Writes one file; returns pictures captioned and rejected by this run."""
        local = self.work / file.replace("/", "%")
        done = _whole_lines(local)
        counts = [0, 0]
        with local.open("a", encoding="utf-8") as target:
            ahead = self._read_ahead(self.progress.items_of(units, done))
            while batch := list(islice(ahead, self.config.batch)):
                good = [picture for _, picture in batch if isinstance(picture, Image.Image)]
                new = iter(self.captioner(good)) if good else iter(())
                for item, picture in batch:
                    if isinstance(picture, Image.Image):
                        target.write(caption_line(item.key, next(new)))
                    else:
                        target.write(json.dumps({"key": item.key, "reason": picture}) + "\n")
                    counts[not isinstance(picture, Image.Image)] += 1
                target.flush()
                self.progress.bar.update(len(batch))
        with local.open("rb") as lines_of_bytes:  # text could be split at more than \n
            lines = list(lines_of_bytes)
        rejects = [line for line in lines if "reason" in json.loads(line)]
        captions = [line for line in lines if "caption" in json.loads(line)]
        with named_if_full(self.store.url):
            if rejects:
                self.store.write(file.removesuffix(".jsonl") + REJECTS_SUFFIX, b"".join(rejects))
            self.store.write(file, b"".join(captions))
        local.unlink()
        return counts[0], counts[1]

    def _read_ahead(self, items: Iterator[SourceItem]) -> Iterator[tuple[SourceItem, Image.Image | str]]:
        """Pictures, or why there is none, read on threads in the source's order."""
        with ThreadPoolExecutor(self.workers) as pool:
            submitted = ((item, pool.submit(self._picture, item)) for item in items)
            ahead = deque(islice(submitted, 2 * self.config.batch))
            try:
                while ahead:
                    item, future = ahead.popleft()
                    yield item, future.result()
                    ahead.extend(islice(submitted, 1))
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _picture(self, item: SourceItem) -> Image.Image | str:
        try:
            check_picture(item)
            image = decode_picture(read_item(item))
        except (Rejected, UnreadablePicture) as error:
            return str(error)
        image.thumbnail((self.config.side, self.config.side), Image.Resampling.LANCZOS)
        if min(image.size) < MIN_SIDE or max(image.size) > MAX_ASPECT * min(image.size):
            return f"too narrow for captioners: {image.width} x {image.height} pixels"
        return image


def _whole_lines(path: Path) -> int:
    """How many pictures a file that was begun has; cuts off the line that a kill cut short."""
    if not path.exists():
        return 0
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        path.write_bytes(whole)
    return whole.count(b"\n")
