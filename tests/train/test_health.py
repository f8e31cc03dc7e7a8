"""A run that looks after itself: asked to end, spiking, hanging, out of space; and what its facts say afterwards."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from star_dist.config import HealthSection, RunConfig
from star_dist.errors import Unavailable, UserError
from star_dist.train.facts import (
    FactsLog,
    append_event,
    exit_code_since,
    failures_without_progress,
    read_events,
    summarize,
)
from star_dist.train.places import LocalPlace
from star_dist.train.signals import RequestListener
from star_dist.train.spikes import SkippedData, SpikeDetector, StepLosses
from star_dist.train.status import run_status
from star_dist.train.watchdog import Watchdog
from tests.ranks import RankFailed, run_ranks, signal_this_rank_and_its_workers
from tests.train.runs import metrics, train, train_on, weights

ROOT = Path(__file__).parents[2]

MakeConfig = Callable[..., RunConfig]


def ended(config: RunConfig, before_step: Callable[[int, int], None], world_size: int = 2) -> list[tuple[int, str]]:
    """Trains on ranks, with something done on each before every step; exit code and message of each rank."""

    def run() -> tuple[int, str]:
        from star_dist.errors import RunEnded
        from star_dist.train.token_losses import TokenLosses

        plain = TokenLosses.__call__
        rank = int(os.environ["RANK"])
        calls = iter(range(10**6))

        def forward(losses: TokenLosses, *arguments: Any) -> Any:
            step, micro_step = divmod(next(calls), config.accumulation_steps(world_size))
            if micro_step == 0:
                before_step(rank, step)
            return plain(losses, *arguments)

        TokenLosses.__call__ = forward
        try:
            train(config)
        except (RunEnded, UserError) as error:
            return error.exit_code, str(error)
        return 0, "finished"

    return run_ranks(run, world_size)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, 75), (signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_to_one_rank_ends_all_after_a_save(
    run_config: MakeConfig, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """And to all processes below it, as launchers send SIGTERM: its loader's workers go on until it has saved."""
    config = run_config(train={"steps": 12}, checkpoint={"every": 10}, data={"num_workers": 1})

    def at_step_2(rank: int, step: int) -> None:
        if (rank, step) == (1, 2):
            signal_this_rank_and_its_workers(number)
            time.sleep(0.5)

    ends = ended(config, at_step_2)
    assert ends == [(code, f"{number.name}: the run goes on from step 4 when started again")] * 2
    assert read_events(Path(config.run_dir))[-1]["reason"].startswith(number.name)
    if number == signal.SIGUSR1:
        undisturbed = run_config(run_dir=str(tmp_path / "undisturbed"), train={"steps": 12}, checkpoint={"every": 10})
        assert train_on(config, 2) == train_on(undisturbed, 2)
        (restart,) = summarize(Path(config.run_dir)).restarts
        assert restart["from_step"] == 4 and restart["lost_steps"] == 0 and restart["reason"].startswith("SIGUSR1")


def test_a_save_that_fails_at_the_time_limit_is_a_failure(run_config: MakeConfig) -> None:
    """Exit code 75 would bring the job back without end."""
    config = run_config(train={"steps": 12}, checkpoint={"every": 2})

    def at_step_4(rank: int, step: int) -> None:
        if step == 3:
            LocalPlace.free_bytes = lambda place: 1000
        if (rank, step) == (0, 4):
            os.kill(os.getpid(), signal.SIGUSR1)

    for code, message in ended(config, at_step_4):
        assert code == 69 and "SIGUSR1: the run goes on from step 2 when started again; step 6 could not be" in message


def test_removing_old_checkpoints_keeps_no_rank_waiting(run_config: MakeConfig) -> None:
    config = run_config(train={"steps": 12}, checkpoint={"every": 4, "keep_last": 1})

    def run() -> list[float]:
        from star_dist.train.checkpoint import CheckpointFolder
        from star_dist.train.supervisor import Supervisor

        prune, end_step, waited = CheckpointFolder.prune, Supervisor.end_step, []

        def slow(folder: CheckpointFolder) -> None:
            time.sleep(1.5)
            prune(folder)

        def timed(supervisor: Supervisor, step: int) -> Any:
            began = time.perf_counter()
            try:
                return end_step(supervisor, step)
            finally:
                waited.append(time.perf_counter() - began)

        CheckpointFolder.prune, Supervisor.end_step = slow, timed
        train(config)
        return waited

    assert max(max(waited) for waited in run_ranks(run, 2)) < 1
    assert [path.name for path in (Path(config.run_dir) / "checkpoints").iterdir()] == ["step_00000012"]


