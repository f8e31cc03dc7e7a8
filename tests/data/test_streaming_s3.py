"""Streaming from a real S3 server through the faults of object stores: nothing lost, repeated or silent."""

import json
import math
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np
import pytest

from data_prep.tokenization import tokenize
from star_dist.config import PrepConfig, RunConfig, parse_config
from star_dist.data import shared_memory
from star_dist.data.batches import TrainBatches, spread_over_sources
from star_dist.data.fetch import fetch_metadata
from star_dist.data.shared_memory import RECORD_PREFIX, SEGMENTS, remove_segments_of_dead_jobs
from star_dist.errors import UserError
from star_dist.files import try_lock
from star_dist.process import prepare_process_environment
from tests.data.test_dataset import order
from tests.fault_proxy import FaultProxy
from tests.ranks import RankFailed, Ranks, run_ranks
from tests.s3 import S3Bucket
from tests.train.runs import start_training, train, wait_for_step, weights

MakeConfig = Callable[..., RunConfig]
SHARD = "shard.00002.mds"


@pytest.fixture(scope="session")
def many_shards(prep_values: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tests' data set in shards of a few samples."""
    output = tmp_path_factory.mktemp("many") / "set"
    tokenize(parse_config(PrepConfig, prep_values | {"output": str(output), "shard_size_bytes": 1200}))
    assert len(list((output / "train").rglob("*.mds"))) >= 5
    return output


@pytest.fixture
def on_s3(run_config: MakeConfig, many_shards: Path, s3: S3Bucket, tmp_path: Path) -> MakeConfig:
    """Configs of a run that streams the data set from S3 into a cache of its own."""
    s3.upload(many_shards, "set/")

    def make(**sections: dict) -> RunConfig:
        data = {"remote": f"{s3.url}/set", "local": str(tmp_path / "cache"), "download_timeout_s": 3}
        return run_config(**sections | {"data": data | sections.get("data", {})})

    return make


@pytest.fixture
def undisturbed(run_config: MakeConfig, many_shards: Path) -> list[list[int]]:
    return order(run_config(data={"local": str(many_shards)}), 0, 6, 1)


def training_shards(folder: Path) -> list[dict]:
    return json.loads((folder / "train" / "index.json").read_text())["shards"]


def shard_samples(folder: Path, shard: str) -> set[int]:
    """Ids of the samples of one training shard."""
    first = 0
    for entry in training_shards(folder):
        if entry["raw_data"]["basename"].endswith(shard):
            return set(range(first, first + entry["samples"]))
        first += entry["samples"]
    raise AssertionError(shard)


# -------------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("fault", "times"), [("status_503", 3), ("reset", 2), ("truncate", 2), ("corrupt", 2), ("stall", 1), ("slow", None)]
)
def test_passing_faults_change_nothing(
    on_s3: MakeConfig, s3_faults: FaultProxy, undisturbed: list[list[int]], fault: str, times: int | None
) -> None:
    s3_faults.inject(fault, path=SHARD, times=times, bytes_per_s=1000)
    assert order(on_s3(), 0, 6, 1) == undisturbed
    assert s3_faults.hits[fault] >= 1


def test_two_ranks_with_workers_read_through_faults(
    on_s3: MakeConfig, s3_faults: FaultProxy, undisturbed: list[list[int]]
) -> None:
    for fault in ("corrupt", "reset", "status_503"):
        s3_faults.inject(fault, path="/shard.0000", times=2)
    assert order(on_s3(data={"num_workers": 1}), 0, 6, 2) == undisturbed
    assert all(s3_faults.hits[fault] == 2 for fault in ("corrupt", "reset", "status_503"))


def test_a_corrupt_shard_stops_training_and_leaves_no_trace(
    on_s3: MakeConfig, s3_faults: FaultProxy, undisturbed: list[list[int]], tmp_path: Path
) -> None:
    s3_faults.inject("corrupt", path=SHARD)
    config = on_s3(data={"download_attempts": 2})
    with pytest.raises(
        RankFailed, match=rf"UserError: cannot read the data set at .*{SHARD} after 2 downloads: Checks"
    ):
        order(config, 0, 6, 1)
    assert not list((tmp_path / "cache").rglob(SHARD))  # the next start would take it as good
    s3_faults.clear()
    assert order(config, 0, 6, 1) == undisturbed


