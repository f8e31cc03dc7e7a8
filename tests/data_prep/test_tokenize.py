"""The tokenization job: what it writes, what it leaves out, and what it refuses."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep import tokenization
from data_prep.assembly import split_of
from data_prep.preparation import prepare_all
from data_prep.tokenization import tokenize
from star_dist.config import PrepConfig, parse_config
from star_dist.data.pictures import crop_and_resize, decode_picture, normalize, to_tensor
from star_dist.data.schema import decode_features, decode_tokens, read_metadata
from star_dist.errors import UserError
from star_dist.tokenizer.io import load_tokenizer
from tests.data_prep.jobs import contents, samples
from tests.data_prep.test_webdataset_source import write_tar


def test_shards_hold_what_the_tokenizer_says(dataset_folder: Path, pictures_folder: Path, prep_values: dict) -> None:
    config = parse_config(PrepConfig, prep_values | {"output": "unused"})
    tokenizer = load_tokenizer(Path(config.tokenizer))
    metadata = read_metadata(dataset_folder)
    found = samples(dataset_folder, "train") | samples(dataset_folder, "val")
    assert len(found) == 60
    for key, sample in list(found.items())[:5]:
        image = crop_and_resize(decode_picture((pictures_folder / key).read_bytes()), 16)
        expected = tokenizer.encode(normalize(to_tensor(image)[None]), config.all_resolutions[0].schedule)
        assert decode_tokens(sample, metadata).tolist() == expected[0].tolist()
    assert set(samples(dataset_folder, "val")) == {key for key in found if split_of(key, 0.15) == "val"}


def test_unusable_pictures_are_skipped_counted_and_listed(tmp_path: Path, prep_values: dict) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.new("RGB", (20, 20), "red").save(pictures / "good.png")
    Image.new("RGB", (3, 20), "red").save(pictures / "narrow.png")
    (pictures / "cut.png").write_bytes((pictures / "good.png").read_bytes()[:60])
    (pictures / "empty.png").write_bytes(b"")
    (pictures / "text.png").write_text("no picture")
    captions = {"good.png": "red", "narrow.png": "red", "cut.png": "red", "empty.png": "red", "text.png": "red"}
    captions |= {"absent.png": "red", "blank.png": " "}
    (pictures / "blank.png").write_bytes((pictures / "good.png").read_bytes())
    lines = [json.dumps({"file": file, "caption": caption}) for file, caption in captions.items()]
    (pictures / "captions.jsonl").write_text("\n".join(lines))
    values = prep_values | {
        "source": {"kind": "folder", "path": str(pictures)},
        "output": str(tmp_path / "set"),
        "validation_fraction": 0.0,
        "min_side": 8,
    }
    metadata = tokenize(parse_config(PrepConfig, values))[16]
    assert metadata.splits == {"train": 1}
    assert sum(metadata.rejected.values()) == 6
    rejects = {}
    for line in (tmp_path / "set" / "rejects.jsonl").read_text().splitlines():
        reject = json.loads(line)
        rejects[reject["key"]] = reject["reason"]
    assert rejects == {
        "absent.png": "unreadable file: No such file or directory",
        "blank.png": "empty caption",
        "cut.png": "truncated picture",
        "empty.png": "empty file",
        "narrow.png": "too small",
        "text.png": "not a picture",
    }


def test_damaged_tars_stop_the_job_or_are_left_out_counted_and_listed(
    tmp_path: Path, prep_values: dict, pictures_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A job that has stopped goes on without them, to the bytes of one that left them out from the beginning."""
    tars = tmp_path / "tars"
    tars.mkdir()
    files = sorted(pictures_folder.glob("*.png"))[:9]
    for i in range(3):
        pictures = {file.name: file.read_bytes() for file in files[3 * i : 3 * i + 3]}
        write_tar(tars / f"{2 * i}.tar", pictures | {f"{file.stem}.txt": b"caption" for file in files})
    (tars / "1.tar").write_bytes((tars / "0.tar").read_bytes()[:1000])
    (tars / "3.tar").touch()
    write_tar(tars / "5.tar", {})
    source = {"kind": "webdataset", "path": str(tars)}
    values = prep_values | {"validation_fraction": 0.0, "batch": 2, "chunk": 2}

    def job(name: str, **options: str) -> PrepConfig:
        return parse_config(PrepConfig, values | {"source": source | options, "output": str(tmp_path / name)})

    with pytest.raises(UserError, match=r"1\.tar is .*again, or go on without it by source\.damaged_units=skip"):
        tokenize(job("set"))
    assert list((tmp_path / "set.work").rglob("chunk.json")), "nothing that could be gone on with"
    metadata = tokenize(job("set", damaged_units="skip"))[16]
    assert "damaged tar: 2" in capsys.readouterr().out
    assert metadata.splits == {"train": 9} and metadata.rejected == {"damaged tar": 2, "no picture in the sample": 18}
    rejects = map(json.loads, (tmp_path / "set" / "rejects.jsonl").read_text().splitlines())
    damaged = [reject["key"] for reject in rejects if reject["reason"] == "damaged tar"]
    assert damaged == ["1.tar", "3.tar"]
    tokenize(job("clean", damaged_units="skip"))
    assert contents(tmp_path / "set") == contents(tmp_path / "clean")