def test_files_in_the_run_folder_ask_to_save_and_to_stop(run_config: MakeConfig) -> None:
    """SAVE saves and goes on, STOP saves and ends with 0; both are gone afterwards."""
    config = run_config(train={"steps": 40}, checkpoint={"every": 100, "keep_last": 9})
    run_dir = Path(config.run_dir)

    def touch(rank: int, step: int) -> None:
        if rank == 0 and step in (2, 12):
            (run_dir / ("SAVE" if step == 2 else "STOP")).touch()
        if step in (3, 13):
            time.sleep(1.1)  # files are looked for once a second

    ends = ended(config, touch)
    assert ends[0][0] == 0 and ends[0][1].startswith("STOP file: the run goes on from step")
    saved = [event["step"] for event in read_events(run_dir) if event["event"] == "checkpoint"]
    assert len(saved) == 2 and 3 <= saved[0] <= 6 and 13 <= saved[1] <= 16
    assert not (run_dir / "SAVE").exists() and not (run_dir / "STOP").exists()


def poison(config: RunConfig, poisoned_step: int, loss_factor: float) -> list[tuple[int, ...]]:
    """Makes the loss of one data step wrong, whenever its samples come; this rank's samples of every step trained."""
    from star_dist.data.batches import TrainBatches
    from star_dist.data.dataset import MicroBatch
    from star_dist.train.token_losses import TokenLosses

    plain_forward, plain_starting_at = TokenLosses.__call__, TrainBatches.starting_at
    bad: set[tuple[int, ...]] = set()
    trained: list[tuple[int, ...]] = []

    def starting_at(batches: TrainBatches, step: int) -> Any:
        for i, batch in enumerate(plain_starting_at(batches, step)):
            if step + i // batches.micro_batches_per_step == poisoned_step:
                bad.add(batch.sample_ids)
            yield batch

    def forward(losses: TokenLosses, batch: MicroBatch, *arguments: Any) -> Any:
        trained.append(batch.sample_ids)
        losses_T, correct_T = plain_forward(losses, batch, *arguments)
        return losses_T * (loss_factor if batch.sample_ids in bad else 1.0), correct_T

    TrainBatches.starting_at, TokenLosses.__call__ = starting_at, forward
    train(config)
    return [sum(ids, ()) for ids in zip(*[iter(trained)] * config.accumulation_steps(int(os.environ["WORLD_SIZE"])))]


def test_a_spike_is_trained_around(run_config: MakeConfig, tmp_path: Path) -> None:
    """Back to the checkpoint before it, without its samples from then on: as if they had never been in the data."""
    sections = dict(
        train={"steps": 16},
        checkpoint={"every": 4, "keep_last": 9},
        health={"on_spike": "rollback", "spike_window": 16, "spike_sigmas": 8.0},
    )
    config = run_config(**sections)
    trained = run_ranks(poison, 2, config, 10, float("nan"))
    run_dir = Path(config.run_dir)
    (spike,) = [json.loads(line) for line in (run_dir / "spikes.jsonl").read_text().splitlines()]
    assert spike["step"] == 10 and spike["action"] == "back to step 8"
    assert [len(ids) for ids in spike["sample_ids"]] == [4, 4]
    for steps, spiked in zip(trained, spike["sample_ids"]):  # 13 steps, and from step 8 on again, without step 10's
        assert steps[13:15] == steps[8:10] and steps[15:17] == steps[11:13]
        assert steps[10] == tuple(spiked) and tuple(spiked) not in steps[11:]
    assert json.loads((run_dir / "skipped_data.json").read_text()) == [10]
    by_step = metrics(config)
    assert sorted(by_step) == list(range(1, 17))
    assert max(line["loss/total"] for line in by_step.values()) < 5
    without = run_config(run_dir=str(tmp_path / "without"), **sections)
    Path(without.run_dir).mkdir()
    (Path(without.run_dir) / "skipped_data.json").write_text("[10]")
    assert train_on(without, 2) == by_step
    expected = weights(without)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(config).items())
    assert summarize(run_dir).lost_steps == 5  # 9 to 13: the verdict on step 11 comes after step 13


