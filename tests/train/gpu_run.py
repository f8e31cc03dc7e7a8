"""Trains a run and writes where the host waited for its GPU: `python -m tests.train.gpu_run CONFIG WAITS.json`."""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def main(config_path: str, waits_path: str) -> None:
    import torch

    from star_dist.config import RunConfig, load_config
    from star_dist.process import prepare_process_environment
    from star_dist.train.run import train

    waits: Counter[str] = Counter()

    def note(message: Warning | str, *rest: Any, **more: Any) -> None:
        if "synchronizing" in str(message):
            ours = [frame for frame in traceback.extract_stack() if Path(frame.filename).is_relative_to(ROOT)]
            waits[" < ".join(f"{Path(f.filename).name}:{f.lineno} {f.line}" for f in ours[-2:-5:-1])] += 1

    config = load_config(RunConfig, config_path)
    process = prepare_process_environment(config.train.omp_threads)
    warnings.simplefilter("always")
    warnings.showwarning = note
    torch.cuda.set_sync_debug_mode("warn")
    train(config, process)
    Path(waits_path).write_text(json.dumps(waits, indent=2))


if __name__ == "__main__":
    main(*sys.argv[1:])
