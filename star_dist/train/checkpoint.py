"""Checkpoints on disk: complete or absent. Imports no torch, so that status commands can read them at once.

    RUN/checkpoints/step_00001000/    the engine's files
                    …/complete.json   the marker: written last, removed first; sizes of all files, the run's config

A folder without marker is what a killed save left behind; the next save of that step starts it anew.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from star_dist.config import RunConfig, dump_config
from star_dist.errors import UserError
from star_dist.run_folder import differences

MARKER = "complete.json"

# What may change between a checkpoint and the run that goes on from it: nothing here changes what is computed from
# the same position on, except train.steps, which stretches the learning-rate schedule, and train.micro_batch and
# model.attention, which change the order of float sums.
MAY_CHANGE = (
    "name",
    "run_dir",
    "checkpoint",
    "validation",
    "samples",
    "logging",
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
    "tokenizer.path",  # the marker records the hash of the weights behind it
    "train.steps",
    "train.micro_batch",
    "train.activation_checkpointing",
    "train.init_from",
    "train.omp_threads",
    "model.attention",
)


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: optimizer steps done, by how many ranks it was written, hash of the run's tokenizer."""

    path: Path
    step: int
    world_size: int
    tokenizer_hash: str
    config: dict[str, Any]


class CheckpointFolder:
    """All checkpoints of a run."""

    def __init__(self, run_dir: Path) -> None:
        self.root = run_dir / "checkpoints"

    def path(self, step: int) -> Path:
        return self.root / f"step_{step:08d}"

    def complete_steps(self) -> list[int]:
        """Steps with a complete checkpoint, oldest first."""
        if not self.root.is_dir():
            return []
        matches = (re.fullmatch(r"step_(\d{8,})", path.name) for path in self.root.iterdir())
        return sorted(int(match[1]) for match in matches if match and (self.root / match[0] / MARKER).is_file())

    def find(self, step: int | None) -> Checkpoint | None:
        """The checkpoint of a step, or with None the newest complete one, if there is any.

        Raises:
            UserError: the demanded step has no complete checkpoint, or a file is missing or cut short.
        """
        steps = self.complete_steps()
        if step is None:
            return self._open(steps[-1]) if steps else None
        if step not in steps:
            raise UserError(f"checkpoint.resume_step is {step}, but {self.root} has complete checkpoints {steps}")
        return self._open(step)

    def _open(self, step: int) -> Checkpoint:
        path = self.path(step)
        marker = json.loads((path / MARKER).read_text())
        for name, size in marker["files"].items():
            found = (path / name).stat().st_size if (path / name).is_file() else None
            if found != size:
                state = "is missing" if found is None else f"has {found} bytes"
                others = [other for other in self.complete_steps() if other != step]
                raise UserError(
                    f"checkpoint {path} is damaged: {name} {state}, its marker says {size}; set "
                    f"checkpoint.resume_step to another complete one ({others}) or remove the folder"
                )
        return Checkpoint(path, step, marker["world_size"], marker["tokenizer_hash"], marker["config"])

    def begin(self, step: int) -> Path:
        """An empty folder for a step's files; what an earlier save left there is removed, marker first."""
        self._remove(step)
        path = self.path(step)
        path.mkdir(parents=True)
        return path

    def complete(self, step: int, world_size: int, tokenizer_hash: str, config: RunConfig) -> None:
        """Writes the marker, after all ranks have written and flushed their files."""
        path = self.path(step)
        files = sorted(file for file in path.rglob("*") if file.is_file())
        for file in files:
            _sync(file)
        for folder in {file.parent for file in files}:
            _sync(folder)
        marker = {
            "step": step,
            "world_size": world_size,
            "tokenizer_hash": tokenizer_hash,
            "files": {str(file.relative_to(path)): file.stat().st_size for file in files},
            "config": json.loads(dump_config(config)),
        }
        partial = path / f"{MARKER}.partial"
        partial.write_text(json.dumps(marker, indent=2))
        _sync(partial)
        os.replace(partial, path / MARKER)
        _sync(path)
        _sync(self.root)

    def keep_last(self, count: int) -> None:
        """Removes all but the newest `count` complete checkpoints."""
        for step in self.complete_steps()[:-count]:
            self._remove(step)

    def set_aside_after(self, step: int) -> list[Path]:
        """Renames the checkpoints of later steps, so that a run that goes back does not mix with what it left."""
        aside = []
        for later in (other for other in self.complete_steps() if other > step):
            target = self.root / f"abandoned_{self.path(later).name}_{time.strftime('%Y%m%dT%H%M%S')}"
            self.path(later).rename(target)
            aside.append(target)
        return aside

    def _remove(self, step: int) -> None:
        (self.path(step) / MARKER).unlink(missing_ok=True)
        if self.path(step).exists():
            shutil.rmtree(self.path(step))


def check_same_tokenizer(checkpoint: Checkpoint, tokenizer_hash: str) -> None:
    """Compares the tokenizer of a run with the one that a checkpoint was trained with.

    Raises:
        UserError: they differ.
    """
    if checkpoint.tokenizer_hash != tokenizer_hash:
        raise UserError(
            f"checkpoint {checkpoint.path} was trained with tokenizer {checkpoint.tokenizer_hash}, tokenizer.path now "
            f"holds {tokenizer_hash}; restore that tokenizer or start another run_dir"
        )


def check_same_run(checkpoint: Checkpoint, config: RunConfig) -> list[str]:
    """Compares a checkpoint's config with the run's; returns the accepted differences as sentences.

    Raises:
        UserError: a difference that would make it another training, with both values.
    """
    accepted = []
    for key, before, now in differences(checkpoint.config, json.loads(dump_config(config))):
        if not any(fnmatchcase(key, allowed) or fnmatchcase(key, f"{allowed}.*") for allowed in MAY_CHANGE):
            raise UserError(
                f"checkpoint {checkpoint.path} was written with {key} = {json.dumps(before)}, the run has "
                f"{json.dumps(now)}; restore the value or start another run_dir"
            )
        accepted.append(f"{key}: {json.dumps(before)} -> {json.dumps(now)}")
    return accepted


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
