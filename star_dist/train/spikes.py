"""Steps whose loss is far off: found without waiting for the device, written down, and by option trained around."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from star_dist.config import HealthSection
from star_dist.files import append_json_line, training_goes_on, write_text_atomically

SPIKES_FILE = "spikes.jsonl"
SKIPPED_FILE = "skipped_data.json"
REMEMBERED_STEPS = 8  # of sample ids; a verdict comes two steps late


@dataclass(frozen=True)
class Spike:
    """step: counted from 0. loss: the step's mean per token. mean, deviation: of the steps before it. highest: the
    highest loss that is no spike, infinite where too few are known."""

    step: int
    loss: float
    mean: float
    deviation: float
    highest: float


class StepLosses:
    """This rank's summed loss of each step, fetched from the device one step late so that nobody waits for it, and of
    how many samples it is."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_device = torch.zeros((), device=device)
        self._ids: deque[tuple[int, list[int]]] = deque(maxlen=REMEMBERED_STEPS)
        self._fetching: tuple[Tensor, torch.cuda.Event | None, int] = torch.zeros(()), None, 0
        self._step_ids: list[int] = []
        self._samples = 0

    def add(self, loss_sum: Tensor, samples: int, sample_ids: tuple[int, ...]) -> None:
        """A micro-batch's loss, summed over the tokens of so many samples; sample_ids: of the absent ones, too."""
        self._on_device = self._on_device + loss_sum
        self._samples += samples
        self._step_ids.extend(sample_ids)

    def end_step(self, step: int) -> tuple[float, int]:
        """The sum of the step before, and its samples; zeros at the first."""
        self._ids.append((step, self._step_ids))
        before, event, samples = self._fetching
        if self._device.type == "cuda":
            host = torch.empty((), pin_memory=True).copy_(self._on_device, non_blocking=True)
            now = torch.cuda.Event()
            now.record()
            self._fetching = host, now, self._samples
        else:
            self._fetching = self._on_device, None, self._samples
        self._on_device, self._step_ids, self._samples = torch.zeros((), device=self._device), [], 0
        if event is not None:
            event.synchronize()
        return before.item(), samples

    def sample_ids(self, step: int) -> list[int]:
        """This rank's samples of one of the last steps."""
        return next((ids for other, ids in self._ids if other == step), [])


class SpikeDetector:
    """Compares each step's loss with those before it; the same on all ranks, because the losses are."""

    def __init__(self, options: HealthSection) -> None:
        self._options = options
        self._window: deque[float] = deque(maxlen=options.spike_window)

    def judge(self, step: int, loss: float) -> Spike | None:
        """The spike that a step is, if it is one; else the step joins those that the next ones are compared with."""
        known = len(self._window) >= self._options.spike_window // 4
        mean = statistics.fmean(self._window) if self._window else math.nan
        deviation = statistics.pstdev(self._window) if self._window else math.nan
        highest = mean + self._options.spike_sigmas * deviation if known else math.inf
        if not math.isfinite(loss) or loss > highest:
            return Spike(step, loss, mean, deviation, highest)
        self._window.append(loss)
        return None

    def stays(self, spike: Spike) -> None:
        """The run goes on from a spike. It joins the others as the highest loss that is none, so that a level that
        lasts becomes the usual one."""
        if math.isfinite(spike.loss):
            self._window.append(min(spike.loss, spike.highest))


class SkippedData:
    """Steps of data that the run leaves out: RUN/skipped_data.json and every checkpoint, both read at a start.

    Without any, training step s uses data step s.
    """

    def __init__(self, run_dir: Path, of_checkpoint: Sequence[int] = ()) -> None:
        self._path = run_dir / SKIPPED_FILE
        here = json.loads(self._path.read_text()) if self._path.is_file() else []
        self.steps: list[int] = sorted({*here, *of_checkpoint})

    def data_step(self, step: int) -> int:
        """The data step that a training step uses."""
        for skipped in sorted(self.steps):
            step += skipped <= step
        return step

    def add(self, step: int, *, write: bool) -> None:
        """Leaves out the data of a training step from now on; `write`: on one rank."""
        self.steps.append(self.data_step(step))
        if write:
            with training_goes_on(self._path):
                write_text_atomically(self._path, json.dumps(self.steps))


def record_spike(run_dir: Path, spike: Spike, sample_ids: list[list[int]], action: str) -> None:
    """Adds a line to RUN/spikes.jsonl; `sample_ids` are those of every rank."""
    values = {name: value if math.isfinite(value) else str(value) for name, value in vars(spike).items()}  # not null
    line = values | {"time": time.time(), "action": action, "sample_ids": sample_ids}
    append_json_line(run_dir / SPIKES_FILE, line)