def test_spikes_are_only_written_down_by_default(run_config: MakeConfig) -> None:
    config = run_config(train={"steps": 16}, health={"spike_window": 16})
    run_ranks(poison, 1, config, 10, 100.0)
    (spike,) = (Path(config.run_dir) / "spikes.jsonl").read_text().splitlines()
    assert json.loads(spike)["action"] == "recorded"


def test_without_an_earlier_checkpoint_the_run_gets_used_to_a_level(run_config: MakeConfig) -> None:
    """`rollback` with nothing to go back to is `record`, and what lasts is no spike for ever."""
    config = run_config(
        train={"steps": 40}, checkpoint={"every": 1000}, health={"on_spike": "rollback", "spike_window": 8}
    )

    def run() -> None:
        from star_dist.train.token_losses import TokenLosses

        plain = TokenLosses.__call__

        def forward(losses: TokenLosses, batch: Any, text: Any, step: int | None) -> Any:
            losses_T, correct_T = plain(losses, batch, text, step)
            return losses_T + (12.0 if step is not None and step >= 12 else 0.0), correct_T  # no gradient

        TokenLosses.__call__ = forward
        train(config)

    run_ranks(run, 1)
    spikes = [json.loads(line) for line in (Path(config.run_dir) / "spikes.jsonl").read_text().splitlines()]
    assert spikes[0]["step"] == 12 and spikes[-1]["step"] < 25
    assert {spike["action"] for spike in spikes} == {"recorded"}


def test_too_many_spikes_end_the_run(run_config: MakeConfig) -> None:
    config = run_config(train={"steps": 16}, health={"spike_window": 16, "on_spike": "rollback", "max_rollbacks": 1})
    Path(config.run_dir).mkdir()
    (Path(config.run_dir) / "skipped_data.json").write_text("[2]")
    with pytest.raises(RankFailed, match=r"UserError: the loss spiked at step 11 after 1 rollbacks"):
        run_ranks(poison, 1, config, 11, 100.0)
    (spike,) = (Path(config.run_dir) / "spikes.jsonl").read_text().splitlines()
    assert json.loads(spike)["action"] == "end"


@pytest.mark.parametrize(("stage", "precision"), [(1, "bf16"), (0, "fp32")])
def test_a_run_that_learns_nothing_any_more_ends(run_config: MakeConfig, stage: int, precision: str) -> None:
    """One rank's gradients are not finite from a step on, as of a GPU that fails; the loss looks well."""
    config = run_config(
        train={"steps": 40, "zero_stage": stage, "precision": precision, "global_batch": 4},
        checkpoint={"every": 4},
        health={"max_skipped_steps": 6},
    )

    def run() -> None:
        from star_dist.train.token_losses import TokenLosses

        plain = TokenLosses.loss_sum

        def loss_sum(losses: TokenLosses, losses_T: Any, present_B: Any) -> Any:
            broken.append(None)
            wrong = len(broken) > 10 * config.accumulation_steps(2) or len(broken) == 1
            return plain(losses, losses_T, present_B) * (float("nan") if wrong and os.environ["RANK"] == "1" else 1.0)

        broken: list[None] = []
        TokenLosses.loss_sum = loss_sum
        train(config)

    said = r"UserError: the gradients of steps 11 to 16 are not finite \(health\.max_skipped_steps 6\).*resume_step"
    with pytest.raises(RankFailed, match=said):
        run_ranks(run, 2)
    assert max(metrics(config)) == 15 and not (Path(config.run_dir) / "spikes.jsonl").exists()


