"""Small files: read with errors that say what is wrong, replaced as a whole, locked. Imports no torch."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import IO, Any

from star_dist.errors import UserError


def read_json_object(path: Path, absent: str) -> dict[str, Any]:
    """The JSON object of a file that one of our commands wrote.

    Raises:
        UserError: `absent` where there is no such file; that it is damaged where it holds anything else.
    """
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(absent) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object")
    return values


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file, oldest first; none where there is no file.

    A line that a kill cut short is left out.
    """
    lines = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


def write_text_atomically(path: Path, text: str) -> None:
    """Replaces a file as a whole: whoever reads it, or kills this, finds the old text or the new one."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)


def try_lock(path: Path) -> IO[str] | None:
    """Opens and locks a file, or returns None if another process holds it; kept until it is closed or this ends.

    Raises:
        OSError: it cannot be opened, or its file system knows no locks.
    """
    file = path.open("a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, not kept by forked loader workers
    except (BlockingIOError, PermissionError):
        file.close()
        return None
    except OSError:
        file.close()
        raise
    return file
