"""Small text and JSON files: read with errors that say what is wrong, replaced as a whole. Imports no torch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

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


def write_text_atomically(path: Path, text: str) -> None:
    """Replaces a file as a whole: whoever reads it, or kills this, finds the old text or the new one."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)