def test_checkpoints_are_listed_while_old_ones_are_removed(tmp_path: Path) -> None:
    """As when a spike comes while `keep_last` is cleaning up: a file that has gone is not there."""
    (tmp_path / "step_1").mkdir()
    (tmp_path / "step_1" / "kept").write_text("12")
    (tmp_path / "step_1" / "listed_and_gone").symlink_to("/absent")
    place = LocalPlace(tmp_path)
    assert place.files("step_1") == {"kept": 2} and place.files("step_2") == {}


def test_spike_detector() -> None:
    detector = SpikeDetector(HealthSection(spike_window=8, spike_sigmas=3.0))
    assert detector.judge(0, 50.0) is None  # nothing to compare with
    assert detector.judge(1, float("inf")) is not None
    for step in range(2, 10):
        assert detector.judge(step, 5.0 + 0.1 * (step % 2)) is None
    assert detector.judge(10, 5.3).mean == pytest.approx(5.05)
    assert detector.judge(11, 5.15) is None


def test_a_level_that_lasts_becomes_the_usual_one() -> None:
    detector = SpikeDetector(HealthSection(spike_window=8, spike_sigmas=3.0))
    for step in range(8):
        assert detector.judge(step, 5.0 + 0.1 * (step % 2)) is None
    spikes = []
    for step in range(20):
        spike = detector.judge(8 + step, 5.5 + 0.1 * (step % 2))
        spikes.append(spike is not None)
        if spike is not None:
            detector.stays(spike)
    assert spikes[0] and not any(spikes[10:])


def test_skipped_data_shift_what_follows(tmp_path: Path) -> None:
    skipped = SkippedData(tmp_path)
    skipped.add(5, write=True)
    assert [skipped.data_step(step) for step in (4, 5, 6)] == [4, 6, 7]
    skipped.add(5, write=True)  # the step that came in its place
    assert SkippedData(tmp_path).data_step(5) == 7
    assert SkippedData(tmp_path / "another_run_dir", of_checkpoint=[5, 6]).data_step(5) == 7


def test_a_hang_ends_with_everybodys_stacks(run_config: MakeConfig) -> None:
    config = run_config(train={"steps": 12}, health={"hang_timeout_s": 4})

    def run() -> None:
        import star_dist.train.watchdog as watchdog

        watchdog.OTHER_RANKS_WAIT_S = 0.5
        left = os.fork()
        if left:
            _, status = os.waitpid(left, 0)
            return os.waitstatus_to_exitcode(status)

        def hang(rank: int, step: int) -> None:
            if (rank, step) == (1, 3):
                time.sleep(1000)

        try:
            ended_in_this_process(config, hang)
        finally:
            os._exit(1)

    assert run_ranks(run, 2) == [70, 70]
    stacks = [(Path(config.run_dir) / "stacks" / f"rank_{rank:05d}.txt").read_text() for rank in (0, 1)]
    assert "in hang" in stacks[1] and "nothing finished for" in stacks[1]
    assert "_train_from" in stacks[0]
    assert read_events(Path(config.run_dir))[-1]["reason"].startswith("hang: rank 0")


