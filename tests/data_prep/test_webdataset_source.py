"""Tars as img2dataset writes them, on disk and on S3; whole ones alone."""

from __future__ import annotations

import io
import json
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.recaptions import caption_line
from data_prep.sources import SourceBase, open_source, open_units
from star_dist.errors import UserError
from tests.s3 import S3Bucket


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def sample(key: str, text: str | None = None, **fields: object) -> dict[str, bytes]:
    members = {
        f"{key}.jpg": f"picture {key}".encode(),
        f"{key}.json": json.dumps({"caption": "json"} | fields).encode(),
    }
    return members | ({f"{key}.txt": text.encode()} if text is not None else {})


def new_captions(folder: Path, unit: str, *keys: str) -> dict[str, str]:
    """Captions of a unit as data_prep.caption writes them; the option that names them."""
    folder.mkdir(exist_ok=True)
    (folder / f"{unit}.jsonl").write_text("".join(caption_line(key, f"new {key}") for key in keys))
    return {"recaptioned": str(folder)}


def described(source: SourceBase) -> dict[str, tuple[dict, dict, str | None]]:
    items = [item for unit in source.units for item in source.open(unit)]
    found = {item.key: item.describe() for item in items}
    return {key: (dict(what.captions), dict(what.scores), what.problem) for key, what in found.items()}


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    folder = tmp_path / "tars"
    folder.mkdir()
    write_tar(folder / "00001.tar", sample("000010000", "second tar", caption=" "))
    write_tar(
        folder / "00000.tar",
        sample("000000000", "json wins", aesthetic=5.5)
        | sample("000000001", long="a long caption")
        | {"000000002.txt": b"no picture", "000000003.png": b"x", "000000003.txt": b"\xff\xff"}
        | {"000000004.jpg": b"x", "000000004.json": b"{"}
        | {"000000005.jpg": b"x", "000000005.json": b"[" * 100_000}
        | sample("000000006", "text fills", caption=None),
    )
    (folder / "00000_stats.json").write_text("{}")
    return folder


def test_samples_of_tars(tars: Path, stored: Callable[[Path], str]) -> None:
    captions = {"original": "caption", "detailed": "long"}
    source = open_source({"kind": "webdataset", "path": stored(tars), "captions": captions}, score_names=("aesthetic",))
    assert source.units == ["00000.tar", "00001.tar"]
    assert described(source) == {
        "00000.tar/000000000": ({"original": "json"}, {"aesthetic": 5.5}, None),
        "00000.tar/000000001": ({"original": "json", "detailed": "a long caption"}, {}, None),
        "00000.tar/000000002": ({}, {}, "no picture in the sample"),
        "00000.tar/000000003": ({}, {}, ".txt is not UTF-8"),
        "00000.tar/000000004": ({}, {}, ".json is no JSON object"),
        "00000.tar/000000005": ({}, {}, ".json is no JSON object"),
        "00000.tar/000000006": ({"original": "text fills"}, {}, None),
        "00001.tar/000010000": ({"original": "second tar"}, {}, None),
    }
    first = source.open("00000.tar")
    assert len(first) == 7
    items = list(first)
    del first  # what the items read from stays open with them
    assert [item.read() for item in items[1::-1]] == [b"picture 000000001", b"picture 000000000"]


def test_a_key_that_comes_twice_is_rejected(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for _ in range(2):
            tar.addfile(tarfile.TarInfo("x.jpg"))
    source = open_source({"kind": "webdataset", "path": str(tmp_path)})
    assert described(source) == {"a.tar/x": ({}, {}, "key twice in a tar")}


def test_the_next_tar_is_fetched_while_one_is_in_use(tmp_path: Path, s3: S3Bucket) -> None:
    for i in range(4):
        write_tar(tmp_path / f"{i}.tar", sample(str(i), "x"))
    s3.upload(tmp_path, "tars/")
    source = open_source({"kind": "webdataset", "path": f"{s3.url}/tars"})
    fetched = [threading.Event() for _ in range(4)]
    download = source.store.download

    def counted(name: str, path: Path) -> None:
        download(name, path)
        fetched[int(name[0])].set()

    source.store.download = counted
    for number, unit in enumerate(open_units(source, source.units)):
        assert [item.key for item in unit] == [f"{number}.tar/{number}"]
        assert all(event.wait(60) for event in fetched[: number + 2])
        assert not any(event.is_set() for event in fetched[number + 2 :])
    with pytest.raises(UserError, match=r"cannot read .*gone\.tar: No such file"):
        list(open_units(source, ["0.tar", "gone.tar"]))


def test_new_captions_of_a_tar_lie_in_a_file_of_its_name(tars: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    new.mkdir()
    source = open_source({"kind": "webdataset", "path": str(tars), "recaptions": {"recaptioned": str(new)}})
    with pytest.raises(UserError, match=r"has no 00001\.tar\.jsonl; finish the job of data_prep\.caption first"):
        source.open("00001.tar")
    (new / "00001.tar.jsonl").write_text(caption_line("00001.tar/000010000", "new"))
    (item,) = source.open("00001.tar")
    assert item.describe().captions == {"original": "second tar", "recaptioned": "new"}


def test_new_captions_of_other_pictures_are_refused(tars: Path, tmp_path: Path) -> None:
    recaptions = new_captions(tmp_path / "new", "00001.tar", "tars/00001.tar/000010000")
    source = open_source({"kind": "webdataset", "path": str(tars), "recaptions": recaptions})
    with pytest.raises(
        UserError, match=r"none of a picture of .*00001\.tar: its keys .*'tars/00001\.tar/0.* such as '00001\.tar/0"
    ):
        source.open("00001.tar")
    new_captions(tmp_path / "new", "00001.tar")
    (item,) = source.open("00001.tar")
    assert item.describe().captions == {"original": "second tar"}
    new_captions(tmp_path / "new", "00000.tar", "00000.tar/000000002")  # one that cannot be used is known all the same
    assert len(list(source.open("00000.tar"))) == 7


@pytest.mark.parametrize("cut", [1, 512, 700, 1536, 3000])
def test_tars_that_end_too_early_are_refused_wherever_they_end(tmp_path: Path, cut: int) -> None:
    write_tar(tmp_path / "a.tar", sample("0", "x") | sample("1", "y"))
    whole = (tmp_path / "a.tar").read_bytes()
    content = 6 * 1024  # header and data of six members; the rest is the end mark
    (tmp_path / "a.tar").write_bytes(whole[: content - cut + 1])
    source = open_source({"kind": "webdataset", "path": str(tmp_path)})
    with pytest.raises(UserError, match=r"a\.tar is (no whole tar|cut short or damaged at byte \d+).*fetch it again"):
        source.open("a.tar")
    source = open_source({"kind": "webdataset", "path": str(tmp_path), "damaged_units": "skip"})
    assert described(source) == {"a.tar": ({}, {}, "damaged tar")}
    assert len(source.open("a.tar")) == 1


def test_a_tar_without_members_has_no_items(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {})
    unit = open_source({"kind": "webdataset", "path": str(tmp_path)}).open("a.tar")
    assert len(unit) == 0 and not list(unit)


def test_folders_and_tars_without_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no .tar files at"):
        open_source({"kind": "webdataset", "path": str(tmp_path)})
    write_tar(tmp_path / "a.tar", {"x.txt": b"x"})
    with pytest.raises(UserError, match=r"a\.tar holds 1 samples but no picture"):
        open_source({"kind": "webdataset", "path": str(tmp_path)}).open("a.tar")
