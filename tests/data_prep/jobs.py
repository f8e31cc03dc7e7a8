"""What tests of tokenization jobs share: looking into what a job wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from streaming.base.format.mds.reader import MDSReader


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def samples(root: Path, split: str) -> dict[str, dict[str, Any]]:
    """Samples of a split by key, in their order."""
    index = json.loads((root / split / "index.json").read_text())
    readers = [MDSReader.from_json(str(root), split, shard) for shard in index["shards"]]
    return {sample["key"]: sample for reader in readers for sample in (reader[i] for i in range(len(reader)))}
