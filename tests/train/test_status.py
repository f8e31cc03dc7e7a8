"""What `launcher/status.py` says of runs in all their states, from the files that they leave."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from star_dist.config import RunConfig, dump_config, load_config
from star_dist.train.facts import append_event
from star_dist.train.status import describe_status, run_status

CONFIG = Path(__file__).parents[2] / "configs" / "d16.json"
START = ("start", {"step": 0, "last_step": 0})
NO_TOKENIZER = "no tokenizer at /absent"
LOST = "error: Connection closed by peer"


def ended(reason: str, exit_code: int | None = None) -> tuple[str, dict[str, Any]]:
    return "end", {"step": 7, "train_s": 1.0, "reason": reason, "exit_code": exit_code}


def mistake(rank: int, reason: str) -> tuple[str, dict[str, Any]]:
    return "mistake", {"rank": rank, "reason": reason, "exit_code": 2}


@pytest.mark.parametrize(
    ("events", "state"),
    [
        ([], "not started"),
        ([mistake(0, NO_TOKENIZER)], f"not started: {NO_TOKENIZER}"),
        ([START], "running"),
        ([START, ended("finished", 0)], "ended: finished"),
        ([START, ("failed", {"exit_code": 137})], "failed with exit code 137"),
        # All ranks of a training find the same, and write it down in any order.
        ([START, ended("error: no learning", 2), mistake(1, "no learning")], "ended: error: no learning"),
        ([START, mistake(1, "no learning"), ended("error: no learning", 2)], "ended: error: no learning"),
        # One of them finds it alone; rank 0 has time for an end of its own, or has not.
        ([START, mistake(1, "shard 7 is corrupt")], "ended: error: shard 7 is corrupt"),
        ([START, mistake(1, "shard 7 is corrupt"), ended(LOST)], "ended: error: shard 7 is corrupt"),
        # Another attempt, which does not start.
        ([START, ended("finished", 0), mistake(1, NO_TOKENIZER)], f"not started: {NO_TOKENIZER}"),
        ([START, ended(LOST), mistake(0, NO_TOKENIZER)], f"not started: {NO_TOKENIZER}"),
        ([START, mistake(0, NO_TOKENIZER)], f"not started: {NO_TOKENIZER}"),
        ([START, mistake(1, "shard 7 is corrupt"), START], "running"),
    ],
)
def test_state(events: list[tuple[str, dict[str, Any]]], state: str, tmp_path: Path) -> None:
    (tmp_path / "submitted_config.json").write_text(CONFIG.read_text())
    for event, values in events:
        append_event(tmp_path, event, **values)
    assert run_status(tmp_path)["state"] == state


def test_a_job_that_found_the_folder_taken_does_not_end_the_training(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(CONFIG.read_text())
    append_event(tmp_path, *START[:1], **START[1], job="7")
    append_event(tmp_path, "failed", exit_code=69, job="8")
    (tmp_path / "heartbeat.json").write_text(json.dumps({"step": 5, "train_s": 1.0, "time": time.time()}))
    assert run_status(tmp_path)["state"] == "running"


def test_a_run_without_a_trace_for_long(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(CONFIG.read_text())
    facts = {"event": "start", "time": time.time() - 3600, "step": 0, "last_step": 0}
    (tmp_path / "facts.jsonl").write_text(json.dumps(facts) + "\n")
    assert run_status(tmp_path)["state"].startswith("no trace for 1:00:0")


@pytest.mark.parametrize(
    ("events", "step"),
    [
        ([("start", 0)], None),
        ([("start", 0), ("checkpoint", 50), ("checkpoint", 100)], 100),
        ([("start", 0), ("checkpoint", 50), ("checkpoint", 100), ("rollback", 50)], 50),
        ([("start", 0), ("checkpoint", 50), ("checkpoint", 100), ("start", 50)], 50),  # checkpoint.resume_step
    ],
)
def test_status_needs_no_store(
    events: list[tuple[str, int]], step: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints on S3, from a machine without keys."""
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    config = load_config(RunConfig, CONFIG, ["checkpoint.remote=s3://bucket/run"])
    (tmp_path / "config.json").write_text(dump_config(config))
    for event, at in events:
        append_event(tmp_path, event, step=at, last_step=0, lost_steps=0, train_s=1.0)
    status = run_status(tmp_path)
    assert status["last_checkpoint"] == step and status["state"] == "running"
    assert f"last checkpoint  {'-' if step is None else f'step {step}'}\n" in describe_status(status)


def test_what_remains_follows_the_last_report_also_after_a_resume(tmp_path: Path) -> None:
    config = load_config(RunConfig, CONFIG, ["train.steps=10000"])
    (tmp_path / "config.json").write_text(dump_config(config))
    append_event(tmp_path, "start", step=900, last_step=1000)
    lines = [
        {"step": 890, "loss/total": 8.0, "time/step_s": 9.0},
        {"step": 1000, "loss/total": 7.0, "time/step_s": 2.0},
    ]
    lines.append({"step": 1000, "validation/loss/total": 7.5})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    status = run_status(tmp_path)
    assert (status["step"], status["loss"], status["remaining_s"]) == (1000, 7.0, 9000 * 2.0)
    assert "remaining        5:00:00\n" in describe_status(status)