def ended_in_this_process(config: RunConfig, before_step: Callable[[int, int], None]) -> None:
    from star_dist.train.token_losses import TokenLosses

    plain, calls = TokenLosses.__call__, iter(range(10**6))

    def forward(losses: TokenLosses, *arguments: Any) -> Any:
        world_size = int(os.environ["WORLD_SIZE"])
        before_step(int(os.environ["RANK"]), next(calls) // config.accumulation_steps(world_size))
        return plain(losses, *arguments)

    TokenLosses.__call__ = forward
    train(config)


def test_a_hang_ends_where_stacks_cannot_be_written(tmp_path: Path) -> None:
    """With the exit code and the facts of any other."""
    (tmp_path / "stacks").mkdir()
    (tmp_path / "stacks" / "rank_00000.txt").symlink_to("/dev/full")
    script = """
import sys, time
from pathlib import Path
from star_dist.train import watchdog
watchdog.OTHER_RANKS_WAIT_S = 0
with watchdog.Watchdog(0.5, Path(sys.argv[1]), 0, on_hang=lambda _: print("written down", flush=True)).watching():
    time.sleep(20)
"""
    result = subprocess.run([sys.executable, "-c", script, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 70 and result.stdout == "written down\n", result.stderr
    assert "No space left on device; going on without" in result.stderr and "in the first step" in result.stderr


def test_a_checkpoint_of_another_training_is_left_alone(run_config: MakeConfig) -> None:
    """Of two that were given the same place, or where the file system knows no locks."""
    config = run_config(train={"steps": 8}, checkpoint={"every": 3})
    other = Path(config.run_dir) / "checkpoints" / "step_00000006"

    def at_step_4(rank: int, step: int) -> None:
        if (rank, step) == (0, 4):
            other.mkdir()
            (other / "complete.json").write_text("another's")

    assert ended(config, at_step_4) == [(0, "finished")] * 2
    assert (other / "complete.json").read_text() == "another's"
    (failed,) = [event for event in read_events(Path(config.run_dir)) if event["event"] == "save_failed"]
    assert "has a complete checkpoint of step 6: another training writes there, too" in failed["reason"]


def test_a_failed_save_is_reported_and_training_goes_on(run_config: MakeConfig, capfd) -> None:
    """No room for the first, a broken write on rank 1 for the second: dropped; the third is good."""
    config = run_config(train={"steps": 9}, checkpoint={"every": 3})

    def run() -> None:
        from star_dist.train import saving
        from star_dist.train.places import LocalPlace

        plain_write, plain_free, asked = saving.write_shard, LocalPlace.free_bytes, iter(range(10))
        LocalPlace.free_bytes = lambda place: 1000 if next(asked) == 0 else plain_free(place)

        def write(place, folder, rank, tensors):
            if (folder, rank) == ("step_00000006", 1):
                raise OSError(28, "No space left on device")
            plain_write(place, folder, rank, tensors)

        saving.write_shard = write
        train(config)

    run_ranks(run, 2)
    failures = [event for event in read_events(Path(config.run_dir)) if event["event"] == "save_failed"]
    assert [event["step"] for event in failures] == [3, 6]
    assert "a checkpoint takes 0.00 GB" in failures[0]["reason"]
    assert failures[1]["reason"] == "rank 1: [Errno 28] No space left on device"
    assert "the checkpoint of step 6 failed" in capfd.readouterr().err
    names = [path.name for path in (Path(config.run_dir) / "checkpoints").iterdir()]
    assert names == ["step_00000009"]


def test_a_run_folder_that_is_away_for_a_while_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stale(path: Path) -> bool:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))

    listener = RequestListener(tmp_path, 0)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "exists", stale)
        assert not any(listener.noted())
    assert f"cannot write {tmp_path}/STOP: Stale file handle; going on without" in capsys.readouterr().err
    (tmp_path / "STOP").touch()
    listener._next_look_s = 0.0
    assert any(listener.noted())


def test_a_node_without_the_run_folder_has_stacks_of_its_own(tmp_path: Path) -> None:
    """Checkpoints on S3 need no folder that all nodes share."""
    with Watchdog(60, tmp_path / "run", 1, on_hang=print).watching():
        assert (tmp_path / "run" / "stacks" / "rank_00001.txt").is_file()


def test_old_checkpoints_that_cannot_be_removed_are_reported_and_go_with_the_next(run_config: MakeConfig) -> None:
    config = run_config(train={"steps": 6}, checkpoint={"every": 2, "keep_last": 1})

    def run() -> None:
        from star_dist.train.checkpoint import CheckpointFolder

        prune, calls = CheckpointFolder.prune, iter(range(10))

        def fails_once(folder: CheckpointFolder) -> None:
            if next(calls) == 1:
                raise OSError(5, "Input/output error")
            prune(folder)

        CheckpointFolder.prune = fails_once
        train(config)

    run_ranks(run, 1)
    events = read_events(Path(config.run_dir))
    reasons = [event["reason"] for event in events if event["event"] == "prune_failed"]
    assert reasons == ["[Errno 5] Input/output error"] and events[-1]["reason"] == "finished"
    assert [path.name for path in (Path(config.run_dir) / "checkpoints").iterdir()] == ["step_00000006"]


