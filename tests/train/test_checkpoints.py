"""Checkpoints on another number of ranks, on S3, damaged, permanent and rolling."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from star_dist.config import CheckpointSection, RunConfig
from star_dist.errors import UserError
from star_dist.object_store import open_store
from star_dist.train import shards
from star_dist.train.checkpoint import INDEX, CheckpointFolder, RunInputs, check_same_run, shard_name
from star_dist.train.facts import read_events
from star_dist.train.places import LocalPlace, S3Place
from star_dist.train.shards import Piece, Scalars, ShardReader, write_index, write_shard
from tests.ranks import RankFailed, run_ranks
from tests.s3 import S3Bucket
from tests.train.runs import metrics, train, train_on, weights

MakeConfig = Callable[..., RunConfig]

# Worst case over 2 -> 1, 1 -> 2, 2 -> 4 and 2 at stage 3 -> 1 at stage 1 after 4 steps of rate 1e-3, on a CPU.
LOSS_TOLERANCE = 1e-6  # measured worst case 1.3e-7 in fp32
WEIGHT_TOLERANCE = 1e-6  # measured worst case 1.5e-8 in fp32


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after", "stage"), [(2, 1, 3), (1, 2, 3), (2, 4, 3), (2, 1, 1), (1, 2, 2), (1, 2, 0)]
)
def test_another_number_of_ranks_goes_on(
    run_config: MakeConfig, tmp_path: Path, before: int, after: int, stage: int
) -> None:
    """The losses and weights of an undisturbed run, up to the order of float sums; at another ZeRO stage, too."""

    def config(name: str, steps: int, zero_stage: int) -> RunConfig:
        return run_config(
            run_dir=str(tmp_path / name),
            train={"steps": steps, "zero_stage": zero_stage},
            optimizer={"learning_rate": 1e-3, "schedule": "constant"},
        )

    undisturbed = config("undisturbed", 8, 3)
    expected = train_on(undisturbed, before)
    train_on(config("elastic", 4, 3), before)
    resumed = config("elastic", 8, stage)
    found = train_on(resumed, after)
    worst_loss = max(abs(found[step]["loss/total"] - expected[step]["loss/total"]) for step in expected)
    expected_weights, found_weights = weights(undisturbed), weights(resumed)
    worst_weight = max((found_weights[n] - w).abs().max().item() for n, w in expected_weights.items())
    print(f"{before} -> {after}, stage {stage}: loss {worst_loss:.1e}, weight {worst_weight:.1e}")
    assert sorted(found) == sorted(expected)
    assert [event["step"] for event in read_events(Path(resumed.run_dir)) if event["event"] == "start"] == [0, 4]
    assert worst_loss < LOSS_TOLERANCE and worst_weight < WEIGHT_TOLERANCE


def test_all_of_the_optimizer_is_restored_on_another_number_of_ranks(run_config: MakeConfig) -> None:
    """Moments, the count of updates and the settings of each group: read back by one rank, equal to those of two."""
    config = run_config(train={"steps": 3})
    train_on(config, 2)

    def state() -> tuple[dict, dict]:
        from star_dist.process import prepare_process_environment
        from star_dist.train.engine import Engine

        engine = Engine(config, prepare_process_environment())
        engine.state.load(CheckpointFolder(Path(config.run_dir)).find(None))
        tensors, scalars = engine.state.snapshot()
        return {name: tensor.numpy() for name, tensor in tensors.items()}, vars(scalars)

    ((whole, scalars),) = run_ranks(state, 1)
    halves = run_ranks(state, 2)
    assert scalars["optimizer_steps"] == 3 and scalars["groups"]["decay"]["weight_decay"] == 0.05
    assert scalars["groups"]["no_decay"]["weight_decay"] == 0.0
    assert all(half[1] == scalars for half in halves)
    for name, values in whole.items():
        parts = [torch.from_numpy(half[name]) for half, _ in halves if name in half]
        assert torch.equal(torch.cat(parts), torch.from_numpy(values)), name
    assert any(values.any() for name, values in whole.items() if name.startswith("exp_avg_sq/"))


def damaged(folder: Path, how: str) -> str:
    """Damages a checkpoint; returns what the message says."""
    shard = folder / "shard_00000.safetensors"
    if how == "truncated":
        shard.write_bytes(shard.read_bytes()[:100])
        return r"shard_00000\.safetensors has 100 bytes, its marker says \d+"
    if how == "missing":
        shard.unlink()
        return r"shard_00000\.safetensors is missing, its marker says \d+"
    if how == "marker alone":
        for path in folder.iterdir():
            if path.name != "complete.json":
                path.unlink()
        return r"shard_00000\.safetensors is missing, its marker says \d+"
    (folder / "complete.json").write_text('{"step": 6}')
    return r"complete\.json is no marker of this version"


@pytest.mark.parametrize("how", ["truncated", "missing", "marker alone", "empty marker"])
def test_a_damaged_checkpoint_is_refused_or_by_option_passed_over(run_config: MakeConfig, how: str) -> None:
    config = run_config(train={"steps": 6})
    expected = train_on(config, 1)
    folder = CheckpointFolder(Path(config.run_dir))
    said = damaged(Path(folder.place.root) / "step_00000006", how)
    with pytest.raises(UserError, match=rf"(?s)is damaged: {said}.*\[3\].*on_damaged to previous"):
        folder.find(None)
    if how in ("missing", "empty marker"):
        taken = run_config(train={"steps": 6}, checkpoint={"on_damaged": "previous", "every": 3})
        assert train_on(taken, 1) == expected
        names = sorted(path.name for path in folder.place.root.iterdir())
        assert names[0].startswith("abandoned_step_00000006") and names[1:] == ["step_00000003", "step_00000006"]


def read(reader: ShardReader, kind: str, start: int, stop: int) -> Tensor:
    """A range of the parameter `bias`."""
    values = torch.full((stop - start,), torch.nan)
    reader.read_into([(kind, Piece("bias", start, stop), values)])
    return values


def test_a_shard_of_other_bytes_is_refused(run_config: MakeConfig) -> None:
    """Right size, wrong content: not a traceback either."""
    config = run_config(train={"steps": 3})
    train_on(config, 1)
    shard = Path(config.run_dir) / "checkpoints" / "step_00000003" / "shard_00000.safetensors"
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(RankFailed, match=r"UserError: checkpoint .*step_00000003 cannot be read: SafetensorError"):
        train_on(run_config(train={"steps": 6}), 1)


def test_bytes_that_a_disk_has_changed_are_found(
    run_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In whatever part of a tensor is read, and there alone; files without checksums are read as they are."""
    monkeypatch.setattr("star_dist.train.shards.BLOCK", 8)
    folder = CheckpointFolder(tmp_path, CheckpointSection())
    folder.begin(3, 0)
    values = torch.randn(30)
    write_shard(folder.place, folder.name(3), 0, {"weight/bias": values, "exp_avg/bias": -values})
    scalars = Scalars(3, 3, 0, groups={}, group_of={})
    write_index(folder.place, folder.name(3), {"bias": [30]}, [[Piece("bias", 0, 30)]], scalars)
    folder.complete(3, 1, RunInputs("hash", ("data",)), (), run_config())
    checkpoint = folder.find(3)
    ranges = [(start, stop) for start in range(30) for stop in range(start + 1, 31)]
    reader = ShardReader(checkpoint)
    assert all(torch.equal(read(reader, "weight", *r), values[r[0] : r[1]]) for r in ranges)
    shard = Path(checkpoint.path) / "shard_00000.safetensors"
    whole, changed = shard.read_bytes(), values.clone()
    changed[17] += 1e-3
    for zeros in (False, True):
        changed[16:24] *= not zeros  # as a page that was never written
        assert whole.count(values.numpy().tobytes()) == 1
        shard.write_bytes(whole.replace(values.numpy().tobytes(), changed.numpy().tobytes()))
        assert torch.equal(read(reader, "exp_avg", 0, 30), -values)
        for start, stop in ranges:
            if stop <= 16 or start >= 24:
                assert torch.equal(read(reader, "weight", start, stop), values[start:stop])
                continue
            with pytest.raises(UserError, match=r"is damaged: weight/bias in shard_00000\.safetensors is not what"):
                read(reader, "weight", start, stop)
    save_file({"weight/bias": changed, "exp_avg/bias": values}, shard)
    assert torch.equal(read(reader, "weight", 0, 30), changed)


