"""What a tokenizer's training does when it is asked to end, or when disks, storages or numbers fail."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from star_dist.config import TokenizerTrainConfig
from star_dist.errors import RunEnded, Unavailable, UserError
from star_dist.process import prepare_process_environment
from star_dist.tokenizer import run_files, train, update
from star_dist.tokenizer.batches import StepBatches
from star_dist.tokenizer.io import load_tokenizer, save_tokenizer
from star_dist.tokenizer.run_files import read_checkpoint, write_checkpoint
from star_dist.tokenizer.train import TokenizerTraining
from tests.ranks import RankFailed, run_ranks, signal_this_rank_and_its_workers
from tests.tokenizer.conftest import MakeConfig
from tests.tokenizer.test_training import killed_after, metrics, rank_main

ADVERSARIAL = {
    "loss": {"adversarial": 0.1, "adversarial_start": 1},
    "resolution": 32,
    "tokenizer": {"scales": [1, 2, 4, 8]},
    "learning_rate": 3e-4,
}


def ended(config: TokenizerTrainConfig, before_step: Callable[[int, int], None]) -> list[tuple[int, str]]:
    """Exit code and message of both ranks, which call `before_step(rank, step)` before each step."""

    def run() -> tuple[int, str]:
        train_step = TokenizerTraining._train_step

        def step_after_hook(self: TokenizerTraining, step: int, batch: Any) -> Any:
            before_step(self.process.rank, step)
            return train_step(self, step, batch)

        TokenizerTraining._train_step = step_after_hook
        try:
            rank_main(config)
        except (RunEnded, UserError) as end:
            return end.exit_code, str(end)
        return 0, "finished"

    return run_ranks(run, 2)


def damaged_folder(pictures_folder: Path, folder: Path, num_damaged: int) -> Path:
    """Eight pictures, the first few of which are empty files."""
    folder.mkdir()
    for i, path in enumerate(sorted(pictures_folder.glob("*.png"))[:8]):
        (folder / path.name).write_bytes(b"" if i < num_damaged else path.read_bytes())
    return folder


# ------------------------------------------------------------------------------------------------- asked to end


@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, 75), (signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_to_one_rank_ends_all_after_a_save(
    make_config: MakeConfig, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """And to all processes below it, as launchers send SIGTERM: its loader's workers go on until it has saved."""
    config = make_config(checkpoint_every=100, data={"num_workers": 1}, **ADVERSARIAL)

    def at_step_2(rank: int, step: int) -> None:
        if (rank, step) == (1, 2):
            signal_this_rank_and_its_workers(number)
            time.sleep(0.2)

    assert (
        ended(config, at_step_2) == [(code, f"{number.name}: the training goes on from step 3 when started again")] * 2
    )
    if number == signal.SIGTERM:
        undisturbed = make_config(run_dir=str(tmp_path / "undisturbed"), checkpoint_every=100, **ADVERSARIAL)
        run_ranks(rank_main, 2, undisturbed)
        run_ranks(rank_main, 2, config)
        assert metrics(config) == metrics(undisturbed)
        weights, whole = (load_file(Path(c.run_dir) / "model.safetensors") for c in (config, undisturbed))
        assert all(torch.equal(weights[name], tensor) for name, tensor in whole.items())


def test_files_ask_for_a_save_and_for_the_end(make_config: MakeConfig) -> None:
    config = make_config(checkpoint_every=100)
    run_dir = Path(config.run_dir)

    def ask(rank: int, step: int) -> None:
        if rank == 0 and step == 2:
            (run_dir / "SAVE").touch()
        if rank == 0 and step == 4:
            assert read_checkpoint(run_dir)["step"] == 3
            (run_dir / "STOP").touch()
        time.sleep(1.1 if step in (2, 4) else 0)  # files are looked for once a second

    assert ended(config, ask) == [(0, "STOP file: the training goes on from step 5 when started again")] * 2


def test_an_end_that_cannot_be_saved_is_a_failure(make_config: MakeConfig) -> None:
    """Exit code 75 would bring the job back without end."""
    config = make_config()

    def at_step_2(rank: int, step: int) -> None:
        if step == 2:
            run_files.torch.save = lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, os.strerror(errno.EIO)))
        if (rank, step) == (0, 2):
            os.kill(os.getpid(), signal.SIGTERM)

    said = (
        f"SIGTERM: the checkpoint of step 3 cannot be written to {config.run_dir}; the training goes on from the one "
    )
    assert ended(config, at_step_2) == [(69, said + "before it when started again")] * 2


