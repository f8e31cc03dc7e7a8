"""Tokenization as jobs of a cluster: partitions, kills, two workers at once, S3, and the merge."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep import tokenization
from data_prep.job import Manifest, read_job, read_manifest
from data_prep.journal import Chunk, Journal
from data_prep.merging import merge
from data_prep.partition import Partition
from data_prep.tokenization import tokenize, tokenize_partition
from data_prep.verification import verify
from data_prep.work import unfinished_work
from star_dist.config import PrepConfig, parse_config
from star_dist.data.schema import decode_captions, decode_tokens, read_metadata
from star_dist.errors import Unavailable, UserError
from star_dist.object_store import open_store
from tests.data_prep.jobs import contents, samples
from tests.data_prep.test_webdataset_source import write_tar
from tests.fault_proxy import FaultProxy
from tests.s3 import S3Bucket

KILLS = 10
PICTURES = 400


def make_config(values: dict[str, Any], output: Path | str, **changes: Any) -> PrepConfig:
    return parse_config(PrepConfig, values | {"output": str(output)} | changes)


def run_partitions(config: PrepConfig, count: int, workers: int = 1) -> None:
    for i in range(count):
        tokenize_partition(config, Partition(i, count), workers=workers)


def bucket_contents(bucket: S3Bucket, prefix: str) -> dict[str, bytes]:
    return {key.removeprefix(prefix): bucket.read(key) for key in bucket.keys(prefix)}


@pytest.fixture(scope="module")
def many_pictures(tmp_path_factory: pytest.TempPathFactory, prep_values: dict[str, Any]) -> dict[str, Any]:
    """A job over some hundred pictures, a few of which cannot be used, in small chunks and shards."""
    folder = tmp_path_factory.mktemp("many")
    draw = np.random.default_rng(0)
    for i in range(PICTURES):
        Image.fromarray(draw.integers(0, 255, (20, 24, 3), np.uint8)).save(folder / f"{i:04}.png")
        (folder / f"{i:04}.txt").write_text(f"picture {i}")
    for i in range(0, PICTURES, 37):
        (folder / f"{i:04}.png").write_bytes(b"broken")
    source = {"kind": "folder", "path": str(folder)}
    return prep_values | {"source": source, "batch": 8, "chunk": 16, "shard_size_bytes": 4096}


def in_fork(function: Callable[..., Any], *arguments: Any) -> multiprocessing.Process:
    """Starts a function in a process forked from this one, silent."""

    def silent() -> None:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        function(*arguments)

    process = multiprocessing.get_context("fork").Process(target=silent)
    process.start()
    return process


@pytest.mark.slow
@pytest.mark.parametrize("on_s3", [False, True])
def test_a_job_that_is_killed_ten_times_ends_in_the_bytes_of_a_clean_one(
    many_pictures: dict[str, Any], tmp_path: Path, on_s3: bool, request: pytest.FixtureRequest
) -> None:
    bucket: S3Bucket | None = request.getfixturevalue("s3") if on_s3 else None

    def job(name: str) -> PrepConfig:
        output = f"{bucket.url}/{name}" if bucket else tmp_path / name
        return make_config(many_pictures, output, work=str(tmp_path / f"{name}.work"))

    def written(name: str) -> dict[str, bytes]:
        return bucket_contents(bucket, f"{name}/") if bucket else contents(tmp_path / name)

    started = time.monotonic()
    tokenize(job("clean"), workers=1)
    clean_s = time.monotonic() - started
    clean = written("clean")
    assert len([name for name in clean if name.endswith(".mds")]) > 10

    draw = random.Random(0)
    kills, attempt = 0, 0
    while kills < KILLS:
        attempt += 1
        name = f"killed-{attempt}"
        finished = False
        while not finished:
            process = in_fork(tokenize, job(name), None, 1 + kills % 3)
            process.join(None if kills >= KILLS else draw.uniform(0, clean_s / 2))
            process.kill()
            process.join()
            finished = process.exitcode == 0
            kills += not finished
            assert process.exitcode in (0, -signal.SIGKILL), "the job ended by itself with an error"
        assert written(name) == clean, f"after {kills} kills"
        assert not list((tmp_path / f"{name}.work").glob("*")), "unfinished work is left"


def test_a_kill_at_any_step_that_makes_something_visible(prep_values: dict[str, Any], tmp_path: Path) -> None:
    """Chunks, files of the output, the manifest and the merge all appear by a rename: each in turn never happens."""
    tokenize(make_config(prep_values, tmp_path / "clean", chunk=32))
    clean = contents(tmp_path / "clean")
    rename = os.replace

    def dies_at(step: int, config: PrepConfig) -> None:
        steps = iter(range(step))

        def replace(source: Any, target: Any) -> None:
            if next(steps, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            rename(source, target)

        os.replace = replace
        tokenize(config)

    for step in range(100):
        config = make_config(prep_values, tmp_path / f"killed-{step}", chunk=32)
        process = in_fork(dies_at, step, config)
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        tokenize(config)
        assert contents(tmp_path / f"killed-{step}") == clean, f"after a kill at rename {step}"
        if process.exitcode == 0:
            break
    assert 12 < step < 99


def test_the_result_depends_neither_on_threads_nor_on_chunks(many_pictures: dict[str, Any], tmp_path: Path) -> None:
    tokenize(make_config(many_pictures, tmp_path / "one"), workers=1)
    tokenize(make_config(many_pictures, tmp_path / "four"), workers=4)
    assert contents(tmp_path / "one") == contents(tmp_path / "four")
    run_partitions(make_config(many_pictures, tmp_path / "in parts"), 3)
    merge(str(tmp_path / "in parts"))
    assert samples(tmp_path / "in parts", "train") == samples(tmp_path / "one", "train")
    assert samples(tmp_path / "in parts", "val") == samples(tmp_path / "one", "val")


def test_partitions_are_done_once_and_share_all_pictures(
    many_pictures: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(many_pictures, tmp_path / "set")
    run_partitions(config, 3)
    before = contents(tmp_path / "set")
    assert tokenize_partition(config, Partition(1, 3)) is None
    assert "partition 1/3 of" in capsys.readouterr().out and contents(tmp_path / "set") == before
    (metadata,) = merge(str(tmp_path / "set")).values()
    assert sum(metadata.splits.values()) + sum(metadata.rejected.values()) == PICTURES
    assert metadata.rejected == {"not a picture": 11}
    assert len((tmp_path / "set" / "rejects.jsonl").read_text().splitlines()) == 11
    assert len(samples(tmp_path / "set", "train")) == metadata.splits["train"]
    assert metadata.captions == {"original": PICTURES - 11}
    merged = contents(tmp_path / "set")
    merge(str(tmp_path / "set"))
    assert contents(tmp_path / "set") == merged
    with pytest.raises(UserError, match=r"made with partitions = 3, this job has 1"):
        tokenize(config)


def test_a_second_worker_on_a_partition_is_refused(many_pictures: dict[str, Any], tmp_path: Path) -> None:
    config = make_config(many_pictures, tmp_path / "set")
    tokenize_partition(config, Partition(1, 2))
    job_hash = read_job(open_store(config.output)).hash

    def hold() -> None:
        with unfinished_work(config.output, None, job_hash, Partition(0, 2)) as folder:
            (folder / "held").touch()
            time.sleep(60)

    process = in_fork(hold)
    try:
        while not list((tmp_path / "set.work").rglob("held")):
            time.sleep(0.01)
        with pytest.raises(Unavailable, match=r"another worker is at partition 0/2 in .*; wait for it, or stop it"):
            tokenize_partition(config, Partition(0, 2))
    finally:
        process.kill()
        process.join()
    tokenize_partition(config, Partition(0, 2))
    merge(str(tmp_path / "set"))


def test_two_workers_that_do_not_see_each_other_do_no_harm(
    many_pictures: dict[str, Any], s3: S3Bucket, tmp_path: Path
) -> None:
    """On two hosts, each with its own working folder."""
    jobs = [make_config(many_pictures, f"{s3.url}/set", work=str(tmp_path / name)) for name in ("host-a", "host-b")]
    processes = [in_fork(tokenize_partition, job, Partition(), None, 1) for job in jobs]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    merge(f"{s3.url}/set")
    tokenize(make_config(many_pictures, tmp_path / "alone"))
    assert bucket_contents(s3, "set/") == contents(tmp_path / "alone")


def test_merge_refuses_what_is_not_one_complete_job(many_pictures: dict[str, Any], tmp_path: Path) -> None:
    output = tmp_path / "set"
    with pytest.raises(UserError, match=r"no tokenization job at .*set: it has no job\.json"):
        merge(str(output))
    config = make_config(many_pictures, output)
    tokenize_partition(config, Partition(2, 3))
    with pytest.raises(UserError, match=r"2 of 3 partitions are missing at .*: 0/3, 1/3; run .* --partition 0/3"):
        merge(str(output))
    tokenize_partition(config, Partition(0, 3))
    tokenize_partition(config, Partition(1, 3))
    manifest = output / "parts" / "00001-of-00003.json"
    text = manifest.read_text()
    (output / "parts" / "00001-of-00004.json").write_text(text)
    with pytest.raises(UserError, match=r"holds foreign partitions: parts/00001-of-00004\.json; its job has 3"):
        merge(str(output))
    (output / "parts" / "00001-of-00004.json").unlink()
    found = Manifest.model_validate_json(text)
    manifest.write_text(found.model_copy(update={"job_hash": "0123"}).model_dump_json())
    with pytest.raises(UserError, match=r"00001-of-00003\.json is of another job \(0123, partition 1/3"):
        merge(str(output))
    manifest.write_text(text)
    shard = next(name for name in found.files if name.endswith(".mds"))
    data = (output / shard).read_bytes()
    (output / shard).write_bytes(data[:-1])
    with pytest.raises(UserError, match=rf"mds has {len(data) - 1} bytes, its manifest says {len(data)}; remove"):
        merge(str(output))
    (output / shard).unlink()
    with pytest.raises(UserError, match=rf"{shard} is missing.*run --partition 1/3 again"):
        merge(str(output))
    manifest.unlink()
    tokenize_partition(config, Partition(1, 3))
    assert (output / shard).read_bytes() == data
    merge(str(output))
    index = output / next(name for name in found.files if name.endswith("/index.json"))
    index.write_text(index.read_text().replace('"samples": ', '"samples":9', 1))  # of the same size
    with pytest.raises(UserError, match=rf"{index} is not what its manifest says"):
        merge(str(output))


def test_other_jobs_at_an_output_are_refused(many_pictures: dict[str, Any], tmp_path: Path) -> None:
    config = make_config(many_pictures, tmp_path / "set")
    tokenize_partition(config, Partition(0, 2))
    with pytest.raises(UserError, match=r"made with partitions = 2, this job has 4"):
        tokenize_partition(config, Partition(0, 4))
    with pytest.raises(UserError, match=r"made with min_side = 0, this job has 8; change output"):
        tokenize_partition(config.model_copy(update={"min_side": 8}), Partition(1, 2))
    pictures = tmp_path / "pictures"
    shutil.copytree(many_pictures["source"]["path"], pictures)
    values = many_pictures | {"source": {"kind": "folder", "path": str(pictures)}}
    config = make_config(values, tmp_path / "growing")
    tokenize_partition(config, Partition(0, 2))
    (pictures / "new.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"made with (source_hash|units) = .*, this job has"):
        tokenize_partition(config, Partition(1, 2))
    with pytest.raises(UserError, match=rf"asks for 500 partitions of a source of {PICTURES + 1} units"):
        tokenize_partition(make_config(values, tmp_path / "other"), Partition(0, 500))
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "job.json").write_text('{"resolution": 32}')
    with pytest.raises(UserError, match=r"old/job\.json has schema version None, this code writes 2; change output"):
        tokenize(make_config(values, tmp_path / "old"))


def test_the_order_of_keys_in_a_config_makes_no_other_job(many_pictures: dict[str, Any], tmp_path: Path) -> None:
    """Neither for partitions that are merged, nor for the unfinished work of one that goes on."""
    source = many_pictures["source"] | {"captions": {"original": "caption"}}
    first = make_config(many_pictures | {"source": source}, tmp_path / "set")
    other = make_config(many_pictures | {"source": dict(reversed(source.items()))}, tmp_path / "set")
    tokenize_partition(first, Partition(0, 2))

    def dies(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tokenization, "assemble", dies)
        tokenize_partition(first, Partition(1, 2))
    (begun,) = (tmp_path / "set.work").glob("*/00001-of-00002")
    tokenize_partition(other, Partition(1, 2))
    assert not begun.exists()
    (metadata,) = merge(str(tmp_path / "set")).values()
    assert sum(metadata.splits.values()) + metadata.rejected["not a picture"] == PICTURES


def test_a_job_that_older_code_began_goes_on(prep_values: dict[str, Any], tmp_path: Path) -> None:
    """Options that are newer than job.json count with their defaults; another value of one is another job."""
    values = prep_values | {"validation_fraction": 0.0}
    config = make_config(values, tmp_path / "set")
    tokenize_partition(config, Partition(0, 2))
    description = tmp_path / "set" / "job.json"
    stored = json.loads(description.read_text())
    del stored["config"]["max_aspect"], stored["config"]["validation_fraction"]
    description.write_text(json.dumps(stored))
    (tmp_path / "set" / "parts" / "00000-of-00002.json").unlink()  # of a job whose description had the option
    with pytest.raises(UserError, match=r"made with max_aspect = null, this job has 2\.0"):
        tokenize_partition(make_config(values, tmp_path / "set", max_aspect=2.0), Partition(0, 2))
    for i in range(2):
        tokenize_partition(config, Partition(i, 2))
    merge(config.output)
    (report,) = verify(config.output)
    assert not report.problems and report.splits["train"].samples > 0
    stored["config"]["colour"] = "red"
    description.write_text(json.dumps(stored))
    with pytest.raises(UserError, match=r"is of another job, or of other code: .*unknown key colour.*; change output"):
        tokenize_partition(config, Partition(0, 2))


def test_unfinished_work_of_another_job_is_neither_taken_over_nor_lost(
    prep_values: dict[str, Any], tmp_path: Path
) -> None:
    class Killed(Exception):
        pass

    with pytest.raises(Killed), unfinished_work("unused", str(tmp_path / "work"), "another job", Partition()) as work:
        Journal(work, {"key": "str"}).append(Chunk(items=1, last=True), [{"key": "x"}], [])
        raise Killed
    before = contents(tmp_path / "work")
    tokenize(make_config(prep_values, tmp_path / "set", work=str(tmp_path / "work")))
    assert "x" not in samples(tmp_path / "set", "train") and contents(tmp_path / "work") == before


def test_what_kills_have_left_goes_at_the_next_start(prep_values: dict[str, Any], tmp_path: Path) -> None:
    """Shards that were assembled and a chunk that was begun: on a job's last metres, tens of gigabytes."""
    config = make_config(prep_values, tmp_path / "set", chunk=32)

    def dies_in_the_upload() -> None:
        tokenization.upload = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        tokenize(config)

    in_fork(dies_in_the_upload).join()
    (leftover,) = (tmp_path / "set.work").rglob("partial-*")
    assert list(leftover.rglob("*.mds"))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def look(*_: Any) -> None:
            assert not leftover.exists() and len(list((tmp_path / "set.work").rglob("chunk.json"))) == 2
            raise KeyboardInterrupt

        patch.setattr(tokenization, "assemble", look)
        tokenize(config)
    tokenize(config)
    assert not (tmp_path / "set.work").exists()


