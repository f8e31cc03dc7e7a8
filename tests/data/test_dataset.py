"""Streaming in an order that is a function of the step alone."""

import errno
import json
import os
import resource
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from streaming import MDSWriter
from streaming.base.dataset import _Iterator, _ShardState
from streaming.base.format import reader_from_json

from data_prep.tokenization import tokenize
from star_dist.config import PrepConfig, RunConfig, parse_config
from star_dist.data.batches import HeldOutBatches, drop_captions
from star_dist.data.dataset import CaptionedTokens
from star_dist.data.fetch import check_local_shards, fetch_metadata
from star_dist.errors import UserError
from star_dist.process import prepare_process_environment
from tests.ranks import RankFailed, Ranks, run_ranks

MakeConfig = Callable[..., RunConfig]


def order(config: RunConfig, first_step: int, steps: int, world_size: int) -> list[list[int]]:
    """Sample ids of each step, over all ranks."""

    def one_rank() -> list[list[int]]:
        import torch.distributed

        from star_dist.data.batches import TrainBatches

        process = prepare_process_environment()
        torch.distributed.init_process_group("gloo")
        batches = TrainBatches(config, fetch_metadata(config.data), process.world_size)
        stream = batches.starting_at(first_step)
        return [
            [i for _ in range(batches.micro_batches_per_step) for i in next(stream).sample_ids] for _ in range(steps)
        ]

    ranks = run_ranks(one_rank, world_size)
    return [sorted(sample for rank in ranks for sample in rank[step]) for step in range(steps)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_order_depends_on_the_step_alone(run_config: MakeConfig, num_workers: int) -> None:
    """Over three epochs, from any step, on 1 or 2 ranks; within an epoch no sample comes twice."""
    config = run_config(data={"num_workers": num_workers, "prefetch_batches": 2})
    whole = order(config, 0, 18, 1)
    assert order(config, 0, 18, 2) == whole
    for first_step in (3, 6, 11):
        assert order(config, first_step, 18 - first_step, 2) == whole[first_step:]
    steps_per_epoch = 6  # 52 samples of the training split, 8 a step
    for epoch in range(3):
        seen = [sample for step in whole[epoch * steps_per_epoch : (epoch + 1) * steps_per_epoch] for sample in step]
        assert len(set(seen)) == len(seen) == 48
    assert whole[:6] != whole[6:12]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_going_back_in_one_process_gives_the_same_samples(run_config: MakeConfig, num_workers: int) -> None:
    """As after a spike: within an epoch, and from the next epoch into the one before it."""
    config = run_config(data={"num_workers": num_workers, "prefetch_batches": 2})
    spans = [(0, 5), (2, 3), (5, 4), (4, 4)]  # first step and number of steps; an epoch has 6

    def one_rank() -> list[list[tuple[int, ...]]]:
        import torch.distributed

        from star_dist.data.batches import TrainBatches

        process = prepare_process_environment()
        torch.distributed.init_process_group("gloo")
        batches = TrainBatches(config, fetch_metadata(config.data), process.world_size)
        found = []
        for first_step, steps in spans:
            stream = batches.starting_at(first_step)
            found.append([next(stream).sample_ids for _ in range(steps * batches.micro_batches_per_step)])
            stream.close()
        return found

    for rank in run_ranks(one_rank, 2):
        by_step: dict[int, tuple[int, ...]] = {}
        for (first_step, steps), ids in zip(spans, rank):
            per_step = len(ids) // steps
            for i in range(steps):
                of_step = sum(ids[i * per_step : (i + 1) * per_step], ())
                assert by_step.setdefault(first_step + i, of_step) == of_step, first_step + i


def test_a_worker_that_ends_while_it_downloads_leaves_the_shard_to_others(
    run_config: MakeConfig, dataset_folder: Path, tmp_path: Path
) -> None:
    """As after a spike, when a loader is left in the middle of an epoch; its workers have 5 s to end."""
    place = {"remote": str(dataset_folder), "local": str(tmp_path / "cache")}
    config = run_config(data=place | {"num_workers": 1, "batch_timeout_s": 60})
    slow, begun = tmp_path / "slow", tmp_path / "begun"

    def one_rank() -> list[tuple[int, ...]]:
        import torch.distributed
        from streaming import Stream

        from star_dist.data.batches import TrainBatches

        plain = Stream.prepare_shard

        def prepare_shard(stream: Stream, shard: Any) -> int:
            begun.touch()
            while slow.exists():
                time.sleep(0.05)
            return plain(stream, shard)

        Stream.prepare_shard = prepare_shard
        process = prepare_process_environment()
        torch.distributed.init_process_group("gloo")
        batches = TrainBatches(config, fetch_metadata(config.data), process.world_size)
        slow.touch()
        left = iter(batches.loader)
        while not begun.exists():
            time.sleep(0.05)
        del left
        slow.unlink()
        stream = batches.starting_at(0)
        return [next(stream).sample_ids for _ in range(3)]

    (found,) = run_ranks(one_rank, 1)
    assert len(set(sum(found, ()))) == 3 * config.train.micro_batch


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_epoch_leaves_no_file_open(run_config: MakeConfig, num_workers: int) -> None:
    config = run_config(data={"num_workers": num_workers})

    def open_files() -> list[int]:
        import torch.distributed

        from star_dist.data.batches import TrainBatches

        process = prepare_process_environment()
        torch.distributed.init_process_group("gloo")
        batches = TrainBatches(config, fetch_metadata(config.data), process.world_size)
        stream = batches.starting_at(0)
        found = []
        for _ in range(8):
            for _ in range(batches.steps_per_epoch * batches.micro_batches_per_step):
                next(stream)
            found.append(len(list(Path("/proc/self/fd").iterdir())))
        return found

    (found,) = run_ranks(open_files, 1)
    assert min(found[4:]) <= max(found[:4]), found  # what is open for a moment aside


def test_stored_features_keep_no_file_open(run_config: MakeConfig, prep_values: dict[str, Any], tmp_path: Path) -> None:
    """Batches that loader workers have ready: two features of every picture in each."""
    text = json.loads(run_config().text.model_dump_json())
    tokenize(parse_config(PrepConfig, prep_values | {"output": str(tmp_path / "set"), "text_features": text}))
    data = {"local": str(tmp_path / "set"), "text_features": True, "num_workers": 1}
    config = run_config(data=data, train={"micro_batch": 8})

    def read() -> list[tuple[torch.Size, torch.dtype]]:
        import torch.distributed

        from star_dist.data.batches import TrainBatches

        process = prepare_process_environment()
        torch.distributed.init_process_group("gloo")
        batches = TrainBatches(config, fetch_metadata(config.data), process.world_size)
        most = len(list(Path("/proc/self/fd").iterdir())) + 32
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        stream = batches.starting_at(0)
        found = [next(stream) for _ in range(batches.steps_per_epoch)]
        return [(pooled.shape, pooled.dtype) for batch in found for _, pooled in batch.features]

    (features,) = run_ranks(read, 1)
    assert features == [((16,), torch.float16)] * 48


def test_a_shard_that_is_evicted_while_it_is_waited_for_is_fetched_again() -> None:
    """As a cache limit does it that is small for what is read ahead."""
    states = [_ShardState.LOCAL, _ShardState.PREPARING]
    fetched = []

    class Evicting:
        predownload, spanner, _event, _shard_states = None, {7: (0, 0), 8: (1, 0), 9: (1, 1)}, threading.Event(), states

        def prepare_shard(self, shard_id: int, blocking: bool) -> None:
            fetched.append((shard_id, blocking))
            states[shard_id] = _ShardState.LOCAL

    it = _Iterator(np.array([7, -1, 8, 9]))
    thread = threading.Thread(target=CaptionedTokens._ready_thread, args=(Evicting(), it), daemon=True)
    thread.start()
    while it.ready_index < 2:
        time.sleep(0.01)
    assert fetched == [] and thread.is_alive()
    states[1] = _ShardState.REMOTE  # fetched and evicted between two looks
    thread.join(10)
    assert not thread.is_alive() and it.ready_index == 4 and fetched == [(1, False)]


def test_jobs_of_one_host_may_start_and_end_together(run_config: MakeConfig) -> None:
    """Two jobs of two ranks make data sets and drop them, as fast as they can: none sees the other's shared memory."""
    config = run_config()

    def numbers() -> list[int]:
        import torch.distributed

        from star_dist.data.batches import TrainBatches

        prepare_process_environment()
        torch.distributed.init_process_group("gloo")
        return [TrainBatches(config, fetch_metadata(config.data), 2).dataset._shm_prefix_int for _ in range(8)]

    jobs = [Ranks(numbers, 2) for _ in range(2)]
    (first, first_again), (second, second_again) = (job.results() for job in jobs)
    assert first == first_again and second == second_again
    assert not set(first) & set(second)


def test_how_samples_are_shuffled_is_the_configs_choice(run_config: MakeConfig) -> None:
    plain = order(run_config(data={"shuffle": False, "num_canonical_nodes": 1}), 0, 6, 1)
    assert plain == [list(range(8 * step, 8 * step + 8)) for step in range(6)]
    assert order(run_config(data={"shuffle_algorithm": "py1s"}), 0, 6, 1) != order(run_config(), 0, 6, 1)


def test_seed_changes_the_order(run_config: MakeConfig) -> None:
    assert order(run_config(seed=1), 0, 6, 1) != order(run_config(seed=2), 0, 6, 1)


def test_dropped_captions_are_a_function_of_seed_step_and_sample() -> None:
    ids = list(range(2000))
    dropped = drop_captions(ids, seed=1, step=5, rate=0.1)
    assert 0.07 < sum(dropped) / len(ids) < 0.13
    assert drop_captions(ids[::-1], seed=1, step=5, rate=0.1) == dropped[::-1]
    assert drop_captions(ids, seed=1, step=6, rate=0.1) != dropped
    assert drop_captions(ids, seed=2, step=5, rate=0.1) != dropped
    assert not any(drop_captions(ids, seed=1, step=5, rate=0.0))
    assert all(drop_captions(ids, seed=1, step=5, rate=1.0))


def test_cut_and_missing_shards_are_named(dataset_folder: Path, run_config: MakeConfig, tmp_path: Path) -> None:
    copy = tmp_path / "set"
    shutil.copytree(dataset_folder, copy)
    data = run_config(data={"local": str(copy)}).data
    check_local_shards(data, "train")
    (shard,) = (copy / "train").rglob("*.mds")
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-7])
    with pytest.raises(UserError, match=rf"shard\.00000\.mds has {size - 7} bytes, its index says {size}"):
        check_local_shards(data, "train")
    shard.unlink()
    with pytest.raises(UserError, match=r"shard\.00000\.mds is missing"):
        check_local_shards(data, "train")
    with pytest.raises(UserError, match="no split 'other'"):
        check_local_shards(data, "other")
    for content in ("", "[]", '{"version": 2}', '{"version": 2, "shards": []}'):
        (copy / "train" / "index.json").write_text(content)
        with pytest.raises(UserError, match=r"train/index\.json is damaged"):
            check_local_shards(data, "train")


