"""The history of a run in one file, RUN/facts.jsonl: starts, checkpoints, ends; and what follows from it.

Imports no torch, because status and retry commands read it. One event per line; times are seconds since the epoch.

    start       step, ranks, host, job, last_step (the last one trained before, by whatever trace is left of it)
    checkpoint  step, train_s (seconds of this attempt that went into steps)
    save_failed, prune_failed, spike, rollback
    end         step, train_s, reason: an attempt that ended in order, or by an error it could still report;
                exit_code: in order or by a user's mistake, else null
    mistake     rank, reason, exit_code: the UserError of a rank that wrote no `end`, such as before the start
    failed      exit_code, job: written by launcher/retry.py after an attempt

A disk that is full costs events, and never the training.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from star_dist.errors import RunEnded, UserError, first_line
from star_dist.files import append_json_line, read_json_lines, training_goes_on, write_text_atomically
from star_dist.run_folder import METRICS_FILE

FACTS_FILE = "facts.jsonl"
HEARTBEAT_FILE = "heartbeat.json"
HEARTBEAT_S = 5.0


class FactsLog:
    """Writes events on rank 0; on other ranks it writes their mistakes alone."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        self._run_dir = run_dir
        self._rank = rank
        self._enabled = rank == 0
        self._started = False
        self._beat_s = 0.0
        self._last_end_s = time.perf_counter()
        self._train_s = 0.0
        self._train_s_at: dict[int, float] = {}  # by step of a checkpoint
        self._step = 0
        self._last_step = last_known_step(run_dir) if rank == 0 else 0  # before reports of lost steps are removed

    def write(self, event: str, **values: Any) -> None:
        if self._enabled:
            append_event(self._run_dir, event, **values)

    @contextlib.contextmanager
    def mistakes(self) -> Iterator[None]:
        """Writes the UserError inside down, where no `end` says it: a launcher may lose a rank's exit code."""
        try:
            yield
        except UserError as error:
            if not (self._enabled and self._started):
                append_event(
                    self._run_dir, "mistake", rank=self._rank, reason=first_line(error), exit_code=error.exit_code
                )
            raise

    @contextlib.contextmanager
    def attempt(self, step: int, ranks: int) -> Iterator[None]:
        """What happens inside trains from `step` on; how it ended is written down, where it can still be."""
        self._step = step
        self._last_end_s = time.perf_counter()
        self._started = True
        if self._enabled:
            last = max(step, self._last_step)
            self.write("start", step=step, ranks=ranks, host=platform.node(), job=slurm_job(), last_step=last)
        try:
            yield
        except BaseException as error:
            reason = first_line(error) if isinstance(error, RunEnded) else f"error: {first_line(error)}"
            self._end(reason, error.exit_code if isinstance(error, RunEnded | UserError) else None)
            raise
        self._end("finished", exit_code=0)

    def _end(self, reason: str, exit_code: int | None = None) -> None:
        self.write("end", step=self._step, train_s=self._train_s, reason=reason, exit_code=exit_code)

    def hang(self, message: str) -> None:
        """The last words of the watchdog."""
        self._end(f"hang: {message}")

    def step_ended(self, step: int) -> None:
        """Counts the time since the last step or since `pause_ended`; leaves a trace for whoever comes after a kill."""
        now = time.perf_counter()
        self._train_s += now - self._last_end_s
        self._last_end_s = now
        self._step = step
        if self._enabled and now - self._beat_s > HEARTBEAT_S:
            self._beat_s = now
            values = {"step": step, "train_s": self._train_s, "time": time.time()}
            with training_goes_on(self._run_dir / HEARTBEAT_FILE):
                write_text_atomically(self._run_dir / HEARTBEAT_FILE, json.dumps(values))

    def pause_ended(self) -> None:
        """What was done since the last step (saving, validating, drawing) is no training."""
        self._last_end_s = time.perf_counter()

    def copied(self, step: int) -> None:
        """The state of a step was copied; it counts as kept once `saved`."""
        self._train_s_at[step] = self._train_s

    def saved(self, step: int) -> None:
        self.write("checkpoint", step=step, train_s=self._train_s_at[step])

    def went_back(self, from_step: int, to_step: int) -> None:
        """Steps were thrown away, and the time that went into them."""
        self.write("rollback", step=to_step, lost_steps=from_step - to_step)
        self._step = to_step
        self._train_s = self._train_s_at.get(to_step, 0.0)
        self._last_end_s = time.perf_counter()


def slurm_job() -> str | None:
    """The number of this Slurm job, which it keeps when it is requeued; None outside of one."""
    return os.environ.get("SLURM_JOB_ID")


def append_event(run_dir: Path, event: str, **values: Any) -> None:
    """Adds one event to the facts of a run, where they can be written."""
    append_json_line(run_dir / FACTS_FILE, {"event": event, "time": time.time(), **values})


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """All events, oldest first."""
    return read_json_lines(run_dir / FACTS_FILE)


