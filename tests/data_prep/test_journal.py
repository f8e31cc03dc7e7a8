"""The journal of a partition after a loss of power: what is damaged is made again, what is whole stays."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_prep.journal import Chunk, Journal
from star_dist.errors import UserError

COLUMNS = {"key": "str"}


def append(journal: Journal) -> None:
    """A chunk with a sample and a reject."""
    number = len(journal.chunks)
    chunk = Chunk(items=2 * number + 2, rejected={"empty file": 1})
    journal.append(chunk, [{"key": f"kept {number}"}], [{"key": f"rejected {number}", "reason": "empty file"}])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A journal of three chunks."""
    journal = Journal(tmp_path, COLUMNS)
    for _ in range(3):
        append(journal)
    return tmp_path


def empty(name: str) -> Callable[[Path], None]:
    return lambda chunk: (chunk / name).write_bytes(b"")


def remove(name: str) -> Callable[[Path], None]:
    return lambda chunk: (chunk / name).unlink()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (empty("chunk.json"), "chunk.json is damaged: Expecting value"),
        (lambda chunk: (chunk / "chunk.json").write_text('{"items": null}'), "is of something else"),
        (lambda chunk: (chunk / "index.json").write_text("{}"), "is of something else"),
        (empty("index.json"), "index.json is damaged"),
        (empty("shard.00000.mds"), r"shard.00000.mds has 0 bytes, its index says \d+"),
        (empty("rejects.jsonl"), "rejects.jsonl has 0 lines, chunk.json says 1"),
        (remove("chunk.json"), "chunk.json is missing"),
        (remove("shard.00000.mds"), "shard.00000.mds has 0 bytes"),
        (shutil.rmtree, "00000001/chunk.json is missing"),
    ],
)
def test_the_journal_ends_before_a_damaged_chunk(
    folder: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None], said: str
) -> None:
    damage(folder / "00000001")
    journal = Journal(folder, COLUMNS)
    warning = capsys.readouterr().err
    assert re.fullmatch(rf"warning: .*{said}.*; that chunk and all after it are made again\n", warning)
    assert [path.name for path in folder.iterdir()] == ["00000000"] and journal.position.items == 2
    for _ in range(2):
        append(journal)
    assert [sample["key"] for sample in Journal(folder, COLUMNS).samples()] == ["kept 0", "kept 1", "kept 2"]
    assert not capsys.readouterr().err


def test_a_shard_that_was_changed_costs_the_chunks_from_there_on(folder: Path) -> None:
    shard = folder / "00000001" / "shard.00000.mds"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match=rf"{folder}/00000001 is damaged; remove it and run the same command again"):
        list(Journal(folder, COLUMNS).samples())
    shutil.rmtree(folder / "00000001")
    assert len(Journal(folder, COLUMNS).chunks) == 1


def test_a_chunk_is_on_the_disk_before_it_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    sync, rename = os.fsync, os.replace

    def record_sync(descriptor: int) -> None:
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        sync(descriptor)

    def record_rename(source: Any, target: Any) -> None:
        done.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "replace", record_rename)
    append(Journal(tmp_path, COLUMNS))
    files = sorted(path.name for path in (tmp_path / "00000000").iterdir())
    assert sorted(done[:4]) == files and done[4:] == ["chunk", "rename", tmp_path.name]