def test_other_settings_of_the_optimizer_are_refused(run_config: MakeConfig) -> None:
    """As of code that has other groups: its moments would go on under another decay."""
    train_on(config := run_config(train={"steps": 3}), 1)
    index = Path(config.run_dir) / "checkpoints" / "step_00000003" / "index.json"
    text = index.read_text()
    assert text.count('"weight_decay": 0.05') == 1
    index.write_text(text.replace('"weight_decay": 0.05', '"weight_decay": 0.07'))
    with pytest.raises(RankFailed, match=r"with groups\.decay\.weight_decay = 0\.07, this code has 0\.05"):
        train_on(run_config(train={"steps": 6}), 1)


def test_a_checkpoint_of_older_code_goes_on(run_config: MakeConfig) -> None:
    """Written before an option there was, and by a PyTorch whose AdamW had a switch more."""
    train_on(run_config(train={"steps": 3}), 1)
    config = run_config(train={"steps": 6})
    folder = Path(config.run_dir) / "checkpoints" / "step_00000003"
    index = json.loads((folder / "index.json").read_text())
    index["scalars"]["groups"]["decay"]["capturable"] = False
    (folder / "index.json").write_text(json.dumps(index))
    marker = json.loads((folder / "complete.json").read_text())
    marker["files"]["index.json"] = (folder / "index.json").stat().st_size
    del marker["config"]["train"]["scale_loss_power"], marker["config"]["model"]["positions"]
    (folder / "complete.json").write_text(json.dumps(marker))
    checkpoint, other = CheckpointFolder(Path(config.run_dir)).find(3), run_config(train={"scale_loss_power": 1.0})
    with pytest.raises(UserError, match=r"train\.scale_loss_power = 0\.0, the run has 1\.0; restore the value"):
        check_same_run(checkpoint, other)
    assert sorted(train_on(config, 1)) == [1, 2, 3, 4, 5, 6]
    marker["config"]["train"]["no_more"] = 1
    (folder / "complete.json").write_text(json.dumps(marker))
    with pytest.raises(UserError, match=r"the config of checkpoint .*step_00000003: .*train\.no_more") as error:
        check_same_run(CheckpointFolder(Path(config.run_dir)).find(3), config)
    assert "\n" not in str(error.value)