def test_a_corrupt_shard_is_skipped_and_counted_by_option(
    on_s3: MakeConfig, s3_faults: FaultProxy, many_shards: Path, undisturbed: list[list[int]]
) -> None:
    s3_faults.inject("corrupt", path=SHARD)
    data = {"download_attempts": 1, "corrupt_shards": "skip"}
    shards = [shard["raw_data"]["bytes"] for shard in training_shards(many_shards)]
    limit = 4 * max(shards)  # the least that the library takes
    assert limit < sum(shards)  # shards go and come back, the skipped one too
    limited = on_s3(data=data | {"cache_limit": f"{limit}b"})
    assert order(limited, 0, 6, 1) == undisturbed  # ids and batches keep their places
    config = on_s3(data=data, train={"steps": 6}, checkpoint={"every": 6}, optimizer={"learning_rate": 1e-9})
    run_ranks(train, 1, config)
    lines = [json.loads(line) for line in (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()]
    seen = {sample for step in undisturbed for sample in step}
    assert sum(line["data/skipped_samples"] for line in lines) == len(shard_samples(many_shards, SHARD) & seen) > 0
    assert all(line["loss/total"] == pytest.approx(math.log(64), abs=0.1) for line in lines)  # a mean of the others


def test_a_file_cut_short_in_the_cache_is_fetched_again(
    on_s3: MakeConfig, undisturbed: list[list[int]], tmp_path: Path
) -> None:
    config = on_s3()
    assert order(config, 0, 6, 1) == undisturbed
    (shard,) = (tmp_path / "cache" / "train").rglob(SHARD)
    whole = shard.read_bytes()
    shard.write_bytes(whole[:100])
    assert order(config, 0, 6, 1) == undisturbed
    assert shard.read_bytes() == whole


# --------------------------------------------------------------------------------------------------- credentials


@pytest.mark.parametrize(
    ("environment", "data", "said"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong-secret"}, {}, "the secret key is wrong; check AWS_SECRET"),
        ({"AWS_ACCESS_KEY_ID": "unknown-key"}, {}, "does not know the access key; check AWS_ACC"),
        (
            {},
            {"remote": "s3://no-such-bucket-here/set"},
            "cannot read s3://no-such-bucket-here/set/dataset.json.*the bucket does not exist",
        ),
        (
            {},
            {"remote": "{bucket}/other"},
            r"no data set at .*/other: it has no dataset.json .* data_prep.merge \S+/other; .* such as \S+/other/256\)",
        ),
        ({}, {"s3_endpoint_url": "http://127.0.0.1:9"}, "the store cannot be reached; check the endpoint"),
    ],
)
def test_access_mistakes_are_one_message_before_training(
    on_s3: MakeConfig, s3: S3Bucket, monkeypatch: pytest.MonkeyPatch, environment: dict, data: dict, said: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "")
    monkeypatch.setattr("star_dist.object_store.ATTEMPTS", 2)
    data = {name: value.format(bucket=s3.url) for name, value in data.items()}
    with pytest.raises(UserError, match=said) as error:
        fetch_metadata(on_s3(data=data).data)
    assert "\n" not in str(error.value)
    for secret in ("wrong-secret", s3.server.secret_key):
        assert secret not in str(error.value)


def test_a_missing_index_is_one_message(on_s3: MakeConfig, s3: S3Bucket) -> None:
    config = on_s3()
    s3.client().delete_object(Bucket=s3.bucket, Key="set/train/index.json")
    said = r"cannot read the data set at \S+/set/train: .*/set/train/index\.json not found"
    with pytest.raises(RankFailed, match=rf"\n\S*Unavailable: {said}"):
        order(config, 0, 1, 2)


def test_endpoint_and_region_come_from_the_config(
    on_s3: MakeConfig, s3: S3Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "")
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    config = on_s3(data={"s3_endpoint_url": s3.endpoint, "s3_region": "us-east-1"})
    (metadata,) = fetch_metadata(config.data)
    assert metadata.splits["train"] == 50
    monkeypatch.delenv("AWS_DEFAULT_REGION")


# --------------------------------------------------------------------------------------- jobs beside and after jobs


def test_two_trainings_do_not_share_a_cache(on_s3: MakeConfig, run_config: MakeConfig, tmp_path: Path) -> None:
    from star_dist.data.streams import claim_caches

    data = on_s3().data
    locks = claim_caches(data)
    with pytest.raises(RankFailed, match="Unavailable: another training on this host uses the cache"):
        run_ranks(claim_caches, 1, data)
    for lock in locks:
        lock.close()
    assert run_ranks(lambda: bool(claim_caches(data)), 1) == [True]


def test_killed_jobs_are_cleaned_up_after_and_living_ones_left_alone(
    run_config: MakeConfig, many_shards: Path, tmp_path: Path
) -> None:
    """A whole job killed with -9, the tracker that frees its shared memory included; another one lives on.

    Each has a folder for temporary files of its own, as jobs of some clusters have.
    """
    config = run_config(data={"local": str(many_shards)})
    kept = []

    def job(temporary: Path) -> int:
        temporary.mkdir()
        tempfile.tempdir = str(temporary)
        prepare_process_environment()
        remove_segments_of_dead_jobs()
        batches = TrainBatches(config, fetch_metadata(config.data), 1)
        kept.append((batches, next(batches.starting_at(0))))
        return batches.dataset._shm_prefix_int

    def start(name: str) -> tuple[Ranks, int]:
        """A job that has its number and lives on."""
        running = Ranks(job, 1, tmp_path / name)
        succeeded, value = running.pipes[0].recv()
        assert succeeded, value
        return running, value

    jobs = [start("killed"), start("living")]
    try:
        (killed_job, killed), (_, living) = jobs
        killed_job.kill()
        assert list(SEGMENTS.glob(f"{killed:06}_*"))  # nobody was left to remove them
        assert list((tmp_path / "killed").glob(f"{killed:06}_*"))
        before = {file: file.stat().st_ino for file in SEGMENTS.glob(f"*{living:06}*")}
        jobs.append(start("next"))
        assert not list(SEGMENTS.glob(f"*{killed:06}*"))
        assert not list((tmp_path / "killed").glob(f"{killed:06}_*"))
        assert {file: file.stat().st_ino for file in SEGMENTS.glob(f"*{living:06}*")} == before
        assert SEGMENTS / f"{RECORD_PREFIX}{living:06}" in before
    finally:
        for running, _ in jobs:
            running.kill()


def test_two_jobs_clean_up_after_a_killed_one_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One has seen the record that the other removes before it is opened, which makes it anew."""

    def lock_after_the_other_has_removed_it(path: Path) -> IO[str] | None:
        path.unlink()
        return try_lock(path)

    (tmp_path / f"{RECORD_PREFIX}000000").touch()
    monkeypatch.setattr(shared_memory, "SEGMENTS", tmp_path)
    monkeypatch.setattr(shared_memory, "try_lock", lock_after_the_other_has_removed_it)
    remove_segments_of_dead_jobs()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_training_from_s3_killed_and_resumed_ends_like_an_undisturbed_local_one(
    on_s3: MakeConfig,
    run_config: MakeConfig,
    many_shards: Path,
    s3: S3Bucket,
    s3_faults: FaultProxy,
    tmp_path: Path,
) -> None:
    local = run_config(run_dir=str(tmp_path / "local"), data={"local": str(many_shards)}, train={"steps": 9})
    run_ranks(train, 2, local)
    s3_faults.inject("status_503", path="/shard.0000", times=4)
    s3_faults.inject("corrupt", path="/shard.0000", times=2)
    config = on_s3(run_dir=str(tmp_path / "s3"), train={"steps": 9})
    ranks = start_training(config, 2)
    wait_for_step(config, 5)
    ranks.kill()
    other = json.loads(s3.read("set/dataset.json")) | {"content_hash": "of another"}
    s3.write("other/dataset.json", json.dumps(other).encode())
    elsewhere = {"remote": f"{s3.url}/other", "local": str(tmp_path / "other")}
    with pytest.raises(RankFailed, match=r"on data with content_hash \w{16}, s3://.*/other now has of another;"):
        run_ranks(train, 2, on_s3(run_dir=str(tmp_path / "s3"), train={"steps": 9}, data=elsewhere))
    run_ranks(train, 2, config)
    for path in Path(config.run_dir).rglob("*"):
        assert path.is_dir() or s3.server.secret_key.encode() not in path.read_bytes(), path
    expected = weights(local)
    for name, tensor in weights(config).items():
        assert tensor.equal(expected[name]), name


# ------------------------------------------------------------------------------------------------------ mixtures


def test_mixtures_follow_their_weights_and_the_step_alone(
    run_config: MakeConfig, many_shards: Path, dataset_folder: Path, tmp_path: Path
) -> None:
    copies = [tmp_path / name for name in "ab"]
    for copy, source in zip(copies, (many_shards, dataset_folder)):
        shutil.copytree(source, copy)
    sources = [{"local": str(copy), "weight": weight} for copy, weight in zip(copies, (3.0, 1.0))]
    config = run_config(data={"local": None, "sources": sources})
    whole = order(config, 0, 12, 1)  # an epoch has as many samples as both sets together
    share = np.mean([sample < 50 for step in whole for sample in step])
    assert share == pytest.approx(0.75, abs=0.02)
    assert order(config, 5, 7, 2) == whole[5:]


def test_validation_takes_equal_shares_of_all_sources() -> None:
    assert spread_over_sources(4, [10, 10]) == [0, 1, 10, 11]
    assert spread_over_sources(7, [2, 10, 3]) == [0, 1, 2, 3, 4, 12, 13]
    assert spread_over_sources(99, [2, 3]) == [0, 1, 2, 3, 4]


def test_sources_and_local_exclude_each_other(run_config: MakeConfig) -> None:
    from star_dist.config import ConfigError

    with pytest.raises(ConfigError, match="give either sources or local"):
        run_config(data={"sources": [{"local": "/a", "weight": 1.0}]})
    with pytest.raises(ConfigError, match="local is missing"):
        run_config(data={"local": None})
