"""What `data_prep.verify` finds, and that it finds nothing in a whole data set."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from streaming import MDSWriter

from data_prep.tokenization import tokenize
from data_prep.verification import verify
from data_prep.verify import main
from star_dist.cli import run_command
from star_dist.config import PrepConfig, parse_config
from star_dist.data.schema import SHARD_HASH, columns, content_hash
from star_dist.errors import UserError
from tests.data_prep.jobs import samples
from tests.s3 import S3Bucket


@pytest.fixture
def copied(dataset_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(dataset_folder, tmp_path / "set")


def rewrite(root: Path, change: Callable[[int, dict[str, Any]], None]) -> None:
    """Writes the training split anew with changed samples, as a mistake in the job would: all hashes fit."""
    found = samples(root, "train")
    shutil.rmtree(root / "train")
    with MDSWriter(out=str(root / "train"), columns=columns(["original"], False), hashes=[SHARD_HASH]) as writer:
        for i, sample in enumerate(found.values()):
            change(i, sample)
            writer.write(sample)
    metadata = json.loads((root / "dataset.json").read_text())
    indices = {split: (root / split / "index.json").read_bytes() for split in metadata["splits"]}
    (root / "dataset.json").write_text(json.dumps(metadata | {"content_hash": content_hash(indices)}))


def problems(root: Path) -> list[str]:
    return [problem for report in verify(str(root)) for problem in report.problems]


def test_a_whole_data_set(dataset_folder: Path, s3: S3Bucket) -> None:
    s3.upload(dataset_folder, "some/set/")
    for place, workers in ((str(dataset_folder), 1), (f"{s3.url}/some/set", 2)):
        (report,) = verify(place, workers=workers)
        assert report.problems == [] and report.place == place and report.resolution == 16
        assert report.splits["train"].samples + report.splits["val"].samples == 60
        assert report.splits["train"].captions == {"original": report.splits["train"].samples}
        assert 0 <= report.splits["train"].tokens[0] < report.splits["train"].tokens[1] < 64
        assert "16 pixels, whole" in str(report)


def test_several_resolutions_with_features(prep_values: dict, text_encoder_folder: Path, tmp_path: Path) -> None:
    text = {"encoder": str(text_encoder_folder), "encoder_subfolder": "", "tokenizer_subfolder": "", "width": 16}
    values = prep_values | {
        "output": str(tmp_path / "set"),
        "text_features": text,
        "resolution": None,
        "scales": None,
        "resolutions": [{"resolution": side, "scales": [1, side // 4]} for side in (8, 16)],
    }
    tokenize(parse_config(PrepConfig, values))
    reports = verify(str(tmp_path / "set"))
    assert [(report.resolution, report.problems) for report in reports] == [(8, []), (16, [])]
    with pytest.raises(UserError, match="give the job's output, not one of its folders"):
        verify(str(tmp_path / "set" / "16"))
    empty = tmp_path / "set" / "16" / "empty_caption.safetensors"
    whole = load_file(empty)
    for change, said in (
        (
            lambda: save_file({"text_hidden": whole["text_hidden"]}, empty),
            r"holds \{'text_hidden': \(2, 16\)\}, expected",
        ),
        (lambda: save_file(whole | {"text_pooled": torch.zeros(8)}, empty), r"'text_pooled': \(8,\)\}, expected .*16"),
        (lambda: save_file(whole | {"text_pooled": torch.full((16,), math.nan)}, empty), "values that are not finite"),
        (lambda: empty.write_bytes(b"x"), "is damaged"),
        (empty.unlink, "is missing"),
    ):
        change()
        (found,) = problems(tmp_path / "set")
        assert re.search(rf"^16/empty_caption\.safetensors .*{said}", found)


def test_rejects_are_counted(copied: Path) -> None:
    (copied / "rejects.jsonl").write_text("{}\n")
    assert problems(copied) == ["rejects.jsonl has 1 lines, the manifests say 0"]
    (copied / "rejects.jsonl").unlink()
    assert problems(copied) == ["rejects.jsonl is missing"]


def test_damaged_shards_are_named(copied: Path) -> None:
    (shard,) = (copied / "train").rglob("*.mds")
    name = shard.relative_to(copied).as_posix()
    data = shard.read_bytes()
    shard.write_bytes(data[:500] + bytes([data[500] ^ 1]) + data[501:])
    assert problems(copied)[0].startswith(f"{name} has hash ")
    shard.write_bytes(data[:-1])
    assert problems(copied)[0] == f"{name} has {len(data) - 1} bytes, its index says {len(data)}"
    shard.unlink()
    assert problems(copied)[0] == f"{name} is missing"


def test_damaged_indices_and_counts_are_named(copied: Path) -> None:
    index = copied / "val" / "index.json"
    text = index.read_text()
    index.write_text(text.replace('"samples": ', '"samples":  '))
    assert problems(copied)[0].startswith("the indices have hash ")
    index.write_text("{")
    assert "val/index.json is damaged" in problems(copied)
    index.unlink()
    assert "val/index.json is missing" in problems(copied)
    index.write_text(text)
    metadata = json.loads((copied / "dataset.json").read_text())
    changed = metadata | {"captions": {"original": 61}, "splits": metadata["splits"] | {"train": 7}}
    (copied / "dataset.json").write_text(json.dumps(changed))
    found = problems(copied)
    assert f"split train has {metadata['splits']['train']} samples, dataset.json says 7" in found
    assert "60 samples have caption 'original', dataset.json says 61" in found


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokens": b"\x40\x00" * 30}, "sample 3 has token 64, the codebook has 64"),
        ({"tokens": b"\x00\x00" * 29}, r"sample 3 has 29 tokens, scales \[1, 2, 3, 4\] have 30"),
        ({"tokens": b"\x00"}, r"sample 3 cannot be decoded \(ValueError\)"),
        ({"caption_original": ""}, "sample 3 has no caption 'original'"),
        ({"key": "foreign-9"}, "sample 3 with key 'foreign-9' belongs to another split"),
    ],
)
def test_samples_that_are_wrong_are_named(copied: Path, change: dict[str, Any], said: str) -> None:
    rewrite(copied, lambda i, sample: sample.update(change) if i == 3 else None)
    (found, *_) = problems(copied)
    assert re.search(said, found)


def test_keys_that_come_twice(copied: Path) -> None:
    count = len(samples(copied, "train"))
    first = next(iter(samples(copied, "train")))
    rewrite(copied, lambda i, sample: sample.update(key=first))
    assert problems(copied) == [f"{count - 1} keys come more than once"]


def test_a_shard_full_of_faults_reports_the_first(copied: Path) -> None:
    rewrite(copied, lambda i, sample: sample.update(tokens=b""))
    found = [problem for problem in problems(copied) if problem.startswith("train/shard.00000.mds")]
    assert len(found) == 21 and found[-1].endswith("further problems are left out")


def test_the_command_prints_a_report_and_its_exit_status_says_whether_all_is_well(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["verify", *arguments, "--workers", "1"])
        with pytest.raises(SystemExit) as ended:
            run_command(main)
        return ended.value.code

    assert run(str(copied), "--json") == 0
    assert json.loads(capsys.readouterr().out)[0]["problems"] == []
    next((copied / "val").rglob("*.mds")).unlink()
    assert run(str(copied)) == 1
    said = capsys.readouterr().out
    assert "16 pixels, damaged" in said and "problem: val/" in said
    assert run("/absent") == 2
    assert capsys.readouterr().err.startswith("error: no data set of a tokenization job at /absent")