# --------------------------------------------------------------------------------------------- disks and storages


def test_a_checkpoint_that_cannot_be_written_ends_no_training(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config()
    save, steps = torch.save, []

    def save_or_fail(state: dict[str, Any], file: Any) -> None:
        steps.append(state["step"])
        if state["step"] == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        save(state, file)

    monkeypatch.setattr(run_files.torch, "save", save_or_fail)
    rank_main(config)
    assert steps == [2, 4] and load_tokenizer(Path(config.run_dir)).config == config.tokenizer
    said = (
        f"warning: the checkpoint of step 2 cannot be written to {config.run_dir}: Input/output error; training goes on"
    )
    assert said in capsys.readouterr().err


def test_a_full_disk_keeps_the_checkpoint_before(small_disk: Path) -> None:
    write_checkpoint(small_disk, {"step": 1})
    for num_bytes in (10_000, 100_000):  # what Python's buffer refuses when it is closed, and what torch refuses
        (small_disk / "fill").write_bytes(b"x" * (32768 - 4096 - 4096))
        with pytest.raises(OSError, match="No space left on device"):
            write_checkpoint(small_disk, {"step": 2, "tensor": torch.zeros(num_bytes, dtype=torch.uint8)})
        assert read_checkpoint(small_disk) == {"step": 1}
        assert sorted(path.name for path in small_disk.iterdir()) == ["checkpoint.pt", "fill"]


def test_reports_that_cannot_be_written_end_no_training(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config()
    names = ("metrics.jsonl", "unreadable.jsonl", "reconstructions.png")
    for name in names:
        (Path(config.run_dir) / name).mkdir(parents=True)
    rank_main(config)
    assert load_tokenizer(Path(config.run_dir)).config == config.tokenizer
    errors = capsys.readouterr().err
    for name in names:
        assert errors.count(f"warning: cannot write {config.run_dir}/{name}: Is a directory; going on without") == 1


@pytest.mark.parametrize("content", [b"", b"no checkpoint at all\n" * 9, b"PK", b"\0" * 5000], ids=len)
def test_damaged_checkpoints_are_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"checkpoint\.pt is damaged \(.+\); remove it to start anew$") as error:
        read_checkpoint(tmp_path)
    assert "\n" not in str(error.value)


def test_checkpoints_with_a_flipped_bit_end_in_no_traceback(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"step": 1, "unreadable": {"a.png": "empty file"}})
    path = tmp_path / "checkpoint.pt"
    whole = path.read_bytes()
    for position in range(0, len(whole), 2):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x80]) + whole[position + 1 :])
        with contextlib.suppress(UserError):
            read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("number", "kind", "said"),
    [(errno.ESTALE, Unavailable, "Stale file handle"), (errno.EACCES, UserError, "Permission denied")],
)
def test_a_checkpoint_that_cannot_be_reached_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[UserError], said: str
) -> None:
    """Or somebody would remove weeks of training."""
    write_checkpoint(tmp_path, {"step": 1})

    def fail(path: Path, **_: Any) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(run_files.torch, "load", fail)
    with pytest.raises(UserError, match=rf"^cannot read {tmp_path}/checkpoint\.pt: {said}$") as error:
        read_checkpoint(tmp_path)
    assert type(error.value) is kind


def test_the_tokenizer_is_on_the_disk_before_its_checkpoint_goes(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(steps=3)
    run_dir = Path(config.run_dir)
    fsync, unlink, events = os.fsync, Path.unlink, []

    def record_fsync(descriptor: int) -> None:
        events.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def record_unlink(path: Path, missing_ok: bool = False) -> None:
        events.append(f"remove {path}")
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "unlink", record_unlink)
    rank_main(config)
    removed = events.index(f"remove {run_dir}/checkpoint.pt")
    assert {str(run_dir / "model.safetensors"), str(run_dir)} <= set(events[:removed])
    assert any(Path(path).name.startswith("config.json") for path in events[:removed])


