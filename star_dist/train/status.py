"""Where a run stands, read from its folder. Imports no torch, so that it answers at once on any machine."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from star_dist.config import RunConfig, load_config
from star_dist.errors import UserError
from star_dist.run_folder import CONFIG_FILE, SUBMITTED_CONFIG_FILE
from star_dist.train.checkpoint import CheckpointFolder
from star_dist.train.facts import heartbeat, last_known_step, read_events, read_reports, summarize

SILENCE_S = 120.0  # without a trace for longer than that and than ten steps, nobody seems to train


def run_status(run_dir: Path) -> dict[str, Any]:
    """step, steps, loss, images_per_s, remaining_s, last_checkpoint, state and the facts' summary of a run.

    Raises:
        UserError: no run folder, or a damaged one.
    """
    files = [run_dir / name for name in (CONFIG_FILE, SUBMITTED_CONFIG_FILE) if (run_dir / name).is_file()]
    if not files:
        raise UserError(f"{run_dir} is no run folder: it has no {CONFIG_FILE}")
    config = load_config(RunConfig, files[0])
    reports = [report for report in read_reports(run_dir) if "loss/total" in report]
    last = reports[-1] if reports else {}
    step = last_known_step(run_dir)
    step_s = last.get("time/step_s")
    summary = summarize(run_dir)
    return {
        "run": str(run_dir),
        "state": _state(run_dir, step_s or 0.0),
        "step": step,
        "steps": config.train.steps,
        "loss": last.get("loss/total"),
        "images_per_s": last.get("throughput/images_per_s"),
        "remaining_s": None if step_s is None else (config.train.steps - step) * step_s,
        "last_checkpoint": _last_checkpoint(run_dir, config),
        "restarts": summary.restarts,
        "lost_steps": summary.lost_steps,
        "goodput": summary.goodput,
    }


def describe_status(status: dict[str, Any]) -> str:
    """The same for people."""
    restarts = status["restarts"]
    lines = {
        "run": status["run"],
        "state": status["state"],
        "step": f"{status['step']:,} of {status['steps']:,}",
        "loss": _or_dash(status["loss"], "{:.4f}"),
        "images/s": _or_dash(status["images_per_s"], "{:,.1f}"),
        "remaining": "-" if status["remaining_s"] is None else _duration(status["remaining_s"]),
        "last checkpoint": _or_dash(status["last_checkpoint"], "step {:,}"),
        "restarts": f"{len(restarts)}, {status['lost_steps']:,} steps trained again",
        "goodput": f"{status['goodput']:.1%} of the time since the first start went into steps that count",
    }
    shown = [f"{name:<16} {value}" for name, value in lines.items()]
    for restart in restarts[-5:]:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(restart["time"]))
        shown.append(f"  {when}  from step {restart['from_step']:,}: {restart['reason']}")
    return "\n".join(shown)


def _state(run_dir: Path, step_s: float) -> str:
    """running, silent, or how the last attempt ended."""
    events = read_events(run_dir)
    beat = heartbeat(run_dir)
    if not events:
        return "not started"
    # Since the last start, that included; all where none was.
    starts = [i for i, event in enumerate(events) if event["event"] == "start"]
    attempt = events[starts[-1] if starts else 0 :]
    last = next((event for event in reversed(attempt) if event["event"] in ("end", "mistake", "failed")), None)
    if last is not None and last["event"] == "failed" and beat is not None and beat["time"] > last["time"]:
        last = None  # of another job on the same folder, which has found it taken
    if last is not None and last["event"] == "failed":
        return f"failed with exit code {last['exit_code']}"
    if last is not None and last["event"] == "end":
        mistakes = [event["reason"] for event in attempt if event["event"] == "mistake"]
        # The first rank that ends knows why; rank 0 may know no more than that it has lost another.
        unexplained = last.get("exit_code") is None
        return f"ended: error: {mistakes[0]}" if mistakes and unexplained else f"ended: {last['reason']}"
    if last is not None:
        return f"{'ended: error' if _trained(attempt, last) else 'not started'}: {last['reason']}"
    last_s = max(events[-1]["time"], beat["time"] if beat else 0.0)
    silent_s = time.time() - last_s
    if silent_s > max(SILENCE_S, 10 * step_s):
        return f"no trace for {_duration(silent_s)}: killed, or in a long start, save or validation"
    return "running"


def _trained(attempt: list[dict[str, Any]], mistake: dict[str, Any]) -> bool:
    """Whether a mistake ended the attempt that the list begins with, not one after it that never started.

    Of an attempt that has started rank 0 writes an `end`, before or after the mistakes of others.
    """
    if attempt[0]["event"] != "start":
        return False
    ends = [event for event in attempt if event["event"] in ("end", "failed")]
    if not ends:
        return mistake["rank"] != 0
    return any(event.get("reason") == f"error: {mistake['reason']}" for event in ends)


def _last_checkpoint(run_dir: Path, config: RunConfig) -> int | None:
    """Step of the newest complete one; on S3, which this machine may not reach, of the newest in the facts."""
    if config.checkpoint.remote is None:
        return max(CheckpointFolder(run_dir, config.checkpoint).complete_steps(), default=None)
    known = [event["step"] for event in read_events(run_dir) if event["event"] in ("start", "checkpoint", "rollback")]
    return known[-1] or None if known else None


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    days, hours = divmod(hours, 24)
    minutes, seconds = divmod(rest, 60)
    return (f"{days} d " if days else "") + (f"{hours}:{minutes:02}:{seconds:02}")
