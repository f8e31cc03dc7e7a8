"""Re-captioning with tiny models of three families, killed and gone on with, and found again by tokenization."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pyarrow
import pyarrow.parquet
import pytest
import torch
import transformers
from huggingface_hub import errors
from PIL import Image
from safetensors.torch import load_file, save_file

from data_prep import captioning
from data_prep.captioner import Captioner
from data_prep.captioning import caption
from data_prep.job import identity
from data_prep.partition import Partition
from data_prep.sources import open_source
from data_prep.tokenization import tokenize
from star_dist.config import CaptionConfig, PrepConfig, parse_config
from star_dist.data.schema import decode_captions, read_metadata
from star_dist.errors import Unavailable, UserError
from tests.data_prep import tiny_captioners
from tests.data_prep.jobs import contents, samples
from tests.data_prep.test_webdataset_source import write_tar
from tests.s3 import S3Bucket

WORDS = set(tiny_captioners.WORDS)


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("blip")
    tiny_captioners.save_blip(folder)
    return folder


@pytest.fixture
def values(blip: Path, pictures_folder: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "source": {"kind": "folder", "path": str(pictures_folder)},
        "output": str(tmp_path / "new"),
        "model": str(blip),
        "batch": 8,
        "max_new_tokens": 6,
    }


def make_config(values: dict[str, Any], **changes: Any) -> CaptionConfig:
    return parse_config(CaptionConfig, values | changes)


@pytest.mark.parametrize(
    ("family", "prompt"),
    [("blip", None), ("blip", "a picture"), ("vit_bert", None), ("llava", "describe the picture")],
)
def test_three_families_of_models(
    family: str, prompt: str | None, values: dict[str, Any], tmp_path: Path, pictures_folder: Path
) -> None:
    getattr(tiny_captioners, f"save_{family}")(tmp_path / "model")
    captioner = Captioner(make_config(values, model=str(tmp_path / "model"), prompt=prompt), torch.device("cpu"))
    pictures = [Image.open(path).convert("RGB") for path in sorted(pictures_folder.glob("*.png"))[:3]]
    pictures.append(Image.new("RGB", (40, 20), "red"))
    texts = captioner(pictures)
    assert len(texts) == 4 and captioner(pictures) == texts
    assert captioner(pictures[:1]) == texts[:1], "a caption depends on what shares its batch"
    for text in texts:
        assert "<image>" not in text and "describe" not in text.split()[:1] and "\n" not in text


def test_models_that_do_not_fit_are_named(values: dict[str, Any], tmp_path: Path, text_encoder_folder: Path) -> None:
    with pytest.raises(UserError, match=r"model '/absent' could not be loaded"):
        Captioner(make_config(values, model="/absent"), torch.device("cpu"))
    with pytest.raises(UserError, match="could not be loaded"):
        Captioner(make_config(values, model=str(text_encoder_folder)), torch.device("cpu"))
    tiny_captioners.save_llava(tmp_path / "llava")
    with pytest.raises(UserError, match="takes a question beside the picture; set prompt"):
        Captioner(make_config(values, model=str(tmp_path / "llava")), torch.device("cpu"))


@pytest.mark.parametrize(
    ("file", "content"),
    [("model.safetensors", b"version https://git-lfs.github.com/spec/v1"), ("tokenizer.json", b'{"a": 1}')],
)
def test_a_damaged_model_is_one_message(
    file: str, content: bytes, values: dict[str, Any], blip: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(blip, tmp_path / "model")
    (folder / file).write_bytes(content)
    with pytest.raises(UserError, match=r"^model '.*model' could not be loaded: [^\n]+$"):
        Captioner(make_config(values, model=str(folder)), torch.device("cpu"))


def test_no_weight_of_a_captioner_is_random(values: dict[str, Any], blip: Path, tmp_path: Path) -> None:
    """transformers fills in what a file lacks."""
    folder = shutil.copytree(blip, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["text_decoder.bert.encoder.layer.0.output.LayerNorm.bias"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 of its weights, such as text_decoder\..*; get it anew"):
        Captioner(make_config(values, model=str(folder)), torch.device("cpu"))


def test_a_hub_that_does_not_answer_is_no_mistake(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*_: object, **__: object) -> None:
        raise OSError("We couldn't connect to 'https://huggingface.co'") from errors.LocalEntryNotFoundError("silence")

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", ask)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(Unavailable, match="couldn't connect"):
        Captioner(make_config(values, model="someone/captioner"), torch.device("cpu"))


def test_a_prompt_that_does_not_fit_is_one_message(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_captioners.save_vit_bert(tmp_path / "model")
    with pytest.raises(UserError, match="takes a picture alone; set prompt to null"):
        Captioner(make_config(values, model=str(tmp_path / "model"), prompt="describe"), torch.device("cpu"))

    def refuse(*_: object, **__: object) -> None:
        raise ValueError("Received 2 images for 1 prompts.\nAs PaliGemma says it")

    monkeypatch.setattr(transformers.BlipProcessor, "__call__", refuse)
    with pytest.raises(
        UserError, match=r"cannot caption pictures with prompt null: Received 2 images for 1 prompts\.;"
    ):
        Captioner(make_config(values), torch.device("cpu"))


def test_pictures_that_no_captioner_takes_are_rejected(values: dict[str, Any], tmp_path: Path) -> None:
    """A picture of one row would end the job, at every attempt."""
    folder = tmp_path / "source"
    folder.mkdir()
    for name, size in {"a_row": (30, 1), "three": (30, 3), "point": (1, 1), "line": (2000, 8), "good": (30, 4)}.items():
        Image.new("RGB", size, "red").save(folder / f"{name}.png")
    (folder / "good.txt").write_text("good")
    source = {"kind": "folder", "path": str(folder)}
    assert caption(make_config(values, source=source), Partition()) == {"captioned": 1, "rejected": 4}
    (rejects,) = (tmp_path / "new").glob("0*.rejects")
    reasons = [json.loads(line)["reason"] for line in rejects.read_text().splitlines()]
    assert "too narrow for captioners: 30 x 1 pixels" in reasons


def test_new_captions_are_found_by_tokenization(values: dict[str, Any], prep_values: dict, tmp_path: Path) -> None:
    config = make_config(values)
    for i in range(2):
        assert caption(config, Partition(i, 2), workers=2) == {"captioned": 30, "rejected": 0}
    before = contents(tmp_path / "new")
    assert sorted(before) == ["00000-of-00002.jsonl", "00001-of-00002.jsonl", "job.json"]
    assert caption(config, Partition(0, 2)) == {"captioned": 0, "rejected": 0} and contents(tmp_path / "new") == before
    source = prep_values["source"] | {"recaptions": {"recaptioned": str(tmp_path / "new")}}
    tokenize(parse_config(PrepConfig, prep_values | {"source": source, "output": str(tmp_path / "set")}))
    metadata = read_metadata(tmp_path / "set")
    assert metadata.captions["original"] == 60 and list(metadata.captions) == ["original", "recaptioned"]
    lines = [json.loads(line) for name in sorted(before)[:2] for line in before[name].decode().splitlines()]
    found = samples(tmp_path / "set", "train") | samples(tmp_path / "set", "val")
    assert {line["key"]: line["caption"] for line in lines} == {
        key: decode_captions(sample, metadata).get("recaptioned", "") for key, sample in found.items()
    }
    with pytest.raises(UserError, match=r"made with max_new_tokens = 6, this job has 7"):
        caption(make_config(values, max_new_tokens=7), Partition(0, 2))


def test_pictures_without_captions_of_their_own(
    values: dict[str, Any], prep_values: dict, pictures_folder: Path, tmp_path: Path
) -> None:
    bare = shutil.copytree(pictures_folder, tmp_path / "bare", ignore=shutil.ignore_patterns("captions.*"))
    source = {"kind": "folder", "path": str(bare), "captions": {}}
    assert caption(make_config(values, source=source), Partition()) == {"captioned": 60, "rejected": 0}
    with pytest.raises(UserError, match=r"source\.captions and source\.recaptions are both empty"):
        tokenize(parse_config(PrepConfig, prep_values | {"source": source, "output": str(tmp_path / "set")}))
    source["recaptions"] = {"recaptioned": str(tmp_path / "new")}
    tokenize(parse_config(PrepConfig, prep_values | {"source": source, "output": str(tmp_path / "set")}))
    metadata = read_metadata(tmp_path / "set")
    assert list(metadata.captions) == ["recaptioned"] and metadata.captions["recaptioned"] > 0
    (bare / "000.txt").write_text("nobody asked for this")
    assert open_source(source).open("000.png")[0].describe().captions.keys() == {"recaptioned"}


def test_a_job_that_ends_in_the_middle_goes_on_where_it_was(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    caption(make_config(values, output=str(tmp_path / "clean")), Partition())
    assert "/60 [" in capsys.readouterr().err  # the bar knows how many will come
    calls: list[int] = []
    original = Captioner.__call__

    def dies_at_the_fourth(self: Captioner, pictures: list[Image.Image]) -> list[str]:
        calls.append(len(pictures))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(self, pictures)

    monkeypatch.setattr(Captioner, "__call__", dies_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        caption(make_config(values), Partition())
    (begun,) = (tmp_path / "new.work").rglob("*.jsonl")
    begun.write_bytes(begun.read_bytes()[:-5])  # as a kill in the middle of a line leaves it
    assert not (tmp_path / "new" / "00000-of-00001.jsonl").exists()
    assert caption(make_config(values), Partition()) == {"captioned": 60 - 23, "rejected": 0}
    assert "37/37 [" in capsys.readouterr().err
    new, clean = (tmp_path / name / "00000-of-00001.jsonl" for name in ("new", "clean"))
    assert new.read_bytes() == clean.read_bytes()


def test_a_job_that_older_code_began_goes_on_with_its_unfinished_work(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = ["die", "say"]

    def dies(_: Captioner, pictures: list[Image.Image]) -> list[str]:
        if calls.pop() == "die":
            raise KeyboardInterrupt
        return ["a picture"] * len(pictures)

    def of_older_code(config: CaptionConfig) -> dict[str, Any]:
        return {name: value for name, value in identity(config).items() if name != "side"}

    monkeypatch.setattr(Captioner, "__call__", dies)
    with monkeypatch.context() as older, pytest.raises(KeyboardInterrupt):
        older.setattr(captioning, "identity", of_older_code)
        caption(make_config(values), Partition(1, 2))
    description = tmp_path / "new" / "job.json"
    assert "side" not in json.loads(description.read_text())
    calls = ["say"] * 10
    assert caption(make_config(values), Partition(1, 2)) == {"captioned": 30 - 8, "rejected": 0}
    with pytest.raises(UserError, match="made with side = 1024, this job has 512"):
        caption(make_config(values, side=512), Partition(1, 2))
    description.write_text("[]")
    with pytest.raises(UserError, match=r"job\.json is not of a captioning job; change output, or remove it"):
        caption(make_config(values), Partition(1, 2))


def test_jobs_that_share_a_working_folder_go_on_with_their_own_lines(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same source and working folder, another model's settings and output: as after a change of the config."""

    def job(name: str, tokens: int) -> CaptionConfig:
        return make_config(values, output=str(tmp_path / name), work=str(tmp_path / "work"), max_new_tokens=tokens)

    def dies(self: Captioner, pictures: list[Image.Image]) -> list[str]:
        if calls.pop() == "die":
            raise KeyboardInterrupt
        return [f"by {self.config.max_new_tokens}"] * len(pictures)

    monkeypatch.setattr(Captioner, "__call__", dies)
    for name, tokens in (("old", 6), ("new", 7)):
        calls = ["die", "say"]
        with pytest.raises(KeyboardInterrupt):
            caption(job(name, tokens), Partition())
    for name, tokens in (("new", 7), ("old", 6)):
        calls = ["say"] * 10
        assert caption(job(name, tokens), Partition()) == {"captioned": 60 - 8, "rejected": 0}
        lines = (tmp_path / name / "00000-of-00001.jsonl").read_text().splitlines()
        assert [json.loads(line)["caption"] for line in lines] == [f"by {tokens}"] * 60
    assert not list((tmp_path / "work").iterdir())


