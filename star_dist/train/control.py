"""What ranks tell one another beside the training's own traffic: small values, over gloo, from and to the host.

A group of its own, so that no message waits for a GPU and none mixes with the engine's.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed

# Ranks wait here for one that writes or draws for long; ranks that hang are the watchdog's to end.
TIMEOUT = timedelta(days=1)


class ControlGroup:
    """All ranks of the run."""

    def __init__(self) -> None:
        self._group = torch.distributed.new_group(backend="gloo", timeout=TIMEOUT)
        self.size = torch.distributed.get_world_size()
        self._posted: tuple[torch.Tensor, torch.distributed.Work] | None = None  # a sum under way

    def exchange(self, values: Sequence[float]) -> list[float] | None:
        """Starts a sum of every rank's values, and returns that of the call before (None at the first).

        The sum runs beside the step that follows, so no rank waits for another here. All ranks get the same answer at
        the same call.
        """
        before, self._posted = self._posted, None
        sums = torch.tensor(values, dtype=torch.float64)
        self._posted = sums, torch.distributed.all_reduce(sums, group=self._group, async_op=True)
        if before is None:
            return None
        answer, work = before
        work.wait()
        return answer.tolist()

    def finish_exchange(self) -> list[float]:
        """The answer that `exchange` has under way, for a loop that starts anew: its next call is a first one."""
        answer, work = self._posted
        self._posted = None
        work.wait()
        return answer.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order. Waits for all ranks."""
        values: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(values, value, group=self._group)
        return values
