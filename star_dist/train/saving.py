"""Saving while training goes on: a copy on the CPU, a thread that writes it, a marker when every rank has written.

A save that fails anywhere (a full disk, a broken upload) is reported and dropped; the last good checkpoint stays.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from star_dist.config import RunConfig
from star_dist.train.checkpoint import CheckpointFolder, RunInputs
from star_dist.train.control import ControlGroup
from star_dist.train.sharded_state import ShardedState
from star_dist.train.shards import write_index, write_shard


class CheckpointSaver:
    """Writes the run's checkpoints, one at a time, and removes old ones.

    skipped_data: the list that the run adds to. `on_saved(step)`, `on_failed(step, reason)` and
    `on_prune_failed(reason)` report on rank 0.

    All methods but `num_written` are for all ranks together.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: CheckpointFolder,
        state: ShardedState,
        control: ControlGroup,
        rank: int,
        inputs: RunInputs,
        skipped_data: Sequence[int],
        on_saved: Callable[[int], None],
        on_failed: Callable[[int, str], None],
        on_prune_failed: Callable[[str], None],
    ) -> None:
        self._config, self._folder, self._state, self._control = config, folder, state, control
        self._rank, self._inputs, self._skipped_data = rank, inputs, skipped_data
        self._on_saved, self._on_failed, self._on_prune_failed = on_saved, on_failed, on_prune_failed
        self._pieces = control.gather(state.pieces)
        self._thread: threading.Thread | None = None
        self._step = 0
        self._error: str | None = None
        self._pruning: threading.Thread | None = None  # on rank 0
        self._prune_error: str | None = None
        self.num_started = 0

    @property
    def num_written(self) -> int:
        """Saves whose files this rank has written, or failed to."""
        return self.num_started - (self._thread is not None and self._thread.is_alive())

    def start(self, step: int, *, wait: bool) -> bool:
        """Takes a copy of the state and writes it beside the training, or right now; False if it is known to fail."""
        self.settle()
        error = self._first_error(self._attempt(self._begin, step) if self._rank == 0 else None)
        if error is not None:
            self._report_failed(step, error)
            return False
        tensors, scalars = self._state.snapshot()

        def write() -> None:
            place, folder = self._folder.place, self._folder.name(step)
            write_shard(place, folder, self._rank, tensors)
            if self._rank == 0:
                write_index(place, folder, self._state.shapes, self._pieces, scalars)

        def run() -> None:
            self._error = self._attempt(write)

        self._step = step
        self._thread = threading.Thread(target=run, name=f"checkpoint {step}")
        self._thread.start()
        self.num_started += 1
        return self.settle() if wait else True

    def settle(self) -> bool:
        """`finish`, and waits until old checkpoints are removed."""
        saved = self.finish()
        self._end_pruning()
        return saved

    def finish(self) -> bool:
        """Waits for the save under way, if there is one, and makes it complete; False if it failed.

        Old checkpoints are removed afterwards, beside the training.
        """
        if self._thread is None:
            return True
        self._end_pruning()
        self._thread.join()
        self._thread = None
        step = self._step
        error = self._first_error(self._error)
        if error is None:
            error = self._first_error(self._attempt(self._complete, step) if self._rank == 0 else None)
        if error is not None:
            if self._rank == 0:  # before it is reported: the report may lie on the disk that was full
                self._attempt(self._folder.discard, step)
            self._report_failed(step, error)
            return False
        if self._rank == 0:
            self._on_saved(step)
            self._pruning = threading.Thread(target=self._prune, name=f"prune after {step}")
            self._pruning.start()
        return True

    def _prune(self) -> None:
        """Beside the training: removing a large checkpoint takes a while, and all ranks would wait for this one."""
        self._prune_error = self._attempt(self._folder.prune)

    def _end_pruning(self) -> None:
        if self._pruning is None:
            return
        self._pruning.join()
        self._pruning = None
        if self._prune_error is not None:
            self._on_prune_failed(self._prune_error)

    def _begin(self, step: int) -> None:
        self._folder.begin(step, self._state.size_bytes)

    def _complete(self, step: int) -> None:
        self._folder.complete(step, self._control.size, self._inputs, self._skipped_data, self._config)

    def _first_error(self, error: str | None) -> str | None:
        """The error of the first rank that has one; None, on all, where none has."""
        errors = enumerate(self._control.gather(error))
        return next((f"rank {rank}: {found}" for rank, found in errors if found is not None), None)

    def _report_failed(self, step: int, error: str) -> None:
        if self._rank == 0:
            self._on_failed(step, error)

    @staticmethod
    def _attempt(action: Callable[..., None], *arguments: object) -> str | None:
        """Runs what may fail for want of space or network; the reason if it did."""
        try:
            action(*arguments)
        except Exception as error:  # a thread's exception would end nobody's training, but leave its save undecided
            return str(error) or type(error).__name__
        return None
