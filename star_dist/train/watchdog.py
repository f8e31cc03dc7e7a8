"""Ends a training that stands still, after writing where every rank stands."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from star_dist.cli import HANG_EXIT
from star_dist.files import training_goes_on

CHECKS_PER_TIMEOUT = 20
OTHER_RANKS_WAIT_S = 5.0
FROZEN_MARGIN_S = 30.0


class Watchdog:
    """Expects `beat` at least every `timeout_s`; 0 switches it off.

    Each rank watches itself: when one hangs, all wait for it, so all find the same within one check and write
    RUN/stacks/rank_00000.txt. A rank whose interpreter is frozen inside a library cannot run a thread; faulthandler,
    which needs none, writes its stacks FROZEN_MARGIN_S later.
    """

    def __init__(self, timeout_s: float, run_dir: Path, rank: int, on_hang: Callable[[str], None]) -> None:
        self._timeout_s = timeout_s
        self._path = run_dir / "stacks" / f"rank_{rank:05d}.txt"
        self._rank = rank
        self._on_hang = on_hang
        self._last_s = time.monotonic()
        self._doing = "the first step"

    def beat(self, doing: str) -> None:
        """Says that something was finished; `doing`: what comes next, for the message."""
        self._last_s, self._doing = time.monotonic(), doing

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        if not self._timeout_s:
            yield
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        ended = threading.Event()
        with self._path.open("w") as file:
            thread = threading.Thread(target=self._watch, args=(file, ended), name="watchdog", daemon=True)
            self.beat(self._doing)
            thread.start()
            try:
                yield
            finally:
                ended.set()
                thread.join()
                faulthandler.cancel_dump_traceback_later()

    def _watch(self, file, ended: threading.Event) -> None:
        period_s = self._timeout_s / CHECKS_PER_TIMEOUT
        while not ended.wait(period_s):
            faulthandler.dump_traceback_later(self._timeout_s + FROZEN_MARGIN_S, file=file, exit=True)
            silent_s = time.monotonic() - self._last_s
            if silent_s > self._timeout_s:
                waited = f"nothing finished for {silent_s:.0f} s (health.hang_timeout_s)"
                message = f"rank {self._rank}: {waited} in {self._doing}"
                with training_goes_on(self._path):  # a full disk costs the stacks, and not the end
                    file.write(message + "\n")
                    file.flush()
                    faulthandler.dump_traceback(file=file, all_threads=True)
                    os.fsync(file.fileno())
                print(f"error: {message}; stacks in {self._path}", file=sys.stderr, flush=True)
                self._on_hang(message)
                time.sleep(period_s + OTHER_RANKS_WAIT_S)  # the launcher ends the others as soon as this one is gone
                os._exit(HANG_EXIT)
