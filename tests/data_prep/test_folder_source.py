"""The folder source: all ways of captioning, on disk and on S3, a fixed order, and every mistake named."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from data_prep.preparation import prepare
from data_prep.recaptions import caption_line
from data_prep.sources import SourceBase, SourceItem, open_source
from star_dist.config import PrepConfig, parse_config
from star_dist.errors import Unavailable, UserError
from star_dist.object_store import FolderStore, StoredObject
from tests.s3 import S3Bucket


def write_listing(folder: Path, *lines: object) -> None:
    folder.mkdir(exist_ok=True)
    texts = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    (folder / "captions.jsonl").write_text("\n".join(texts) + "\n", encoding="utf-8")


def folder_source(path: Path | str, score_names: Iterable[str] = (), **options: Any) -> SourceBase:
    return open_source({"kind": "folder", "path": str(path)} | options, score_names=tuple(score_names))


def all_items(source: SourceBase) -> list[SourceItem]:
    return [item for unit in source.units for item in source.open(unit)]


def captions_of(source: SourceBase) -> dict[str, str | None]:
    return {item.key: item.describe().captions.get("original") for item in all_items(source)}


def test_listed_pictures_come_in_the_order_of_their_keys(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.png").write_bytes(b"A")
    (tmp_path / "b.png").write_bytes(b"B")
    (tmp_path / "unlisted.png").write_bytes(b"U")
    write_listing(tmp_path, {"file": "sub/a.png", "caption": "é\u2028x"}, "", {"file": "b.png", "caption": "b", "n": 1})
    source = folder_source(tmp_path)
    assert len(source.units) == 2
    for _ in range(2):  # it can be read again
        assert [(item.key, item.describe().captions, item.read()) for item in all_items(source)] == [
            ("b.png", {"original": "b"}, b"B"),
            ("sub/a.png", {"original": "é\u2028x"}, b"A"),
        ]


def test_a_table_of_captions_with_scores_and_other_captions(tmp_path: Path) -> None:
    (tmp_path / "captions.csv").write_text(
        '\ufefffile,title,long,aesthetic,reward\na.png,"A, and",2019,6.5,\nb.png,b,,low,1e-3\n', encoding="utf-8"
    )
    captions = {"short": "title", "detailed": "long"}
    source = folder_source(tmp_path, ["aesthetic", "reward"], captions=captions)
    descriptions = [item.describe() for item in all_items(source)]
    assert [description.captions for description in descriptions] == [
        {"short": "A, and", "detailed": "2019"},
        {"short": "b", "detailed": ""},
    ]
    assert [description.scores for description in descriptions] == [{"aesthetic": 6.5}, {"reward": 0.001}]


@pytest.mark.parametrize("listing", ["captions.jsonl", "captions.csv"])
def test_a_caption_of_any_length_is_its_pictures_fault_alone(tmp_path: Path, prep_values: dict, listing: str) -> None:
    caption = "x" * 200_000
    line = json.dumps({"file": "a.png", "caption": caption})
    (tmp_path / listing).write_text(f"file,caption\na.png,{caption}\n" if listing.endswith(".csv") else line)
    (item,) = all_items(folder_source(tmp_path))
    config = parse_config(PrepConfig, prep_values | {"output": "unused"})
    assert prepare(item, config, ("original",)).reason == "caption too long"


def test_files_beside_the_pictures(tmp_path: Path) -> None:
    for name in ("b.JPG", "a.png", "c.webp", "d.png", "e.png", "notes.md"):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "a.txt").write_text("a heart\n")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "d.json").write_text('{"caption": "from json", "aesthetic": 7, "other": null}')
    (tmp_path / "e.json").write_text("[1, 2]")
    (tmp_path / "c.txt").write_text("from text", "utf-8-sig")
    (tmp_path / "c.json").write_text('{"aesthetic": 5}', "utf-8-sig")
    (tmp_path / "d.txt").write_text("text that another program has left")
    hostile = {"f": "[" * 100_000, "g": '{"n": ' + "9" * 5000 + "}"}
    for name, text in hostile.items():
        (tmp_path / f"{name}.png").touch()
        (tmp_path / f"{name}.json").write_text(text)
    source = folder_source(tmp_path, ["aesthetic"])
    assert captions_of(source) == {
        "a.png": "a heart",
        "b.JPG": None,
        "c.webp": "from text",
        "d.png": "from json",
        "e.png": None,
        "f.png": None,
        "g.png": None,
    }
    described = {item.key: item.describe() for item in all_items(source)}
    assert described["b.JPG"].problem == ".txt is not UTF-8"
    assert {described[f"{name}.png"].problem for name in "efg"} == {".json is no JSON object"}
    assert [described[name].scores for name in ("c.webp", "d.png")] == [{"aesthetic": 5.0}, {"aesthetic": 7.0}]


def test_a_prefix_on_s3_is_as_good_as_a_folder(tmp_path: Path, s3: S3Bucket) -> None:
    for name in ("a.png", "sub/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
        (tmp_path / name).with_suffix(".txt").write_text(f"caption of {name}")
    s3.upload(tmp_path, "some/pictures/")
    source = folder_source(f"{s3.url}/some/pictures")
    assert captions_of(source) == {"a.png": "caption of a.png", "sub/b.png": "caption of sub/b.png"}
    assert [item.read() for item in all_items(source)] == [b"a.png", b"sub/b.png"]
    write_listing(tmp_path, {"file": "sub/b.png", "caption": "listed"})
    s3.upload(tmp_path, "some/pictures/")
    assert captions_of(folder_source(f"{s3.url}/some/pictures")) == {"sub/b.png": "listed"}


def test_keys_of_s3_may_hold_two_slashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Amazon's do, the tests' server has paths."""
    objects = {"a//x.png": b"x", "a//x.txt": b"two slashes", "a/x.png": b"x"}

    class Store(FolderStore):
        def list(self, prefix: str = "") -> Iterator[StoredObject]:
            return (StoredObject(name, len(data)) for name, data in objects.items())

        def read(self, name: str) -> bytes:
            return objects[name]

    monkeypatch.setattr("data_prep.sources.open_store", lambda url, **_: Store(url))
    assert captions_of(folder_source(tmp_path)) == {"a//x.png": "two slashes", "a/x.png": None}


