"""What every run folder has, whatever is trained in it: a lock, metrics.jsonl, one configuration. Imports no torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from star_dist.config.base import Section, dump_config, parse_config
from star_dist.errors import Unavailable
from star_dist.files import cannot_write, read_json_lines, read_json_object, try_lock, write_text_atomically

LOCK_FILE = "lock"
CONFIG_FILE = "config.json"  # of the training that runs or ran last
SUBMITTED_CONFIG_FILE = "submitted_config.json"  # of the job that launcher/submit.py wrote
METRICS_FILE = "metrics.jsonl"


def claim_run_folder(run_dir: Path) -> IO[str] | None:
    """Takes the run folder for this process; the kernel gives it back however the process ends.

    None where the file system knows no locks, after a warning.

    Raises:
        Unavailable: another training holds it, which may be ending, or its file system is lost.
        UserError: it cannot be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / LOCK_FILE).open("a").close()
    except OSError as error:
        raise cannot_write(f"run_dir {run_dir}", error) from None
    try:
        lock = try_lock(run_dir / LOCK_FILE)
    except OSError as error:
        print(f"warning: {run_dir} cannot be locked ({error.strerror}): start one training at a time", file=sys.stderr)
        return None
    if lock is None:
        raise Unavailable(f"another training is running in {run_dir}; wait for it, or change run_dir")
    return lock


def is_export(folder: Path) -> bool:
    """Whether a folder holds an exported model, whose config.json says its format, and no run.

    Raises:
        UserError: it holds neither.
    """
    absent = f"{folder} is neither a run folder nor an export: it has no {CONFIG_FILE}"
    return "format" in read_json_object(folder / CONFIG_FILE, absent)


def keep_metrics_up_to(step: int, run_dir: Path) -> None:
    """Removes the reports of later steps: trained after the checkpoint that a run goes on from, they come again."""
    path = run_dir / METRICS_FILE
    if path.is_file():
        kept = [json.dumps(report) + "\n" for report in read_json_lines(path) if report["step"] <= step]
        write_text_atomically(path, "".join(kept))


def differences(before: dict[str, Any], now: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Options whose values differ, with both values; sections as dotted keys, in order."""
    for key in sorted(before.keys() | now.keys()):
        old, new = _by_name(before.get(key)), _by_name(now.get(key))
        known = [value for value in (old, new) if value is not None]
        if all(isinstance(value, dict) and value for value in known):  # a section that one side lacks differs in all
            for name, *values in differences(old or {}, new or {}):
                yield f"{key}.{name}", *values
        elif old != new:
            yield key, old, new


def differences_since(written: dict[str, Any], config: Section, place: str) -> Iterator[tuple[str, Any, Any]]:
    """`differences` between a config that was written at a place, maybe by older code, and the one of now.

    Options that are newer count with their defaults, which do as the code before them did.

    Raises:
        ConfigError: what was written holds an option that is no more.
    """
    before = parse_config(type(config), written, place)
    yield from differences(json.loads(dump_config(before)), json.loads(dump_config(config)))


def _by_name(value: Any) -> Any:
    """A list of sections by position, everything else as it is."""
    if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
        return {str(position): entry for position, entry in enumerate(value)}
    return value
