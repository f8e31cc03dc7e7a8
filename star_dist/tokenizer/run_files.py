"""What a tokenizer's training keeps in its run folder, and whether a folder holds the run that is asked for.

training.json         the resolved configuration
metrics.jsonl         one line per report
reconstructions.png   pictures over what the tokenizer makes of them
unreadable.jsonl      pictures that were skipped, with the reason
checkpoint.pt         where a resumed run goes on
config.json, model.safetensors    the finished tokenizer (`star_dist.tokenizer.io`)
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import torch

from star_dist.config import TokenizerTrainConfig
from star_dist.errors import Unavailable, UserError, first_line
from star_dist.files import LOST_FILE_SYSTEM, read_json_object, sync_to_disk
from star_dist.run_folder import differences_since
from star_dist.tokenizer.io import CONFIG_FILE
from star_dist.weights import writing

TRAINING_FILE = "training.json"
PICTURE_FILE = "reconstructions.png"
UNREADABLE_FILE = "unreadable.jsonl"
CHECKPOINT_FILE = "checkpoint.pt"

# Options that a resumed run may change: they decide what is written and how fast, never what is learned.
FREE_OPTIONS = {
    "run_dir",
    "data.num_workers",
    "data.keep_in_memory",
    "checkpoint_every",
    "log_every",
    "sample_pictures",
    "omp_threads",
}


def check_same_run(run_dir: Path, config: TokenizerTrainConfig) -> None:
    """Compares with the configuration that a run folder was begun with.

    Raises:
        UserError: naming the first option that differs, with both values, or one that is no more.
    """
    if not any((run_dir / name).is_file() for name in (CONFIG_FILE, CHECKPOINT_FILE)):
        return
    absent = f"{run_dir} holds a tokenizer but no {TRAINING_FILE}; change run_dir"
    path = run_dir / TRAINING_FILE
    for key, before, now in differences_since(read_json_object(path, absent), config, str(path)):
        if key not in FREE_OPTIONS:
            raise UserError(
                f"{run_dir} was begun with {key} {before}, this configuration has {now}; "
                f"change it back, or change run_dir to start anew"
            )


def write_checkpoint(run_dir: Path, state: dict[str, Any]) -> None:
    """Replaces the checkpoint; it is on the disk when this returns.

    Raises:
        OSError: it cannot be written; the one before stays.
    """
    path = run_dir / CHECKPOINT_FILE
    partial = path.with_suffix(".partial")  # always the same, so that no kill leaves more than one
    try:
        with writing(path):
            with partial.open("wb") as file:
                torch.save(state, file)
            sync_to_disk(partial)
            os.replace(partial, path)
            sync_to_disk(run_dir)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def read_checkpoint(run_dir: Path) -> dict[str, Any] | None:
    """The state that `write_checkpoint` wrote, on the CPU, or None where there is none.

    Raises:
        UserError: it is damaged, or may not be read. Unavailable: its storage fails.
    """
    path = run_dir / CHECKPOINT_FILE
    if not path.is_file():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the reader checks little: damaged files end in errors of any kind
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # which seeking in a cut file ends in
            kind = Unavailable if error.errno in LOST_FILE_SYSTEM else UserError
            raise kind(f"cannot read {path}: {error.strerror}") from None
        raise UserError(f"{path} is damaged ({first_line(error)}); remove it to start anew") from None
