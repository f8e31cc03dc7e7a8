"""The folder source: both ways of captioning, a fixed order, and every mistake named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_prep.sources import open_source
from data_prep.sources.folder import FolderSource
from star_dist.errors import UserError


def write_listing(folder: Path, *lines: object) -> None:
    folder.mkdir(exist_ok=True)
    texts = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    (folder / "captions.jsonl").write_text("\n".join(texts) + "\n", encoding="utf-8")


def test_listed_pictures_come_in_the_order_of_their_keys(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.png").write_bytes(b"A")
    (tmp_path / "b.png").write_bytes(b"B")
    (tmp_path / "unlisted.png").write_bytes(b"U")
    write_listing(tmp_path, {"file": "sub/a.png", "caption": "é\u2028x"}, "", {"file": "b.png", "caption": "b", "n": 1})
    source = open_source({"kind": "folder", "path": str(tmp_path)})
    assert len(source) == 2
    for _ in range(2):  # it can be read again
        assert [(item.key, item.caption, item.read()) for item in source] == [
            ("b.png", "b", b"B"),
            ("sub/a.png", "é\u2028x", b"A"),
        ]


def test_text_files_beside_the_pictures(tmp_path: Path) -> None:
    for name in ("b.JPG", "a.png", "c.webp", "notes.md"):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "a.txt").write_text("a heart\n")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\xff")
    source = FolderSource(tmp_path)
    assert [(item.key, item.caption) for item in source] == [("a.png", "a heart"), ("b.JPG", ""), ("c.webp", "")]
    assert len(source) == 3


def test_a_missing_file_shows_when_it_is_read(tmp_path: Path) -> None:
    write_listing(tmp_path, {"file": "gone.png", "caption": "gone"})
    (item,) = FolderSource(tmp_path)
    with pytest.raises(OSError):
        item.read()


def test_folders_without_captions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no folder of pictures at .*nowhere; change source\.path"):
        FolderSource(tmp_path / "nowhere")
    (tmp_path / "a.png").write_bytes(b"A")
    with pytest.raises(UserError, match=r"1 pictures but no captions: neither captions\.jsonl"):
        FolderSource(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"file": "a.png", ', "line 2 is not JSON"),
        ('{"file": "a.png"}', "line 2 must be"),
        ('{"file": "a.png", "caption": 3}', "line 2 must be"),
        ('["a.png", "a"]', "line 2 must be"),
        ('{"file": "../a.png", "caption": "a"}', "line 2: file '../a.png' must be a path inside the folder"),
        ('{"file": "/a.png", "caption": "a"}', "inside the folder"),
        ('{"file": "x.png", "caption": "a"}', "line 2: file 'x.png' is listed twice"),
    ],
)
def test_lines_that_cannot_be_used_are_named(tmp_path: Path, line: str, message: str) -> None:
    write_listing(tmp_path, {"file": "x.png", "caption": "x"}, line)
    with pytest.raises(UserError, match=message):
        FolderSource(tmp_path)


def test_unknown_kinds_and_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"source\.kind is 'tar'; known kinds: folder"):
        open_source({"kind": "tar", "path": "x"})
    with pytest.raises(UserError, match="takes exactly 'path' besides 'kind', got \\['pth'\\]"):
        open_source({"kind": "folder", "pth": str(tmp_path)})