def test_the_tokenizer_is_written_before_its_pictures_are_drawn(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(steps=2)

    def fail(*_: Any) -> None:
        raise Unavailable("cannot read a picture")

    monkeypatch.setattr(train, "draw_reconstructions", fail)
    with pytest.raises(Unavailable):
        rank_main(config)
    assert load_tokenizer(Path(config.run_dir)).config == config.tokenizer


def test_a_checkpoint_that_a_kill_at_the_end_has_left_goes(make_config: MakeConfig) -> None:
    config = make_config(steps=3)
    with pytest.raises(RankFailed):
        run_ranks(killed_after, 1, config, 2)
    run_dir = Path(config.run_dir)
    save_tokenizer(TokenizerTraining(config, prepare_process_environment(), torch.device("cpu")).model, run_dir)
    assert (run_dir / "checkpoint.pt").exists()
    rank_main(config)
    assert not (run_dir / "checkpoint.pt").exists()


# ------------------------------------------------------------------------------------------------ ranks and numbers


def test_a_rank_with_an_error_says_so_though_others_go_on(make_config: MakeConfig) -> None:
    """NCCL would wait for them where it is closed."""

    def run() -> None:
        def fail(self: TokenizerTraining, *_: Any) -> None:
            if self.process.rank == 0:
                raise UserError("the message")
            time.sleep(60)

        TokenizerTraining._train_step = fail
        train.dist.destroy_process_group = lambda: time.sleep(60)
        rank_main(make_config())

    began = time.monotonic()
    with pytest.raises(RankFailed, match="the message"):
        run_ranks(run, 2)
    assert time.monotonic() - began < 30


def test_a_discriminator_that_is_not_finite_stops_before_any_update(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the next checkpoint would hold it, and no resumed run get beyond."""
    config = make_config(**ADVERSARIAL)
    trainer = TokenizerTraining(config, prepare_process_environment(), torch.device("cpu"))
    batch = StepBatches(trainer.pictures, 0, 4, 0, 1, False)[0]
    modules = trainer.update.model, trainer.update.discriminator
    before = [{name: tensor.clone() for name, tensor in module.state_dict().items()} for module in modules]
    loss = update.discriminator_loss
    monkeypatch.setattr(update, "discriminator_loss", lambda *logits: loss(*logits) * torch.nan)
    with pytest.raises(UserError, match=r"step 2: the discriminator's loss \(nan\) or its gradient \(norm nan\)"):
        trainer._train_step(1, batch)
    for module, weights in zip(modules, before):
        assert all(torch.equal(weights[name], tensor) for name, tensor in module.state_dict().items())


def test_checkpoints_between_reports_know_what_every_rank_has_skipped(
    make_config: MakeConfig, pictures_folder: Path, tmp_path: Path
) -> None:
    folder = damaged_folder(pictures_folder, tmp_path / "damaged", 6)
    config = make_config(data={"pictures": str(folder), "horizontal_flip": False}, global_batch=8, log_every=100)
    with pytest.raises(RankFailed):
        run_ranks(killed_after, 2, config, 3)
    assert len(read_checkpoint(Path(config.run_dir))["unreadable"]) == 6
    run_ranks(rank_main, 2, config)
    listed = (Path(config.run_dir) / "unreadable.jsonl").read_text().splitlines()
    assert [Path(json.loads(line)["file"]).name for line in listed] == [f"00{i}.png" for i in range(6)]


def test_ranks_tell_one_another_of_an_unreadable_picture_once(
    make_config: MakeConfig, pictures_folder: Path, tmp_path: Path
) -> None:
    """A hundredth of ten million pictures, from 64 ranks at every report, would take the memory of a GPU."""
    folder = damaged_folder(pictures_folder, tmp_path / "damaged", 3)
    config = make_config(data={"pictures": str(folder)}, steps=8, log_every=2)
    trainer = TokenizerTraining(config, prepare_process_environment(), torch.device("cpu"))
    gather, told = trainer.ranks.gather_objects, []
    trainer.ranks.gather_objects = lambda value: told.extend(value) or gather(value)
    trainer.run_dir.mkdir()
    trainer.run()
    assert sorted(Path(name).name for name in told) == ["000.png", "001.png", "002.png"]