def test_tars_on_s3_and_pictures_that_cannot_be_read(
    values: dict[str, Any], s3: S3Bucket, tmp_path: Path, pictures_folder: Path
) -> None:
    (tmp_path / "tars").mkdir()
    good = (pictures_folder / "000.png").read_bytes()
    write_tar(tmp_path / "tars" / "0.tar", {"a.png": good, "b.png": good[:50], "c.png": good, "d.txt": b"no picture"})
    write_tar(tmp_path / "tars" / "1.tar", {"a.png": good})
    s3.upload(tmp_path / "tars", "tars/")
    changes = {
        "source": {"kind": "webdataset", "path": f"{s3.url}/tars"},
        "output": f"{s3.url}/new",
        "work": str(tmp_path / "work"),
    }
    assert caption(make_config(values, **changes), Partition()) == {"captioned": 3, "rejected": 2}
    assert s3.keys("new/") == ["new/0.tar.jsonl", "new/0.tar.rejects", "new/1.tar.jsonl", "new/job.json"]
    keys = [json.loads(line)["key"] for line in s3.read("new/0.tar.jsonl").decode().splitlines()]
    assert keys == ["0.tar/a", "0.tar/c"]
    assert [json.loads(line) for line in s3.read("new/0.tar.rejects").decode().splitlines()] == [
        {"key": "0.tar/b", "reason": "truncated picture"},
        {"key": "0.tar/d", "reason": "no picture in the sample"},
    ]