@pytest.mark.parametrize("full", ["work", "output"])
def test_a_full_disk_is_named_and_the_same_command_goes_on(
    many_pictures: dict[str, Any], tmp_path: Path, small_disk: Path, full: str
) -> None:
    places = {"work": tmp_path / "work", "output": tmp_path / "set"}
    places[full].symlink_to(small_disk)
    config = make_config(many_pictures, places["output"], work=str(places["work"]))
    with pytest.raises(
        UserError, match=rf"cannot write to {places[full]}.*: No space left.*run the same command again"
    ):
        tokenize_partition(config, Partition(), workers=1)
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    tokenize(config)
    tokenize(make_config(many_pictures, tmp_path / "clean"))
    assert contents(places["output"]) == contents(tmp_path / "clean")


def test_tars_of_s3_are_copied_to_the_temporary_folder_which_is_named_when_it_is_full(
    prep_values: dict[str, Any], s3: S3Bucket, tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And never to the folder of unfinished work: on NFS a file that is removed while it is open stays until then."""
    pictures = Path(prep_values["source"]["path"])
    members = {f"{i:03}.png": (pictures / f"{i:03}.png").read_bytes() for i in range(30)}
    (tmp_path / "tars").mkdir()
    for name in ("a.tar", "b.tar"):
        write_tar(tmp_path / "tars" / name, members | {f"{i:03}.txt": b"a picture" for i in range(30)})
    s3.upload(tmp_path / "tars", "tars/")
    values = prep_values | {"source": {"kind": "webdataset", "path": f"{s3.url}/tars"}}
    config = make_config(values, tmp_path / "set")
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    full = rf"cannot write to the temporary folder {small_disk} \(TMPDIR\): No space left.*run the same command again"
    with pytest.raises(UserError, match=full):
        tokenize(config)
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    (metadata,) = tokenize(config).values()
    assert sum(metadata.splits.values()) == 60
    assert not (tmp_path / "set.work").exists() and not list(small_disk.iterdir())


@pytest.mark.parametrize("text", ["3", "1/2/3", "-1/2", "2/2", "0/0", "a/b"])
def test_partitions_are_counted_from_zero(text: str) -> None:
    with pytest.raises(UserError, match="--partition"):
        Partition.parse(text)
    assert str(Partition.parse("3/64")) == "3/64" and Partition(3, 64).name == "00003-of-00064"


def test_from_s3_to_s3_through_faults(
    prep_values: dict[str, Any], s3: S3Bucket, s3_faults: FaultProxy, tmp_path: Path
) -> None:
    """Pictures and output on S3, while the store refuses and cuts answers: as if nothing had been."""
    s3.upload(Path(prep_values["source"]["path"]), "pictures/")
    values = prep_values | {"source": {"kind": "folder", "path": f"{s3.url}/pictures"}}
    with pytest.raises(UserError, match=r"output s3://.* is on S3; set work to a folder of a file system"):
        tokenize(make_config(values, f"{s3.url}/set"))
    s3_faults.inject("status_503", path="pictures/00", times=3)
    s3_faults.inject("truncate", path="pictures/01", times=3)
    s3_faults.inject("reset", path="pictures/02", times=3)
    s3_faults.inject("status_503", path="/set/", method="PUT", times=3)
    tokenize(make_config(values, f"{s3.url}/set", work=str(tmp_path / "work")), workers=8)
    assert s3_faults.hits == {"status_503": 6, "truncate": 3, "reset": 3}
    tokenize(make_config(prep_values, tmp_path / "local"))
    there, here = bucket_contents(s3, "set/"), contents(tmp_path / "local")
    described_by_source = {"job.json", "parts/00000-of-00001.json"}
    assert {name: there[name] for name in there.keys() - described_by_source} == {
        name: here[name] for name in here.keys() - described_by_source
    }


def test_a_store_that_stays_away_stops_the_job_and_drops_nothing(
    prep_values: dict[str, Any], s3: S3Bucket, s3_faults: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("star_dist.object_store.ATTEMPTS", 2)
    s3.upload(Path(prep_values["source"]["path"]), "pictures/")
    values = prep_values | {"source": {"kind": "folder", "path": f"{s3.url}/pictures"}}
    config = make_config(values, tmp_path / "set")
    s3_faults.inject("status_503", path="020.png")
    with pytest.raises(UserError, match=r"cannot read s3://.*/pictures/020\.png .*: the store answered SlowDown"):
        tokenize(config)
    s3_faults.clear()
    (metadata,) = tokenize(config).values()
    assert metadata.rejected == {} and sum(metadata.splits.values()) == 60


def test_several_resolutions_captions_and_filters_in_one_pass(tmp_path: Path, prep_values: dict[str, Any]) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    lines = []
    sizes = {
        "small": (16, 16),
        "large": (40, 48),
        "long": (16, 80),
        "tiny": (8, 40),
        "thin": (10, 40),  # at all limits, and so within them
        "ugly": (40, 40),
        "unknown": (40, 40),
    }
    for name, size in sizes.items():
        Image.new("RGB", size, "red").save(pictures / f"{name}.png")
        score = {"ugly": 3.0, "unknown": None, "thin": 5.0}.get(name, 6.0)
        fields = {"file": f"{name}.png", "caption": name, "detailed": f"a {name} picture", "aesthetic": score}
        lines.append(json.dumps({key: value for key, value in fields.items() if value is not None}))
    lines[0] = json.dumps({"file": "small.png", "caption": "small", "aesthetic": 6})
    for name, caption in {"short": "x", "wordy": "x" * 300}.items():
        Image.new("RGB", (20, 20)).save(pictures / f"{name}.png")
        lines.append(json.dumps({"file": f"{name}.png", "caption": "fine", "detailed": caption, "aesthetic": 6}))
    (pictures / "captions.jsonl").write_text("\n".join(lines))
    values = {key: value for key, value in prep_values.items() if key not in ("resolution", "scales")} | {
        "source": {
            "kind": "folder",
            "path": str(pictures),
            "captions": {"original": "caption", "detailed": "detailed"},
        },
        "resolutions": [
            {"resolution": 32, "scales": [1, 2, 4, 8], "min_side": 32, "batch": 1},
            {"resolution": 16, "scales": [1, 2, 3, 4]},
        ],
        "validation_fraction": 0.0,
        "min_side": 10,
        "max_aspect": 4.0,
        "min_caption_chars": 2,
        "max_caption_chars": 200,
        "min_scores": {"aesthetic": 5.0},
    }
    tokenize(make_config(values, tmp_path / "set"))
    rejected = {
        "aspect too extreme": 1,
        "caption too long": 1,
        "caption too short": 1,
        "low aesthetic score": 1,
        "no aesthetic score": 1,
        "too small": 1,
    }
    small, large = (read_metadata(tmp_path / "set" / side) for side in ("16", "32"))
    assert small.rejected == rejected and large.rejected == rejected | {"too small for 32 pixels": 2}
    assert small.captions == {"original": 3, "detailed": 2} and large.captions == {"original": 1, "detailed": 1}
    assert small.scales == (1, 2, 3, 4) and large.scales == (1, 2, 4, 8)
    found = samples(tmp_path / "set" / "16", "train")
    assert list(found) == ["large.png", "small.png", "thin.png"]
    assert decode_captions(found["small.png"], small) == {"original": "small"}
    (sample,) = samples(tmp_path / "set" / "32", "train").values()
    assert decode_captions(sample, large) == {"original": "large", "detailed": "a large picture"}
    assert len(decode_tokens(sample, large)) == 1 + 4 + 16 + 64
    rejects = [json.loads(line) for line in (tmp_path / "set" / "rejects.jsonl").read_text().splitlines()]
    assert {reject["key"]: reject["reason"] for reject in rejects}["long.png"] == "aspect too extreme"
    assert read_manifest(open_store(tmp_path / "set"), "parts/00000-of-00001.json").too_small == {"32": 2}
    run_partitions(make_config(values, tmp_path / "in parts"), 2)
    assert merge(str(tmp_path / "in parts"))[32].rejected == large.rejected


def test_a_resolution_without_a_picture_keeps_no_other_from_its_end(prep_values: dict, tmp_path: Path) -> None:
    sections = [{"resolution": 16, "scales": [1, 4]}, {"resolution": 32, "scales": [1, 8], "min_side": 32}]
    values = prep_values | {"resolution": None, "scales": None, "resolutions": sections}
    for _ in range(2):
        with pytest.raises(UserError, match=r"at 32 pixels \(rejected: .*32 pixels': 60.*; complete are 16 pixels"):
            tokenize(make_config(values, tmp_path / "set"))
        assert sum(read_metadata(tmp_path / "set" / "16").splits.values()) == 60
        assert (tmp_path / "set" / "rejects.jsonl").exists() and not (tmp_path / "set" / "32" / "dataset.json").exists()


def test_a_source_without_a_usable_picture_blames_no_option_that_left_none_out(
    prep_values: dict[str, Any], tmp_path: Path
) -> None:
    said = r"\(rejected: {'caption too short': 60}\); change source or the option that left them out, and output$"
    with pytest.raises(UserError, match=said):
        tokenize(make_config(prep_values, tmp_path / "set", min_caption_chars=100))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"validation_fraction": 1.0}, "validation_fraction: input should be less than 1, got 1.0"),
        ({"shard_size_bytes": 2**32}, "shard_size_bytes: input should be less than 4294967296, got 4294967296"),
        ({"resolutions": [{"resolution": 16, "scales": [1, 2]}]}, "resolutions is given beside resolution or scales"),
        ({"resolution": None}, "resolution and scales are missing"),
        ({"min_caption_chars": 3000}, "min_caption_chars 3000 is more than max_caption_chars 2000"),
        ({"max_aspect": 0.5}, "max_aspect: input should be greater than or equal to 1, got 0.5"),
        ({"scales": [2, 3]}, "scales must start with 1"),
        (
            {"resolution": None, "scales": None, "resolutions": [{"resolution": 16, "scales": [1, 4]}] * 2},
            r"resolutions has \[16, 16\]; give each resolution once",
        ),
    ],
)
def test_settings_that_do_not_fit_together_are_named(prep_values: dict[str, Any], change: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        make_config(prep_values, "unused", **change)