def test_a_remote_is_read_through_a_local_cache(dataset_folder: Path, run_config: MakeConfig, tmp_path: Path) -> None:
    """A folder stands for the bucket: the cache starts empty and ends complete; the order is that of the local set."""
    config = run_config(data={"remote": str(dataset_folder), "local": str(tmp_path / "cache")})
    assert order(config, 0, 6, 2) == order(run_config(), 0, 6, 2)
    assert json.loads((tmp_path / "cache" / "dataset.json").read_text())["splits"]["val"]
    assert list((tmp_path / "cache" / "train").rglob("*.mds"))
    copy = tmp_path / "another version"
    shutil.copytree(dataset_folder, copy)
    metadata = json.loads((copy / "dataset.json").read_text()) | {"content_hash": "0123"}
    (copy / "dataset.json").write_text(json.dumps(metadata))
    with pytest.raises(UserError, match="holds another version of"):
        fetch_metadata(run_config(data={"remote": str(copy), "local": str(tmp_path / "cache")}).data)
    absent = run_config(data={"remote": str(tmp_path / "absent"), "local": str(tmp_path / "cache2")})
    with pytest.raises(UserError, match=r"no data set at .*absent: it has no dataset"):
        fetch_metadata(absent.data)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_remote_shard_that_is_cut_short_is_named(
    dataset_folder: Path, run_config: MakeConfig, tmp_path: Path, num_workers: int
) -> None:
    copy = tmp_path / "set"
    shutil.copytree(dataset_folder, copy)
    (shard,) = (copy / "train").rglob("*.mds")
    shard.write_bytes(shard.read_bytes()[:-7])
    data = {"remote": str(copy), "local": str(tmp_path / "cache"), "download_attempts": 1, "batch_timeout_s": 5}
    config = run_config(data=data | {"num_workers": num_workers})
    said = r"cannot read the data set at .*shard\.00000\.mds after 1 downloads"
    with pytest.raises(RankFailed, match=rf"\nstar_dist\.errors\.UserError: {said}"):
        order(config, 0, 3, 1)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ({"tokens": np.full(30, 64, "<u2").tobytes()}, r"token 64, the codebook has 64"),
        ({"tokens": bytes(59)}, r"59 bytes of tokens, scales \[1, 2, 3, 4\] take 60"),
        ({"tokens": b""}, r"0 bytes of tokens"),
        ({"caption_original": ""}, r"no caption"),
    ],
)
def test_a_damaged_sample_of_a_local_data_set_is_named(
    dataset_folder: Path, run_config: MakeConfig, tmp_path: Path, damage: dict[str, Any], said: str
) -> None:
    """Of shards with the right size, which is all that is looked at before training."""
    (index,) = json.loads((dataset_folder / "train" / "index.json").read_text())["shards"]
    samples = list(reader_from_json(str(dataset_folder), "train", index))
    samples[7] |= damage
    copy = tmp_path / "set"
    shutil.copytree(dataset_folder, copy)
    columns = dict(zip(index["column_names"], index["column_encodings"]))
    with MDSWriter(out=str(copy / "train"), columns=columns, exist_ok=True) as writer:
        for sample in samples:
            writer.write(sample)
    config = run_config(data={"local": str(copy), "num_workers": 1})
    key = samples[7]["key"]
    with pytest.raises(RankFailed, match=rf"\n\S*UserError: sample 7 of {copy}/train \(key '{key}'\) .* has {said}"):
        order(config, 0, 6, 1)


