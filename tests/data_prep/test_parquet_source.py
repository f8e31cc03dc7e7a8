"""Parquet files in Hugging Face's layout, on disk and on S3."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from botocore.exceptions import ClientError

from data_prep.preparation import prepare
from data_prep.sources import open_source
from star_dist.config import PrepConfig, parse_config
from star_dist.errors import UserError
from tests.data_prep.test_webdataset_source import new_captions
from tests.s3 import S3Bucket

PICTURES = [
    {"bytes": b"picture 0", "path": "0.png"},
    {"bytes": None, "path": "files/1.png"},
    {"bytes": None, "path": None},
    None,
    {"bytes": None, "path": "../secret"},
]


def write(path: Path, **columns: list) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    text = ["a", None, "c", "d", "e"]
    write(
        tmp_path / "data" / "train-0.parquet", image=PICTURES, text=text, aesthetic=[6.0, None, 1, 2, 3], id=[*"vwxyz"]
    )
    (tmp_path / "data" / "files").mkdir()
    (tmp_path / "data" / "files" / "1.png").write_bytes(b"picture 1")
    write(tmp_path / "data" / "train-1.parquet", image=PICTURES[:1], text=["second"], aesthetic=[7.0], id=["!"])
    return tmp_path


def test_rows_of_files(folder: Path, stored: Callable[[Path], str]) -> None:
    source = open_source(
        {"kind": "parquet", "path": stored(folder), "captions": {"original": "text"}}, score_names=("aesthetic",)
    )
    assert source.units == ["data/train-0.parquet", "data/train-1.parquet"]
    unit = source.open(source.units[0])
    items = list(unit)
    assert len(unit) == 5 and [item.key for item in items] == [f"data/train-0.parquet/{row:08}" for row in range(5)]
    found = [item.describe() for item in items]
    assert [description.captions.get("original") for description in found] == ["a", None, None, None, "e"]
    assert [description.scores for description in found[:2]] == [{"aesthetic": 6.0}, {}]
    assert [description.problem for description in found] == [None, None, *["no picture in the row"] * 2, None]
    assert [item.read() for item in items[:2]] == [b"picture 0", b"picture 1"]
    with pytest.raises(FileNotFoundError):
        items[4].read()


def test_plain_bytes_and_a_column_of_keys(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", jpg=[b"1", b"2"], caption=["one", "two"], id=[17, 18])
    options = {"image_column": "jpg", "key_column": "id"}
    source = open_source({"kind": "parquet", "path": str(tmp_path)} | options)
    items = list(source.open("a.parquet"))
    assert [(item.key, item.read()) for item in items] == [("17", b"1"), ("18", b"2")]


def test_rows_without_a_key_are_left_out_one_by_one(tmp_path: Path, prep_values: dict) -> None:
    write(tmp_path / "a.parquet", image=[b"1", b"2", b"3"], caption=[*"abc"], id=["x", None, None])
    items = list(open_source({"kind": "parquet", "path": str(tmp_path), "key_column": "id"}).open("a.parquet"))
    config = parse_config(PrepConfig, prep_values | {"output": "unused"})
    assert {item.key: prepare(item, config, ("original",)).reason for item in items} == {
        "x": "not a picture",
        "a.parquet/00000001": "no key in the row",
        "a.parquet/00000002": "no key in the row",
    }


def test_new_captions_by_other_keys_are_refused(tmp_path: Path) -> None:
    """Before the first picture, and however many rows without a new caption come first."""
    ids = [None, *range(1, 200)]
    write(tmp_path / "a.parquet", image=[b"x"] * 200, caption=["c"] * 200, id=ids)
    by_row, by_id = (f"a.parquet/{199:08}", "198")
    options = {"kind": "parquet", "path": str(tmp_path)}
    recaptions = new_captions(tmp_path / "new", "a.parquet", by_row)
    assert list(open_source(options | {"recaptions": recaptions}).open("a.parquet"))[-1].describe().captions == {
        "original": "c",
        "recaptioned": f"new {by_row}",
    }
    with pytest.raises(
        UserError, match=rf"such as '{by_row}', the source's such as 'a\.parquet/00000000'; .*key_column"
    ):
        open_source(options | {"recaptions": recaptions, "key_column": "id"}).open("a.parquet")
    recaptions = new_captions(tmp_path / "new", "a.parquet", by_id)
    items = list(open_source(options | {"recaptions": recaptions, "key_column": "id"}).open("a.parquet"))
    assert len(items) == 200 and items[198].describe().captions["recaptioned"] == f"new {by_id}"


def test_text_that_is_no_text_is_its_rows_fault_alone(tmp_path: Path, prep_values: dict) -> None:
    kind = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.binary()})
    pictures = pyarrow.array([{"bytes": b"x", "path": path} for path in (b"a", b"b", b"\xff")], kind)
    texts = pyarrow.array([b"good", b"caf\xe9", b"good"])
    broken = pyarrow.table(
        {
            "image": pyarrow.StructArray.from_arrays(
                [pictures.field("bytes"), pictures.field("path").view(pyarrow.string())], ["bytes", "path"]
            ),
            "caption": texts.view(pyarrow.string()),
        }
    )
    pyarrow.parquet.write_table(broken, tmp_path / "a.parquet")
    items = list(open_source({"kind": "parquet", "path": str(tmp_path)}).open("a.parquet"))
    config = parse_config(PrepConfig, prep_values | {"output": "unused"})
    assert [prepare(item, config, ("original",)).reason for item in items] == [
        "not a picture",
        "caption is not Unicode text",
        "no picture in the row",
    ]


def test_rows_from_the_damage_on_are_left_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder / "data" / "train-0.parquet"
    pictures = pyarrow.parquet.ParquetFile(file).metadata.row_group(1).column(0)
    data = bytearray(file.read_bytes())
    start, size = pictures.dictionary_page_offset, pictures.total_compressed_size
    data[start : start + size] = b"\xff" * size
    file.write_bytes(data)
    options = {"kind": "parquet", "path": str(folder), "captions": {"original": "text"}}
    with pytest.raises(UserError, match=r"train-0\.parquet is damaged .*source\.damaged_units=skip"):
        list(open_source(options).open("data/train-0.parquet"))
    source = open_source(options | {"damaged_units": "skip"})
    for _ in range(2):
        items = list(source.open("data/train-0.parquet"))
        assert [item.key for item in items] == [f"data/train-0.parquet/{row:08}" for row in range(5)]
        assert [item.describe().problem for item in items] == [None] * 2 + ["damaged Parquet file"] * 3
    assert "warning:" in capsys.readouterr().err
    file.write_bytes(data[:-30])
    (item,) = open_source(options | {"damaged_units": "skip"}).open("data/train-0.parquet")
    assert (item.key, item.describe().problem) == ("data/train-0.parquet", "damaged Parquet file")


def test_damage_in_the_column_of_keys_leaves_the_rows_before_it(tmp_path: Path) -> None:
    """Also where the only new caption is of a row behind it."""
    file = tmp_path / "a.parquet"
    write(file, image=[b"x"] * 4, caption=[*"abcd"], id=[*"wxyz"])
    keys = pyarrow.parquet.ParquetFile(file).metadata.row_group(1).column(2)
    data = bytearray(file.read_bytes())
    start, size = keys.dictionary_page_offset, keys.total_compressed_size
    data[start : start + size] = b"\xff" * size
    file.write_bytes(data)
    recaptions = new_captions(tmp_path / "new", "a.parquet", "z")
    options = {"kind": "parquet", "path": str(tmp_path), "key_column": "id", "recaptions": recaptions}
    items = list(open_source(options | {"damaged_units": "skip"}).open("a.parquet"))
    assert [item.key for item in items] == ["w", "x", "a.parquet/00000002", "a.parquet/00000003"]
    with pytest.raises(UserError, match=r"a\.parquet is damaged"):
        list(open_source(options).open("a.parquet"))


def test_what_cannot_be_read_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no column 'caption', 'score'; it has \['image', 'text'"):
        open_source({"kind": "parquet", "path": str(folder)}, score_names=("score",)).open("data/train-0.parquet")
    options = {"captions": {"original": "text"}, "image_column": "text"}
    with pytest.raises(UserError, match=r"column 'text' is string, expected bytes or a struct"):
        open_source({"kind": "parquet", "path": str(folder)} | options).open("data/train-1.parquet")
    with pytest.raises(UserError, match="no .parquet files at"):
        open_source({"kind": "parquet", "path": str(tmp_path / "data" / "files")})
    file = folder / "data" / "train-1.parquet"
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"train-1\.parquet is no whole Parquet file"):
        open_source({"kind": "parquet", "path": str(folder), "captions": {"original": "text"}}).open(
            "data/train-1.parquet"
        )


def test_a_file_that_s3_has_archived_is_named(folder: Path, s3: S3Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.upload(folder)
    source = open_source({"kind": "parquet", "path": s3.url, "captions": {"original": "text"}})

    def refuse(*_: object) -> None:
        raise ClientError({"Error": {"Code": "InvalidObjectState"}}, "GetObject")

    monkeypatch.setattr(source.store.client, "download_file", refuse)
    with pytest.raises(
        UserError, match=r"the store refuses s3://.*/train-0\.parquet: archived by the store; restore it"
    ):
        source.open("data/train-0.parquet")
