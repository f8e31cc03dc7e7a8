"""Trains a run and writes where the host waited for its GPU: `python -m tests.train.gpu_run CONFIG WAITS.json`."""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import star_dist
from star_dist.config import RunConfig, load_config
from star_dist.process import prepare_process_environment


def main(config_path: str, waits_path: str) -> None:
    config = load_config(RunConfig, config_path)
    process = prepare_process_environment(config.train.omp_threads)

    import deepspeed
    import torch

    from star_dist.train.run import train

    waits: Counter[str] = Counter()

    def note(message: Warning | str, *_: Any, **__: Any) -> None:
        """Counts a wait where our code made it; those that DeepSpeed makes by itself are left out."""
        stack = traceback.extract_stack()
        ours, theirs = (frames_of(package, stack) for package in (star_dist, deepspeed))
        if "synchronizing" in str(message) and ours and ours[-1] > max(theirs, default=-1):
            places = [f"{Path(stack[i].filename).name}:{stack[i].lineno}" for i in ours[:-4:-1]]
            waits[" < ".join(places)] += 1

    warnings.simplefilter("always")
    warnings.showwarning = note
    torch.cuda.set_sync_debug_mode("warn")
    train(config, process)
    Path(waits_path).write_text(json.dumps(waits, indent=2))


def frames_of(package: Any, stack: traceback.StackSummary) -> list[int]:
    folder = Path(package.__file__).parent
    return [i for i, frame in enumerate(stack) if Path(frame.filename).is_relative_to(folder)]


if __name__ == "__main__":
    main(*sys.argv[1:])
