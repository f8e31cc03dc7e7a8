"""Checkpoints at their place: complete or absent. Imports no torch, so that status commands can read them at once.

    step_00001000/shard_00000.safetensors   what rank 0 holds of weights and Adam moments; one file per rank (shards.py)
                …/index.json                which file holds which part of which parameter, and the scalars
                …/complete.json             the marker: written last, removed first; sizes of files, the run's config

The place is RUN/checkpoints, or `checkpoint.remote`. A folder without marker is what a killed save left behind; the
next save of that step starts it anew.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from star_dist.config import CheckpointSection, DataSection, RunConfig, dump_config
from star_dist.errors import Unavailable, UserError
from star_dist.run_folder import differences_since
from star_dist.train.places import LocalPlace, Place, S3Place

MARKER = "complete.json"
INDEX = "index.json"
FREE_SPACE_MARGIN = 1.1  # of a checkpoint's own size: other things grow on the disk while it is written

CHOOSING = "checkpoint.resume_step of a training, --step of other commands"  # how one is chosen, for messages

# What may change between a checkpoint and the run that goes on from it: nothing here changes what is computed from
# the same position on, except train.steps, which stretches the learning-rate schedule, and train.micro_batch,
# train.zero_stage, train.compile and model.attention, which change the order of float sums, and deepspeed, which can
# also change their rounding on the way between ranks.
MAY_CHANGE = (
    "name",
    "run_dir",
    "checkpoint",
    "validation",
    "samples",
    "logging",
    "health",
    "data.remote",
    "data.local",
    "data.sources.*.remote",
    "data.sources.*.local",
    "data.s3_endpoint_url",
    "data.s3_region",
    "data.corrupt_shards",
    "data.num_workers",
    "data.prefetch_batches",
    "data.cache_limit",
    "data.download_timeout_s",
    "data.download_attempts",
    "data.batch_timeout_s",
    "tokenizer.path",  # the marker records the hashes of what is behind this and the data's paths
    "train.steps",
    "train.micro_batch",
    "train.activation_checkpointing",
    "train.compile",
    "train.zero_stage",
    "train.init_from",
    "train.omp_threads",
    "model.attention",
    "deepspeed",
)


@dataclass(frozen=True)
class RunInputs:
    """Identity of what a run's config names by path alone: hash of the tokenizer, content hash of every data set."""

    tokenizer_hash: str
    data_hashes: tuple[str, ...]


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: optimizer steps done, by how many ranks it was written, from what, and without which steps
    of data."""

    place: Place
    folder: str
    step: int
    world_size: int
    inputs: RunInputs
    skipped_data: tuple[int, ...]
    config: dict[str, Any]

    @property
    def path(self) -> str:
        """Where it is, for messages."""
        return f"{self.place}/{self.folder}"

    @property
    def another_place(self) -> str:
        """Where another training finds no checkpoint of this one, for messages."""
        return "another run_dir" if isinstance(self.place, LocalPlace) else "another checkpoint.remote and run_dir"


class DamagedCheckpoint(UserError):
    """A checkpoint whose files are not those that its marker promises."""


def shard_name(rank: int) -> str:
    return f"shard_{rank:05d}.safetensors"


class CheckpointFolder:
    """All checkpoints of a run.

    Raises:
        UserError: from any method, the place cannot be reached (`Unavailable`) or read.
    """

    def __init__(self, run_dir: Path, options: CheckpointSection | None = None) -> None:
        self.options = options or CheckpointSection()
        remote = self.options.remote
        self.place: Place = LocalPlace(run_dir / "checkpoints")
        if remote is not None:
            self.place = S3Place(remote, self.options.s3_endpoint_url, self.options.s3_region)

    @staticmethod
    def name(step: int) -> str:
        return f"step_{step:08d}"

    def complete_steps(self) -> list[int]:
        """Steps with a complete checkpoint, oldest first."""
        return [step for step, complete in self._steps() if complete]

    def _steps(self) -> list[tuple[int, bool]]:
        """Every step that has a folder, oldest first, and whether it is complete."""
        try:
            matches = (re.fullmatch(r"step_(\d{8,})", name) for name in self.place.folders())
            return sorted((int(match[1]), MARKER in self.place.files(match[0])) for match in matches if match)
        except OSError as error:
            raise Unavailable(f"cannot list the checkpoints at {self.place}: {error}") from None

    def find(self, step: int | None, *, at_most: int | None = None) -> Checkpoint | None:
        """The checkpoint of a step, or with None the newest complete one (of step `at_most` or before), if any.

        With `checkpoint.on_damaged` "previous" a damaged newest one gives way to the one before it.

        Raises:
            UserError: the demanded step has no complete checkpoint, or a file is missing or cut short.
        """
        steps = [other for other in self.complete_steps() if at_most is None or other <= at_most]
        if step is not None:
            if step not in steps:
                raise UserError(f"{self.place} has no complete checkpoint of step {step}, only of steps {steps}")
            return self.open(step)
        damage = None
        for candidate in reversed(steps):
            try:
                return self.open(candidate)
            except DamagedCheckpoint as error:
                if self.options.on_damaged == "refuse":
                    raise
                damage = damage or error
        if damage is not None:
            raise damage
        return None

    def open(self, step: int) -> Checkpoint:
        """The complete checkpoint of a step.

        Raises:
            DamagedCheckpoint: a file is missing or cut short, or the marker is none.
        """
        folder = self.name(step)
        others = [other for other in self.complete_steps() if other != step]
        advice = (
            f"take another complete one ({others}): {CHOOSING}; or set checkpoint.on_damaged to previous, or remove "
            f"the folder"
        )
        try:
            with self.place.reading(folder, MARKER) as path:
                marker = json.loads(path.read_text())
            sizes = self.place.files(folder)
            expected = marker["files"]
            inputs = RunInputs(marker["tokenizer_hash"], tuple(marker["data_hashes"]))
            skipped_data = tuple(marker.get("skipped_data", ()))  # absent before 2026-11-28
            checkpoint = Checkpoint(
                self.place, folder, step, marker["world_size"], inputs, skipped_data, marker["config"]
            )
        except OSError as error:
            raise Unavailable(f"cannot read checkpoint {self.place}/{folder}: {error}; {advice}") from None
        except (ValueError, KeyError, TypeError) as error:
            reason = f"{MARKER} is no marker of this version ({type(error).__name__}: {error})"
            raise DamagedCheckpoint(f"checkpoint {self.place}/{folder} is damaged: {reason}; {advice}") from None
        for name, size in expected.items():
            if sizes.get(name) != size:
                state = f"has {sizes[name]} bytes" if name in sizes else "is missing"
                raise DamagedCheckpoint(
                    f"checkpoint {checkpoint.path} is damaged: {name} {state}, its marker says {size}; {advice}"
                )
        return checkpoint

    def begin(self, step: int, size_bytes: int) -> None:
        """An empty folder for a step's files; what a killed save left there is removed.

        Raises:
            OSError: it cannot be made, or there is no room for `size_bytes`; or another training has been here, because
                a run has set aside what is of later steps than it goes on from.
        """
        if MARKER in self.place.files(self.name(step)):
            raise OSError(
                f"{self.place} has a complete checkpoint of step {step}: another training writes there, too; end one "
                f"of them, or give it another checkpoint.remote and run_dir"
            )
        self.place.remove(self.name(step), first=MARKER)
        free = self.place.free_bytes()
        if free is not None and free < size_bytes * FREE_SPACE_MARGIN:
            raise OSError(
                f"a checkpoint takes {size_bytes * FREE_SPACE_MARGIN / 1e9:.2f} GB and {self.place} has "
                f"{free / 1e9:.2f} GB free"
            )
        self.place.create(self.name(step))

    def complete(
        self, step: int, world_size: int, inputs: RunInputs, skipped_data: Sequence[int], config: RunConfig
    ) -> None:
        """Writes the marker, after all ranks have written their files.

        Raises:
            OSError: it cannot be written, or a rank's file is not there.
        """
        files = self.place.files(self.name(step))
        missing = [name for name in (INDEX, *map(shard_name, range(world_size))) if name not in files]
        if missing:
            raise OSError(
                f"{len(missing)} of {world_size + 1} files are not at {self.place}/{self.name(step)}, such as "
                f"{missing[0]}; all nodes must write to the same place"
            )
        marker = {
            "step": step,
            "world_size": world_size,
            "tokenizer_hash": inputs.tokenizer_hash,
            "data_hashes": inputs.data_hashes,
            "skipped_data": skipped_data,
            "files": files,
            "config": json.loads(dump_config(config)),
        }
        with self.place.writing(self.name(step), MARKER) as path:
            path.write_text(json.dumps(marker, indent=2))

    def discard(self, step: int) -> None:
        """Removes what a failed save left.

        Raises:
            OSError: it cannot be removed.
        """
        self.place.remove(self.name(step), first=MARKER)

    def prune(self) -> None:
        """Removes all complete checkpoints but the newest `keep_last` and those of every `keep_every` steps.

        What killed saves have left before the newest complete one goes, too.

        Raises:
            OSError: one cannot be removed.
        """
        steps = self._steps()
        complete = [step for step, is_complete in steps if is_complete]
        kept = {step for step in complete if self.options.keep_every and step % self.options.keep_every == 0}
        kept |= set(complete[-self.options.keep_last :])
        for step, _ in steps:
            if step not in kept and step < complete[-1]:
                self.place.remove(self.name(step), first=MARKER)

    def set_aside_after(self, step: int) -> list[str]:
        """Renames the checkpoints of later steps, so that a run that goes back does not mix with what it left."""
        aside = []
        for later in (other for other in self.complete_steps() if other > step):
            target = f"abandoned_{self.name(later)}_{time.strftime('%Y%m%dT%H%M%S')}"
            self.place.rename(self.name(later), target)
            aside.append(f"{self.place}/{target}")
        return aside


def check_same_tokenizer(checkpoint: Checkpoint, tokenizer_hash: str) -> None:
    """Compares the tokenizer of a run with the one that a checkpoint was trained with.

    Raises:
        UserError: they differ.
    """
    before = checkpoint.inputs.tokenizer_hash
    if before != tokenizer_hash:
        raise UserError(
            f"checkpoint {checkpoint.path} was trained with tokenizer {before}, tokenizer.path now holds "
            f"{tokenizer_hash}; restore that tokenizer or start {checkpoint.another_place}"
        )


def check_same_data(checkpoint: Checkpoint, data: DataSection, data_hashes: Sequence[str]) -> None:
    """Compares a run's data sets with those that a checkpoint was trained on: others would have another order.

    Raises:
        UserError: one differs, with both hashes.
    """
    for source, before, now in zip(data.all_sources, checkpoint.inputs.data_hashes, data_hashes, strict=True):
        if before != now:
            raise UserError(
                f"checkpoint {checkpoint.path} was trained on data with content_hash {before}, {source.place} now has "
                f"{now}; restore that data set, or start {checkpoint.another_place} (train.init_from takes an export's "
                f"weights)"
            )


def check_same_run(checkpoint: Checkpoint, config: RunConfig) -> list[str]:
    """Compares a checkpoint's config with the run's; returns the accepted differences as sentences.

    Raises:
        UserError: a difference that would make it another training, with both values, or an option that is no more.
    """
    accepted = []
    place = f"the config of checkpoint {checkpoint.path}"
    for key, before, now in differences_since(checkpoint.config, config, place):
        if not any(fnmatchcase(key, allowed) or fnmatchcase(key, f"{allowed}.*") for allowed in MAY_CHANGE):
            raise UserError(
                f"checkpoint {checkpoint.path} was written with {key} = {json.dumps(before)}, the run has "
                f"{json.dumps(now)}; restore the value or start {checkpoint.another_place}"
            )
        accepted.append(f"{key}: {json.dumps(before)} -> {json.dumps(now)}")
    return accepted