def test_an_index_that_lacks_values_is_refused(run_config: MakeConfig, tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, CheckpointSection())
    folder.begin(3, 0)
    scalars = Scalars(3, 3, 0, groups={}, group_of={})
    write_shard(folder.place, folder.name(3), 0, {"weight/bias": torch.arange(32.0)})
    write_index(folder.place, folder.name(3), {"bias": [32]}, [[Piece("bias", 0, 31)]], scalars)
    folder.complete(3, 1, RunInputs("hash", ("data",)), (), run_config())
    reader = ShardReader(folder.find(3))
    assert torch.equal(read(reader, "weight", 2, 31), torch.arange(2.0, 31))
    with pytest.raises(UserError, match=r"is damaged: its index has 31 of the 32 values 0\.\.32 of bias"):
        reader.weights()


def test_permanent_and_rolling_checkpoints(run_config: MakeConfig) -> None:
    config = run_config(train={"steps": 14}, checkpoint={"every": 2, "keep_last": 2, "keep_every": 6})
    train_on(config, 1)
    assert CheckpointFolder(Path(config.run_dir)).complete_steps() == [6, 12, 14]


def test_checkpoints_on_s3(run_config: MakeConfig, tmp_path: Path, s3: S3Bucket) -> None:
    """Saved, pruned, resumed on another number of ranks and exported from there; nothing in the run folder."""
    from star_dist.train.export_checkpoint import export_checkpoint

    remote = f"{s3.url}/runs/a"
    options = {"every": 3, "keep_last": 1, "remote": remote}
    config = run_config(train={"steps": 6}, checkpoint=options, optimizer={"schedule": "constant"})
    train_on(config, 2)
    assert not (Path(config.run_dir) / "checkpoints").exists()
    folder = CheckpointFolder(Path(config.run_dir), config.checkpoint)
    assert folder.complete_steps() == [6]
    undisturbed = run_config(
        run_dir=str(tmp_path / "undisturbed"), train={"steps": 9}, optimizer={"schedule": "constant"}
    )
    expected = train_on(undisturbed, 2)
    resumed = run_config(train={"steps": 9}, checkpoint=options, optimizer={"schedule": "constant"})
    assert train_on(resumed, 2) == expected
    assert export_checkpoint(Path(config.run_dir), tmp_path / "export", None, "fp32") == 9
    back = run_config(train={"steps": 9}, checkpoint=options | {"resume_step": 9}, optimizer={"schedule": "constant"})
    with pytest.raises(UserError, match=r"has no complete checkpoint of step 6, only of steps \[9\]"):
        CheckpointFolder(Path(back.run_dir), back.checkpoint).find(6)
    with pytest.raises(UserError, match=r"start another checkpoint\.remote and run_dir$"):
        check_same_run(folder.find(None), run_config(seed=1, run_dir=str(tmp_path / "b"), checkpoint=options))
    S3Place(remote).check_access()
    S3Place(remote).check_writing()
    assert not list(open_store(remote).list("write-check"))
    with pytest.raises(UserError, match="absent-bucket"):
        S3Place("s3://absent-bucket/x").check_writing()
    S3Place(remote).rename("step_00000009", "abandoned")
    assert folder.complete_steps() == [] and "complete.json" in S3Place(remote).files("abandoned")