def test_a_line_without_a_caption_is_its_pictures_fault_alone(tmp_path: Path) -> None:
    lines = [{"file": name, "caption": caption} for name, caption in {"a": None, "b": 3, "c": "c", "d": "d"}.items()]
    write_listing(tmp_path, *lines, {"file": "e"}, {"file": "d", "caption": "again"})
    described = {item.key: item.describe() for item in all_items(folder_source(tmp_path))}
    assert {key: dict(what.captions) for key, what in described.items() if what.captions} == {"c": {"original": "c"}}
    assert {key: what.problem for key, what in described.items() if what.problem} == {"d": "listed twice"}
    write_listing(tmp_path, {"file": "a", "title": "a"}, {"file": "b", "title": "b"})
    with pytest.raises(UserError, match=r'no line of .*captions\.jsonl has "caption" with a string'):
        folder_source(tmp_path)


@pytest.mark.parametrize("suffix", [".txt", ".json"])
def test_caption_files_that_go_or_hide_after_they_were_found(tmp_path: Path, prep_values: dict, suffix: str) -> None:
    for name in ("gone", "folder", "good"):
        (tmp_path / name).with_suffix(".png").write_bytes(b"no picture")
        (tmp_path / name).with_suffix(suffix).write_text('{"caption": "x"}')
    source = folder_source(tmp_path)
    for name in ("gone", "folder"):
        (tmp_path / name).with_suffix(suffix).unlink()
    (tmp_path / "folder").with_suffix(suffix).mkdir()
    config = parse_config(PrepConfig, prep_values | {"output": "unused"})
    assert {item.key: prepare(item, config, ("original",)).reason for item in all_items(source)} == {
        "folder.png": "unreadable caption file: Is a directory",
        "gone.png": "unreadable caption file: No such file or directory",
        "good.png": "not a picture",
    }


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("left", ["nothing", "an empty folder", "a file"])
def test_a_folder_that_goes_takes_no_picture_with_it(
    tmp_path: Path, prep_values: dict, listed: bool, left: str
) -> None:
    """As a disk that is unmounted in the middle of a job."""
    folder = tmp_path / "pictures"
    write_listing(folder, {"file": "a.png", "caption": "x"})
    if not listed:
        (folder / "captions.jsonl").rename(folder / "a.txt")
    (folder / "a.png").write_bytes(b"no picture")
    (item,) = all_items(folder_source(folder))
    folder.rename(tmp_path / "elsewhere")
    if left != "nothing":
        folder.touch() if left == "a file" else folder.mkdir()
    config = parse_config(PrepConfig, prep_values | {"output": "unused"})
    with pytest.raises(Unavailable, match=r"a\.(png|txt): .*pictures is no longer a folder with .*same command again"):
        prepare(item, config, ("original",))
    if left == "a file":
        folder.unlink()
    elif left == "an empty folder":
        folder.rmdir()
    (tmp_path / "elsewhere").rename(folder)
    assert prepare(item, config, ("original",)).reason == "not a picture"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("KeyTooLongError", "unreadable file: File name too long"),
        ("InvalidObjectState", "unreadable file: archived by the store"),
    ],
)
def test_what_s3_refuses_of_one_object_is_that_pictures_fault_alone(
    s3: S3Bucket, monkeypatch: pytest.MonkeyPatch, prep_values: dict, code: str, reason: str
) -> None:
    s3.write("captions.jsonl", b'{"file": "a.png", "caption": "x"}')
    source = folder_source(s3.url)

    def refuse(**_: Any) -> None:
        raise ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": 400}}, "GetObject")

    monkeypatch.setattr(source.store.client, "get_object", refuse)
    (item,) = all_items(source)
    config = parse_config(PrepConfig, prep_values | {"output": "unused"})
    assert prepare(item, config, ("original",)).reason == reason
    with pytest.raises(UserError, match=rf"the store refuses {s3.url}/a\.png: .*; restore it, or take it out"):
        item.read()
    code = "AccessDenied"
    with pytest.raises(UserError, match="the credentials may not do this"):
        prepare(item, config, ("original",))