def test_text_features_are_those_of_the_encoder(tmp_path: Path, prep_values: dict, text_encoder_folder: Path) -> None:
    from star_dist.text import TextEncoder

    text = {"encoder": str(text_encoder_folder), "encoder_subfolder": "", "tokenizer_subfolder": "", "width": 16}
    config = parse_config(PrepConfig, prep_values | {"output": str(tmp_path / "set"), "text_features": text})
    metadata = tokenize(config)[16]
    assert metadata.text_features == config.text_features
    encoder = TextEncoder(config.text_features, torch.device("cpu"))
    sample = next(iter(samples(tmp_path / "set", "val").values()))
    expected_hidden, expected_pooled = encoder([sample["caption_original"]])[0]
    hidden, pooled = decode_features(sample, "original", 16)
    assert np.abs(hidden - expected_hidden.numpy()).max() < 2e-3  # float16
    assert np.abs(pooled - expected_pooled.numpy()).max() < 2e-3


def test_as_many_threads_decode_as_the_process_may_use_cpus(
    tmp_path: Path, prep_values: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not as many as the machine has: Slurm gives a job some of them."""
    found = []

    def recorded(*arguments: object) -> Iterator[object]:
        found.append(arguments[-1])
        return prepare_all(*arguments)

    monkeypatch.setattr(tokenization, "prepare_all", recorded)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 4, 5})
    tokenize(parse_config(PrepConfig, prep_values | {"output": str(tmp_path / "set")}))
    assert found == [3]


def test_a_finished_output_is_reused_and_never_overwritten(tmp_path: Path, prep_values: dict) -> None:
    values = prep_values | {"output": str(tmp_path / "set")}
    first = tokenize(parse_config(PrepConfig, values))
    before = contents(tmp_path / "set")
    assert tokenize(parse_config(PrepConfig, values)) == first
    assert contents(tmp_path / "set") == before and not (tmp_path / "set.work").exists()
    with pytest.raises(UserError, match=r"made with validation_fraction = 0\.15, this job has 0\.5"):
        tokenize(parse_config(PrepConfig, values | {"validation_fraction": 0.5}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"source": {"kind": "folder", "path": "/absent"}}, "/absent"),
        ({"output": "."}, "exists and is no data set"),
        ({"tokenizer": "/absent"}, "no tokenizer at /absent"),
        ({"resolution": 32}, r"resolution 32 is not the last of scales \(4\) x the tokenizer's downsampling \(4\)"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, prep_values: dict, change: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        tokenize(parse_config(PrepConfig, prep_values | {"output": str(tmp_path / "set")} | change))