def test_a_restart_has_the_reason_that_the_run_gave_itself(tmp_path: Path) -> None:
    """And not the exit code alone that its job then saw."""
    for event, values in (
        ("start", {"step": 0, "last_step": 0}),
        ("end", {"step": 3, "train_s": 4.0, "reason": "hang: no step ended for 1800 s", "exit_code": None}),
        ("failed", {"exit_code": 70}),
        ("start", {"step": 0, "last_step": 3}),
    ):
        append_event(tmp_path, event, **values)
    (restart,) = summarize(tmp_path).restarts
    assert (restart["reason"], restart["lost_steps"]) == ("hang: no step ended for 1800 s", 3)


def test_facts_of_a_run(tmp_path: Path) -> None:
    """100 s of training, of which 20 were lost, in 200 s."""
    events = [
        ("start", {"step": 0, "last_step": 0}, 1000),
        ("checkpoint", {"step": 50, "train_s": 40.0}, 1045),
        ("failed", {"exit_code": 137}, 1100),
        ("start", {"step": 50, "last_step": 70}, 1140),
        ("end", {"step": 100, "train_s": 40.0, "reason": "finished", "exit_code": 0}, 1200),
    ]
    (tmp_path / "facts.jsonl").write_text(
        "\n".join(json.dumps({"event": event, "time": time_s, **values}) for event, values, time_s in events) + "\n"
    )
    summary = summarize(tmp_path)
    assert (summary.lost_steps, summary.useful_s, summary.wall_s, summary.goodput) == (20, 80.0, 200, 0.4)
    assert summary.restarts == [{"time": 1140, "reason": "exit code 137", "from_step": 50, "lost_steps": 20}]
    append_event(tmp_path, "failed", exit_code=1)
    append_event(tmp_path, "failed", exit_code=1)
    assert failures_without_progress(tmp_path) == 3
    append_event(tmp_path, "checkpoint", step=120, train_s=1.0)
    assert failures_without_progress(tmp_path) == 0


def test_failures_of_another_job_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for job in ("7", "7", "8"):
        append_event(tmp_path, "failed", exit_code=137, job=job)
    for job, count in (("7", 2), ("8", 1), ("9", 0)):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        assert failures_without_progress(tmp_path) == count
    monkeypatch.delenv("SLURM_JOB_ID")
    assert failures_without_progress(tmp_path) == 3


def test_a_full_disk_costs_reports_and_not_the_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "facts.jsonl").symlink_to("/dev/full")
    for step in (1, 2):
        append_event(tmp_path, "checkpoint", step=step)
    warning = capsys.readouterr().err
    assert warning.count("facts.jsonl: No space left on device; going on without") == 1


def test_a_mistake_is_a_fact_and_its_exit_code_counts(tmp_path: Path) -> None:
    """A launcher says 143 where one node's mistake made it end the others."""
    began = time.time()
    with pytest.raises(UserError), FactsLog(tmp_path, rank=1).mistakes():
        raise UserError("no tokenizer at /absent")
    assert exit_code_since(tmp_path, began) == 2
    assert run_status_of(tmp_path) == "not started: no tokenizer at /absent"
    with pytest.raises(Unavailable), FactsLog(tmp_path, rank=0).attempt(0, 1):
        raise Unavailable("the store cannot be reached")
    assert exit_code_since(tmp_path, began) == 69
    assert exit_code_since(tmp_path, time.time() + 1) is None


def run_status_of(run_dir: Path) -> str:
    (run_dir / "submitted_config.json").write_text((ROOT / "configs" / "d16.json").read_text())
    return run_status(run_dir)["state"]