def read_reports(run_dir: Path) -> list[dict[str, Any]]:
    """All lines of metrics.jsonl, oldest first."""
    return read_json_lines(run_dir / METRICS_FILE)


def heartbeat(run_dir: Path) -> dict[str, Any] | None:
    """The last trace that a running training left: step, train_s and time."""
    try:
        return json.loads((run_dir / HEARTBEAT_FILE).read_text())
    except (OSError, json.JSONDecodeError):
        return None


def last_known_step(run_dir: Path) -> int:
    """The last step trained, from heartbeat and reports; 0 without a trace."""
    beat = heartbeat(run_dir) or {"step": 0}
    return max([beat["step"], *(line["step"] for line in read_reports(run_dir)[-1:])])


@dataclass(frozen=True)
class Summary:
    """restarts: time, reason, from_step and lost_steps of every start but the first.

    useful_s: of steps that were not lost. wall_s: since the first start, up to the last trace. goodput: their ratio.
    """

    restarts: list[dict[str, Any]]
    lost_steps: int
    useful_s: float
    wall_s: float
    goodput: float


def summarize(run_dir: Path) -> Summary:
    """What the events of a run add up to."""
    events = read_events(run_dir)
    attempts: list[list[dict[str, Any]]] = []
    for event in events:
        if event["event"] == "start":
            attempts.append([])
        if attempts:
            attempts[-1].append(event)
    restarts, useful_s = [], 0.0
    for attempt, following in zip(attempts, [*attempts[1:], None]):
        if following is None:
            useful_s += _last_train_s(attempt, heartbeat(run_dir))
            continue
        start = following[0]
        kept = [e for e in attempt if e["event"] in ("checkpoint", "end") and e["step"] <= start["step"]]
        useful_s += kept[-1]["train_s"] if kept else 0.0
        lost = max(start["last_step"] - start["step"], 0)
        restarts.append(
            {"time": start["time"], "reason": _reason(attempt), "from_step": start["step"], "lost_steps": lost}
        )
    lost_steps = sum(restart["lost_steps"] for restart in restarts)
    lost_steps += sum(event["lost_steps"] for event in events if event["event"] == "rollback")
    wall_s = 0.0
    if attempts:
        beat = heartbeat(run_dir)
        wall_s = max(events[-1]["time"], beat["time"] if beat else 0.0) - attempts[0][0]["time"]
    return Summary(restarts, lost_steps, useful_s, wall_s, useful_s / wall_s if wall_s else 0.0)


def failures_without_progress(run_dir: Path) -> int:
    """How many attempts in a row have failed without a checkpoint in between; in a Slurm job those of this job, so that
    one submitted after a job has given up has all its attempts.
    """
    job, count = slurm_job(), 0
    for event in reversed(read_events(run_dir)):
        if event["event"] == "checkpoint":
            break
        count += event["event"] == "failed" and job in (None, event.get("job"))
    return count


def this_job_started_from(run_dir: Path, step: int) -> bool:
    """Whether an earlier start of this Slurm job, which has requeued itself since, began at a step."""
    job = slurm_job() if int(os.environ.get("SLURM_RESTART_COUNT", 0)) else None
    starts = [event for event in read_events(run_dir) if event["event"] == "start"]
    return job is not None and any((event["job"], event["step"]) == (job, step) for event in starts)


def exit_code_since(run_dir: Path, time_s: float) -> int | None:
    """The exit code of an attempt that ended after a moment, in order or by a user's mistake; None if none did.

    A launcher or srun may report another one, because it ends the last ranks itself as soon as the first are gone.
    """
    events = [event for event in read_events(run_dir) if event["time"] >= time_s]
    codes = [event["exit_code"] for event in events if event["event"] in ("end", "mistake")]
    return next((code for code in reversed(codes) if code is not None), None)


def ended_in_order(run_dir: Path) -> bool:
    """Whether the last attempt said itself that it was asked to end; nodes are not to blame then."""
    ends = [event for event in read_events(run_dir) if event["event"] in ("start", "end", "failed")]
    return bool(ends) and ends[-1].get("exit_code") is not None and ends[-1]["event"] == "end"


def _reason(attempt: list[dict[str, Any]]) -> str:
    """Why an attempt ended: what it said itself, else what its job saw."""
    said = [event["reason"] for event in attempt if event["event"] == "end"]
    seen = [f"exit code {event['exit_code']}" for event in attempt if event["event"] == "failed"]
    return next(reversed(said or seen), "killed, or its node was lost")


def _last_train_s(attempt: list[dict[str, Any]], beat: dict[str, Any] | None) -> float:
    known = [event["train_s"] for event in attempt if "train_s" in event]
    if beat is not None and beat["time"] >= attempt[0]["time"]:
        known.append(beat["train_s"])
    return max(known, default=0.0)
