"""The time a rank spends on what it does alone: in lockstep all have the same step time, and this tells them apart."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch


class OwnTime:
    """Sums the time of measured sections: on a GPU by its own clock, without waiting for it until `total_s`."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._host_s = 0.0

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        """Counts what happens inside: nothing that waits for other ranks may."""
        if not self._cuda:
            start_s = time.perf_counter()
            yield
            self._host_s += time.perf_counter() - start_s
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        yield
        end.record()
        self._events.append((start, end))

    def add(self, seconds: float) -> None:
        """Counts time of the host."""
        self._host_s += seconds

    def total_s(self) -> float:
        """All sections so far; waits for the last one."""
        if self._events:
            self._events[-1][1].synchronize()
        return self._host_s + sum(start.elapsed_time(end) for start, end in self._events) / 1000


def slowest_rank(own_s: list[float], steps: int) -> dict[str, float]:
    """The rank with the most time of its own, and by how much: per step, from every rank's sum over `steps`."""
    slowest = max(range(len(own_s)), key=own_s.__getitem__)
    return {
        "time/slowest_rank": slowest,
        "time/slowest_rank_own_s": own_s[slowest] / steps,
        "time/mean_rank_own_s": sum(own_s) / len(own_s) / steps,
    }