def test_weights_are_restored_by_a_rollback(run_config: MakeConfig) -> None:
    """`ShardedState.load` into an engine that has trained on: bit-identical to what was saved."""
    config = run_config(train={"steps": 3})
    train_on(config, 2)
    expected = weights(config)

    def run() -> tuple[dict | None, list[str], bool]:
        from star_dist.model.layout import PackedLayout
        from star_dist.process import prepare_process_environment
        from star_dist.train.checkpoint import CheckpointFolder
        from star_dist.train.engine import Engine

        engine = Engine(config, prepare_process_environment())
        checkpoint = CheckpointFolder(Path(config.run_dir)).find(None)
        num_tokens = 2 * config.schedule.num_tokens
        inputs = torch.ones(num_tokens, 8), torch.ones(6, 16), torch.ones(2, 16), torch.zeros(num_tokens).long()

        def loss() -> torch.Tensor:
            return engine(*inputs, layout=PackedLayout.uniform(config.schedule, 2, (3, 3)))[0].sum()

        def restored() -> tuple[dict, list]:
            engine.state.load(checkpoint)
            tensors, scalars = engine.state.snapshot()
            with torch.no_grad():
                return tensors, [scalars, loss().item()]

        saved, *others = restored()
        for _ in range(config.accumulation_steps(2)):
            engine.backward(loss())
            engine.step(1e-2)
        moved, _ = engine.state.snapshot()
        again, *others_again = restored()
        kinds = {name.split("/")[0] for name, tensor in moved.items() if not torch.equal(tensor, saved[name])}
        same = others == others_again and all(torch.equal(again[name], tensor) for name, tensor in saved.items())
        full = engine.full_weights()
        return full and {name: tensor.numpy() for name, tensor in full.items()}, sorted(kinds), same

    (found, *of_first), (_, *of_second) = run_ranks(run, 2)
    assert of_first == of_second == [["exp_avg", "exp_avg_sq", "weight"], True]
    assert all(torch.equal(torch.from_numpy(found[name]), expected[name]) for name in expected)


def test_one_spike_hides_no_other_and_a_quarter_of_the_window_is_enough() -> None:
    detector = SpikeDetector(HealthSection(spike_window=8, spike_sigmas=3.0))
    assert [detector.judge(step, loss) for step, loss in enumerate((5.0, 5.1))] == [None, None]
    spike = detector.judge(2, 500.0)
    detector.stays(spike)
    assert detector.judge(3, 7.0) is not None and spike.highest == pytest.approx(5.05 + 3 * 0.05)


def test_ranks_skip_the_same_data_where_each_has_a_run_folder_of_its_own(
    run_config: MakeConfig, tmp_path: Path
) -> None:
    """As with checkpoints on S3 alone: the file is on the node of rank 0."""
    (tmp_path / "rank0").mkdir()
    (tmp_path / "rank0" / "skipped_data.json").write_text("[1]")

    def run() -> list[int]:
        from star_dist.train.supervisor import Supervisor

        plain, steps = Supervisor.end_step, []

        def end_step(supervisor: Supervisor, step: int) -> Any:
            steps.append(supervisor.skipped_data.data_step(step))
            return plain(supervisor, step)

        Supervisor.end_step = end_step
        with pytest.raises(Unavailable, match="the last checkpoint could not be written"):  # nor is it on S3 here
            train(run_config(run_dir=str(tmp_path / f"rank{os.environ['RANK']}"), train={"steps": 3}))
        return steps

    assert run_ranks(run, 2) == [[0, 2, 3]] * 2


def test_data_is_skipped_in_any_order(tmp_path: Path) -> None:
    skipped = SkippedData(tmp_path)
    for step in (9, 5):
        skipped.add(step, write=True)
    for each in (skipped, SkippedData(tmp_path), SkippedData(tmp_path / "other", of_checkpoint=[9, 5])):
        assert [each.data_step(step) for step in (4, 5, 7, 8)] == [4, 6, 8, 10]


def test_a_steps_loss_is_the_sum_of_its_micro_batches_one_step_late() -> None:
    losses = StepLosses(torch.device("cpu"))
    losses.add(torch.tensor(3.0), 2, (1, 2))
    losses.add(torch.tensor(4.0), 1, (3, 4))  # one of them absent
    assert losses.end_step(0) == (0.0, 0)
    losses.add(torch.tensor(5.0), 2, (5, 6))
    assert losses.end_step(1) == (7.0, 3) and losses.end_step(2) == (5.0, 2)
    assert losses.sample_ids(0) == [1, 2, 3, 4] and losses.sample_ids(1) == [5, 6]