def folder_beside(folder: Path, picture: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    for name in ("bare", "bad_text", "bad_json", "good"):
        (folder / f"{name}.png").write_bytes(picture)
    (folder / "bad_text.txt").write_bytes(b"\xff")
    (folder / "bad_json.json").write_text("[")
    (folder / "good.txt").write_text("good")
    (folder / "empty.png").touch()
    return {"kind": "folder"}, {"empty.png": "empty file"}


def folder_listing(folder: Path, picture: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    for name in ("twice", "bare", "good"):
        (folder / f"{name}.png").write_bytes(picture)
    lines = [{"file": "good.png", "caption": "good"}, {"file": "bare.png"}, {"file": "gone.png", "caption": "gone"}]
    lines += [{"file": "twice.png", "caption": text} for text in "ab"] + [{"file": "\ud800.png", "caption": "half"}]
    (folder / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    reasons = {"gone.png": "unreadable file: No such file or directory", "\ud800.png": "name is not Unicode text"}
    return {"kind": "folder"}, reasons


def tar_of_odd_samples(folder: Path, picture: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    good = {"bare.png": picture, "bad.png": picture, "bad.txt": b"\xff", "bad2.png": picture, "bad2.json": b"["}
    write_tar(folder / "0.tar", good | {"twice.png": picture, "twice.PNG": picture, "none.txt": b"no picture"})
    return {"kind": "webdataset"}, {"0.tar/none": "no picture in the sample", "0.tar/twice": "key twice in a tar"}


def parquet_of_odd_rows(folder: Path, picture: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    rows = [{"bytes": data, "path": path} for data, path in ((picture, None), (None, None), (None, "gone.png"))]
    table = pyarrow.table({"image": [*rows, None, rows[0]], "caption": [None, "a", "b", "c", "d"]})
    pyarrow.parquet.write_table(table, folder / "0.parquet")
    reasons = dict.fromkeys((1, 3), "no picture in the row") | {2: "unreadable file: No such file or directory"}
    return {"kind": "parquet"}, {f"0.parquet/{row:08}": reasons[row] for row in sorted(reasons)}


@pytest.mark.parametrize("write", [folder_beside, folder_listing, tar_of_odd_samples, parquet_of_odd_rows])
def test_a_picture_needs_no_good_caption_to_get_a_new_one(
    write: Callable[[Path, bytes], tuple[dict[str, Any], dict[str, str]]],
    values: dict[str, Any],
    tmp_path: Path,
    pictures_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is wrong with the picture or its name rejects it, in every kind of source, and never ends the job."""
    monkeypatch.setattr(Captioner, "__call__", lambda self, pictures: ["new"] * len(pictures))
    (tmp_path / "source").mkdir()
    source, rejected = write(tmp_path / "source", (pictures_folder / "000.png").read_bytes())
    source["path"] = str(tmp_path / "source")
    keys = [item.key for unit in open_source(source).units for item in open_source(source).open(unit)]
    good = [key for key in keys if key not in rejected]
    assert caption(make_config(values, source=source), Partition()) == {
        "captioned": len(good),
        "rejected": len(rejected),
    }
    (lines,) = (path.read_text().splitlines() for path in (tmp_path / "new").glob("0*.jsonl"))
    assert [json.loads(line) for line in lines] == [{"key": key, "caption": "new"} for key in good]
    (lines,) = (path.read_text().splitlines() for path in (tmp_path / "new").glob("0*.rejects"))
    assert {reject["key"]: reject["reason"] for reject in map(json.loads, lines)} == rejected


def test_captions_may_hold_any_character(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "a\u2028b\x85c\rd"
    monkeypatch.setattr(Captioner, "__call__", lambda self, pictures: [text] * len(pictures))
    assert caption(make_config(values), Partition()) == {"captioned": 60, "rejected": 0}
    lines = (tmp_path / "new" / "00000-of-00001.jsonl").read_bytes().split(b"\n")[:-1]
    assert [json.loads(line)["caption"] for line in lines] == [text] * 60
