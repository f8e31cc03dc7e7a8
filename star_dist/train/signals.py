"""What asks a training to save or to end: signals, a launcher's death, files named STOP or SAVE in its run folder.

Nothing is done in a signal handler: it notes the request, the ranks agree on it at a step boundary, all save the same
step, and all end with the same exit code. Signals may reach one rank or all of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from star_dist.cli import INTERRUPTED_EXIT, PREEMPTED_EXIT
from star_dist.files import training_goes_on

LAUNCHER_VARIABLES = {"TORCHELASTIC_RUN_ID", "LOCAL_SIZE"}  # of torchrun and of deepspeed
PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal for a process whose parent has died
FILE_CHECK_S = 1.0  # a look at a shared file system costs time


@dataclass(frozen=True)
class Request:
    """exit_code: how the training ends after saving; None: it saves and goes on."""

    name: str
    exit_code: int | None


# In order of precedence where several come together.
REQUESTS = (
    Request("STOP file", 0),
    Request("SIGINT", INTERRUPTED_EXIT),
    Request("SIGTERM", PREEMPTED_EXIT),
    Request("SIGUSR1", PREEMPTED_EXIT),
    Request("death of the launcher", PREEMPTED_EXIT),
    Request("SAVE file", None),
)
SIGNALS = {request.name: getattr(signal, request.name) for request in REQUESTS if request.name.startswith("SIG")}


class RequestListener:
    """Notes requests to this rank; rank 0 also looks for the files."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        self._files = {f"{name} file": run_dir / name for name in ("STOP", "SAVE")} if rank == 0 else {}
        # A launcher that is killed leaves its ranks running, where the next start finds them in its way.
        self._launcher = os.getppid() if LAUNCHER_VARIABLES & os.environ.keys() else None
        self._noted: set[str] = set()
        self._first_step_done = threading.Event()
        self._next_look_s = 0.0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Takes the signals over; a second one of a kind does what it always did, for people in a hurry.

        Processes forked meanwhile (the loader's workers) leave them to this one, and die with it.
        """
        before = {number: signal.getsignal(number) for number in SIGNALS.values()}
        _keep_children_out(os.getpid())

        def note(number: int, _: object) -> None:
            self._noted.add(signal.Signals(number).name)
            if number == signal.SIGINT:
                signal.signal(number, before[number])

        for number in SIGNALS.values():
            signal.signal(number, note)
        if self._launcher is not None:
            threading.Thread(target=self._end_a_start_without_launcher, daemon=True).start()
        try:
            yield
        finally:
            self._first_step_done.set()
            for number, handler in before.items():
                signal.signal(number, handler)

    @property
    def _has_lost_its_launcher(self) -> bool:
        return self._launcher is not None and os.getppid() != self._launcher

    def _end_a_start_without_launcher(self) -> None:
        """Ends this process if its launcher dies before the first step is done.

        There is nothing to save yet, and ranks that have lost others would wait for them for half an hour, holding the
        locks of the run folder and of the cache.
        """
        while not self._first_step_done.wait(FILE_CHECK_S):
            if self._has_lost_its_launcher:
                print("error: the launcher has died before the first step; start again", file=sys.stderr, flush=True)
                os._exit(PREEMPTED_EXIT)

    def noted(self) -> list[float]:
        """One number per entry of REQUESTS, 1 where this rank was asked since the last call; removes the files.

        Called at the end of every step.
        """
        self._first_step_done.set()
        if self._files and time.monotonic() >= self._next_look_s:
            self._next_look_s = time.monotonic() + FILE_CHECK_S
            for name, path in self._files.items():
                with training_goes_on(path):  # a file system that is away for a while ends nothing
                    if path.exists():
                        path.unlink()
                        self._noted.add(name)
        if self._has_lost_its_launcher:
            self._noted.add("death of the launcher")
            self._launcher = None
        noted = [float(request.name in self._noted) for request in REQUESTS]
        self._noted.clear()
        return noted

    def note_again(self, counts: list[float]) -> None:
        """Puts back requests whose sums over all ranks nobody has acted on."""
        self._noted |= {request.name for request, count in zip(REQUESTS, counts) if count}

    @staticmethod
    def agreed(counts: list[float]) -> Request | None:
        """The request to act on, from the sums of `noted` over all ranks."""
        return next((request for request, count in zip(REQUESTS, counts) if count), None)


def _keep_children_out(parent: int) -> None:
    """Children of a process ignore what asks the training to end, and are killed as soon as it is gone.

    A loader worker whose rank was killed would wait for it inside streaming's shared memory for ever, and count as
    one of the next start's workers there.
    """
    libc = ctypes.CDLL(None)

    def in_child() -> None:
        if os.getppid() != parent:
            return
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the loader's workers: leave_sigterm_to_the_rank
        if sys.platform == "linux":
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    os.register_at_fork(after_in_child=in_child)
