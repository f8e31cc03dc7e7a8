"""Shards that stay open: the library's bytes, few files, and no room kept that the cache has given up."""

import os
from pathlib import Path

import numpy as np
import pytest
from streaming import MDSWriter, Stream
from streaming.base.world import World

from star_dist.data import open_shards
from star_dist.data.open_shards import OpenShard


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[OpenShard]:
    """Ten shards of seven samples of other lengths."""
    draws = np.random.default_rng(0)
    with MDSWriter(out=str(tmp_path), columns={"data": "bytes"}, size_limit=1200) as writer:
        for i in range(70):
            writer.write({"data": bytes([i]) * int(draws.integers(120, 130))})
    stream = Stream(local=str(tmp_path), split="")
    monkeypatch.setattr(OpenShard, "_open", {})
    found = [OpenShard(shard) for shard in stream.get_shards(World.detect(), False)]
    assert [len(shard) for shard in found] == [7] * 10
    return found


def open_files(folder: Path) -> list[str]:
    """Names of the files of a folder, removed ones too, that this process has open."""
    targets = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return sorted(Path(target).name for target in targets if target.startswith(f"{folder}/shard"))


def test_samples_are_those_of_the_library(shards: list[OpenShard]) -> None:
    for shard in shards:
        for i in (3, 0, 6):
            assert shard.get_sample_data(i) == super(OpenShard, shard).get_sample_data(i)


def test_only_the_last_used_stay_open(shards: list[OpenShard], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_shards, "MOST_OPEN", 3)
    for i in (0, 1, 2, 0, 3, 4):
        assert shards[i][i]["data"][:1] == bytes([7 * i + i])
    assert open_files(tmp_path) == [f"shard.0000{i}.mds" for i in (0, 3, 4)]


def test_evicted_shards_are_closed_when_another_opens(shards: list[OpenShard], tmp_path: Path) -> None:
    for i in (0, 1, 2):
        shards[i][0]
    shards[0].evict()
    shards[2].evict()
    shards[3][0]
    assert open_files(tmp_path) == ["shard.00001.mds", "shard.00003.mds"]
    with pytest.raises(FileNotFoundError):  # upon which the library fetches it
        shards[0][0]


def test_a_file_that_ends_early_is_no_sample(shards: list[OpenShard], tmp_path: Path) -> None:
    path = tmp_path / "shard.00004.mds"
    os.truncate(path, path.stat().st_size - 1)
    shards[4][5]
    with pytest.raises(IndexError, match=r"shard.00004.mds ends within sample 6"):
        shards[4][6]
    os.truncate(tmp_path / "shard.00005.mds", 10)
    with pytest.raises(IndexError, match=r"shard.00005.mds ends within its table of samples"):
        shards[5][0]