def test_shards_on_s3_pass_through_the_temporary_folder_one_at_a_time(
    run_config: MakeConfig, s3: S3Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start that needs all of a large run's shards must find room for one."""
    folder = CheckpointFolder(tmp_path, CheckpointSection(remote=f"{s3.url}/shards"))
    folder.begin(3, 0)
    for rank in range(3):
        values = torch.arange(10.0) + 10 * rank
        write_shard(folder.place, folder.name(3), rank, {"weight/bias": values, "exp_avg/bias": -values})
    pieces = [[Piece("bias", 10 * rank, 10 * rank + 10)] for rank in range(3)]
    write_index(folder.place, folder.name(3), {"bias": [2, 15]}, pieces, Scalars(3, 3, 0, groups={}, group_of={}))
    folder.complete(3, 3, RunInputs("hash", ("data",)), (), run_config())
    local = tmp_path / "temporary"
    local.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(local))
    reader = ShardReader(folder.find(3))
    held: list[int] = []
    open_shard = shards.safe_open

    def look(path: Path, framework: str) -> Any:
        held.append(len(list(local.rglob("*.safetensors"))))
        return open_shard(path, framework)

    monkeypatch.setattr(shards, "safe_open", look)
    assert torch.equal(reader.weights()["bias"], torch.arange(30.0).view(2, 15))
    assert torch.equal(read(reader, "exp_avg", 8, 21), -torch.arange(8.0, 21))
    assert held == [1] * 6 and not list(local.iterdir())


def test_s3_out_of_reach_does_not_end_the_training(run_config: MakeConfig, s3: S3Bucket) -> None:
    """The bucket goes away: reported at every save, and only the last one ends the run, with a message."""
    import boto3

    client = boto3.client("s3", endpoint_url=os.environ["S3_ENDPOINT_URL"])
    client.create_bucket(Bucket="short-lived")
    config = run_config(train={"steps": 5}, checkpoint={"every": 2, "remote": "s3://short-lived"})

    def run() -> None:
        from star_dist.train.trainer import Trainer

        plain = Trainer._train_from

        def train_from(trainer: Trainer, first_step: int) -> int:
            client.delete_bucket(Bucket="short-lived")
            return plain(trainer, first_step)

        Trainer._train_from = train_from
        train(config)

    with pytest.raises(RankFailed, match=r"Unavailable: the last checkpoint could not be written to s3://short-lived"):
        run_ranks(run, 1)
    assert sorted(metrics(config)) == [1, 2, 3, 4, 5]
    failures = [event for event in read_events(Path(config.run_dir)) if event["event"] == "save_failed"]
    assert [event["step"] for event in failures] == [2, 4, 5] and "NoSuchBucket" in failures[0]["reason"]


def test_what_a_killed_save_leaves_goes_with_the_next_and_no_marker_stands_without_all_shards(
    tmp_path: Path, run_config: MakeConfig
) -> None:
    folder = CheckpointFolder(tmp_path, CheckpointSection())
    for step, names in ((1, ["shard_00000.safetensors"]), (2, [INDEX, shard_name(0), shard_name(1)]), (3, [INDEX])):
        folder.begin(step, 0)
        for name in names:
            (tmp_path / "checkpoints" / folder.name(step) / name).write_bytes(b"1")
    folder.complete(2, 2, RunInputs("hash", ("data",)), (), run_config())
    with pytest.raises(OSError, match=r"2 of 3 files are not at .*step_00000003, such as shard_00000"):
        folder.complete(3, 2, RunInputs("hash", ("data",)), (), run_config())
    folder.prune()
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["step_00000002", "step_00000003"]


def test_a_node_that_does_not_see_the_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"no folder .*/step_00000001 here; all nodes must write to the same place"):
        write_shard(LocalPlace(tmp_path), "step_00000001", 1, {"weight/a": torch.zeros(1)})


def test_no_room_is_found_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = CheckpointFolder(tmp_path, CheckpointSection())
    monkeypatch.setattr(type(folder.place), "free_bytes", lambda place: 10**9)
    with pytest.raises(OSError, match=r"takes 1\.10 GB and .* has 1\.00 GB free"):
        folder.begin(5, 10**9)
    assert folder.complete_steps() == []