def test_a_missing_file_shows_when_it_is_read(tmp_path: Path) -> None:
    write_listing(tmp_path, {"file": "gone.png", "caption": "gone"})
    (item,) = all_items(folder_source(tmp_path))
    with pytest.raises(FileNotFoundError):
        item.read()


def test_new_captions_stand_beside_the_originals(tmp_path: Path) -> None:
    write_listing(tmp_path, *({"file": f"{name}.png", "caption": name} for name in "ab"))
    new = tmp_path / "new"
    new.mkdir()
    (new / "00000-of-00002.jsonl").write_text(caption_line("a.png", "a longer a"))
    options = {"recaptions": {"long": str(new)}}
    with pytest.raises(UserError, match=r"source\.recaptions\.long: .* must have the files of all partitions"):
        folder_source(tmp_path, **options)
    (new / "00001-of-00002.jsonl").write_text("")
    source = folder_source(tmp_path, **options)
    assert source.caption_names == ("original", "long")
    assert [item.describe().captions for item in all_items(source)] == [
        {"original": "a", "long": "a longer a"},
        {"original": "b"},
    ]
    (new / "00000-of-00002.jsonl").write_text(caption_line("sub/a.png", "a longer a"))
    with pytest.raises(UserError, match=r"none of a picture of .*: its keys are such as 'sub/a\.png', .* as 'a\.png'"):
        folder_source(tmp_path, **options)
    (new / "00001-of-00002.jsonl").write_text('{"key": "b.png"')
    with pytest.raises(UserError, match=r"00001-of-00002\.jsonl, line 1 is damaged"):
        folder_source(tmp_path, **options)
    with pytest.raises(UserError, match=r"both have \['original'\]"):
        folder_source(tmp_path, recaptions={"original": str(new)})


def test_folders_without_captions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no folder of pictures at .*nowhere; change source\.path"):
        folder_source(tmp_path / "nowhere")
    (tmp_path / "a.png").write_bytes(b"A")
    with pytest.raises(UserError, match=r"1 pictures but no captions: neither captions\.jsonl"):
        folder_source(tmp_path)
    for name in ("captions.jsonl", "captions.csv"):
        (tmp_path / name).write_text("")
    with pytest.raises(UserError, match=r"both captions\.jsonl and captions\.csv; remove one"):
        folder_source(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"file": "a.png", ', "line 2 is not JSON"),
        ("[" * 100_000, "line 2 is not JSON: maximum recursion depth"),
        ('{"n": ' + "9" * 5000 + "}", "line 2 is not JSON: Exceeds the limit"),
        ('{"caption": "a"}', "line 2 must have"),
        ('{"file": 3, "caption": "a"}', "line 2 must have"),
        ('["a.png", "a"]', "line 2 must have"),
        ('{"file": "../a.png", "caption": "a"}', "line 2: file '../a.png' must be a path inside the folder"),
        ('{"file": "/a.png", "caption": "a"}', "inside the folder"),
        ('{"file": "./s/a.png", "caption": "a"}', r"line 2: file '\./s/a\.png' must be written as 's/a\.png'"),
        ('{"file": "s//a.png", "caption": "a"}', "line 2: file 's//a.png' must be written as 's/a.png'"),
    ],
)
def test_lines_that_cannot_be_used_are_named(tmp_path: Path, line: str, message: str) -> None:
    write_listing(tmp_path, {"file": "x.png", "caption": "x"}, line)
    with pytest.raises(UserError, match=message):
        folder_source(tmp_path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("file,caption\na.png,a,b\n", r"line 2 has another number of fields than the header \(2\)"),
        ("file,caption\na.png\n", "line 2 has another number of fields"),
        ("picture,caption\na.png,a\n", 'line 2 must have "file"'),
        ("file,title\na.png,a\n", r'no line of .*captions\.csv has "caption" with a string; source\.captions'),
        ('file,caption\na.png,"a\n', "is not CSV"),
    ],
)
def test_rows_that_cannot_be_used_are_named(tmp_path: Path, rows: str, message: str) -> None:
    (tmp_path / "captions.csv").write_text(rows)
    with pytest.raises(UserError, match=message):
        folder_source(tmp_path)


def test_unknown_kinds_and_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"source\.kind is 'tar'; known kinds: folder, parquet, webdataset"):
        open_source({"kind": "tar", "path": "x"})
    with pytest.raises(UserError, match="source of kind 'folder': path is missing; unknown key pth; did you mean path"):
        open_source({"kind": "folder", "pth": str(tmp_path)})
    with pytest.raises(UserError, match="captions"):
        folder_source(tmp_path, captions={"Not a name": "caption"})
