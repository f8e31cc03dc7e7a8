"""What both kinds of training do with PyTorch's loader."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

from star_dist.errors import UserError

Batch = TypeVar("Batch")


def next_batch(batches: Iterator[Batch]) -> Batch:
    """The next batch of a loader.

    Raises:
        UserError: a worker's own, in one line; the loader sends it with the worker's traceback before the message.
    """
    try:
        return next(batches)
    except UserError as error:
        kind = type(error)
        prefix = f"{kind.__module__}.{kind.__qualname__}: "
        raise kind(str(error).strip().splitlines()[-1].removeprefix(prefix)) from None


def leave_sigterm_to_the_rank(_: int, last: Callable[[], None] = lambda: None) -> None:
    """A loader's `worker_init_fn`: the worker ends on a SIGTERM of its rank only, after it has called `last`.

    Launchers send it to every process below them (torchrun to process groups, DeepSpeed to all descendants), and a rank
    that finishes its step and saves needs its workers until then. A rank sends it to a worker that is still busy 5 s
    after it was told to end.
    """
    rank = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != rank:
            pass
        last()
        os._exit(0)

    threading.Thread(target=wait, name="SIGTERM", daemon=True).start()