def test_a_held_out_shard_that_is_damaged_is_named(
    dataset_folder: Path, run_config: MakeConfig, tmp_path: Path
) -> None:
    """Held-out samples are read one by one, without the threads that download ahead."""
    copy = tmp_path / "set"
    shutil.copytree(dataset_folder, copy)
    (shard,) = (copy / "val").rglob("*.mds")
    shard.write_bytes(shard.read_bytes()[:-7])
    data = {"remote": str(copy), "local": str(tmp_path / "cache"), "download_attempts": 1}
    config = run_config(data=data)

    def validate() -> None:
        prepare_process_environment()
        list(HeldOutBatches(config, fetch_metadata(config.data), 0, 1))

    with pytest.raises(RankFailed, match=r"\n\S*UserError: cannot read the data set .*shard\.00000\.mds"):
        run_ranks(validate, 1)


def test_held_out_samples_that_are_absent_or_fill_up_have_no_weight(
    run_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stored:
        samples_per_stream = np.array([5, 4])

        def __init__(self, *_: object, **__: object) -> None: ...

        def __getitem__(self, i: int) -> dict:
            captions = {"": ""} if i == 1 else {"original": f"picture {i}"}
            return {"sample_id": i, "present": i != 1, "tokens": np.zeros(30, np.uint16), "captions": captions}

    monkeypatch.setattr("star_dist.data.batches.CaptionedTokens", Stored)
    batches = HeldOutBatches(run_config(validation={"num_samples": 3}), (), 0, 1)
    ids, weights = zip(*((batch.sample_ids, weights_B.tolist()) for batch, weights_B in batches))
    assert ids == ((0, 1), (5, 5)) and weights == ([1, 0], [1, 0])


def test_a_cache_without_room_is_one_message(
    dataset_folder: Path, run_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    config = run_config(
        data={"remote": str(dataset_folder), "local": str(tmp_path / "cache"), "download_attempts": 1, "num_workers": 1}
    )
    monkeypatch.setattr("star_dist.data.streams.CheckedStream._prepare_shard_part", full)
    with pytest.raises(RankFailed, match=r"\nstar_dist\.errors\.UserError: .*no room in the cache .*data\.cache_limit"):
        order(config, 0, 3, 1)


def test_what_killed_downloads_leave_goes_at_the_next_start(
    dataset_folder: Path, run_config: MakeConfig, tmp_path: Path
) -> None:
    config = run_config(data={"remote": str(dataset_folder), "local": str(tmp_path / "cache")})
    whole = order(config, 0, 6, 1)
    (shard,) = (tmp_path / "cache" / "train").rglob("*.mds")
    left = [shard.with_name(f"{shard.name}.{ending}") for ending in ("0aF3b29C", "corrupt")]
    for path in left:
        path.write_bytes(b"left")
    assert order(config, 0, 6, 1) == whole
    assert shard.is_file() and not any(path.exists() for path in left)
