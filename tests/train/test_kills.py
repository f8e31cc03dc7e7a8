"""One training that is killed twenty times: ranks, launcher, data workers, at random moments."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from star_dist.config import RunConfig
from star_dist.train.facts import read_events, summarize
from tests.ranks import renew_thread_pool
from tests.train.runs import last_step, metrics, train, train_on, wait_for_step, weights

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

NUM_KILLS = 20
WORLD_SIZE = 2
DEADLINE_S = 120
UNNOTICED_S = 3
BATCH_TIMEOUT_S = 20


def is_loader_worker(process: psutil.Process) -> bool:
    """Whether a rank's child is that, and not Python's own watcher of shared memory, nor dead already."""
    try:
        return "resource_tracker" not in " ".join(process.cmdline())
    except psutil.Error:
        return False


def still_alive(processes: list[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    """Those that have not ended in time; one that has and that nobody has waited for yet does not live.

    One whose first thread alone has ended is called a zombie, too, but holds its locks until the others have.
    """

    def lives(process: psutil.Process) -> bool:
        try:
            zombie = process.status() == psutil.STATUS_ZOMBIE
            return process.is_running() and (not zombie or process.num_threads() > 1)
        except psutil.NoSuchProcess:
            return False

    deadline = time.monotonic() + timeout_s
    while (alive := [process for process in processes if lives(process)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    return alive


class Launcher:
    """A process that starts ranks and waits for them, as launchers do; forked, so that a start takes two seconds."""

    def __init__(self, config: RunConfig) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        gc.freeze()  # as in tests/ranks.py
        pid = os.fork()
        if pid == 0:
            for rank in range(WORLD_SIZE):
                if os.fork() == 0:
                    self._rank(config, rank, port)  # does not return
            for _ in range(WORLD_SIZE):
                os.wait()
            os._exit(0)
        gc.unfreeze()
        self.process = psutil.Process(pid)
        self.ranks: list[psutil.Process] = []
        self.workers: list[psutil.Process] = []
        deadline = time.monotonic() + DEADLINE_S
        while len(self.ranks) < WORLD_SIZE and time.monotonic() < deadline:
            self.ranks = self.process.children()

    @staticmethod
    def _rank(config: RunConfig, rank: int, port: int) -> None:
        sizes = {"WORLD_SIZE": WORLD_SIZE, "LOCAL_WORLD_SIZE": WORLD_SIZE, "RANK": rank, "LOCAL_RANK": rank}
        os.environ.update({name: str(value) for name, value in sizes.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="test")
        sys.stderr = open(f"{config.run_dir}_rank_{rank}.log", "a")  # noqa: SIM115
        renew_thread_pool()
        try:
            train(config)
        except BaseException:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(0)

    def kill_one(self, kind: str, choice: random.Random) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            self.workers = [child for rank in self.ranks for child in rank.children() if is_loader_worker(child)]
        if kind == "launcher":
            return self.process.kill()
        victims = self.ranks
        if kind == "data worker":
            victims = self.workers
        with contextlib.suppress(psutil.NoSuchProcess):  # a worker that has just ended with its epoch
            choice.choice(victims or self.ranks).kill()
        alive = still_alive(self.ranks, UNNOTICED_S)
        if alive:  # a worker that had nothing left to deliver
            choice.choice(alive).kill()

    def wait(self) -> None:
        """Until no rank is left: nothing but their own reaction ends them."""
        alive = still_alive([*self.ranks, *self.workers], DEADLINE_S)
        for process in [*alive, self.process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.process.pid, 0)
        assert not alive, "ranks or loader workers went on without the process that was killed"


def test_twenty_kills_change_nothing(run_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    # The time limit ends a rank whose worker waits for one that was killed at the start of an epoch.
    sections = dict(
        train={"steps": 120},  # more than a fast machine trains until the last kill
        checkpoint={"every": 2},
        data={"num_workers": 1, "batch_timeout_s": BATCH_TIMEOUT_S},
        logging={"every": 1, "peak_tflops": 1},  # no start measures the machine
    )
    config = run_config(**sections)
    choice = random.Random(0)
    kinds = ["rank", "launcher", "data worker"]
    for kill in range(NUM_KILLS):
        before = last_step(config)
        launcher = Launcher(config)
        wait_for_step(config, before + choice.randint(1, 4), launcher.ranks[0].is_running)
        time.sleep(choice.uniform(0, 0.1))
        launcher.kill_one(kinds[kill % len(kinds)], choice)
        launcher.wait()
    killed_until = last_step(config)
    found = train_on(config, WORLD_SIZE)
    undisturbed = run_config(run_dir=str(tmp_path / "undisturbed"), **sections)
    assert found == train_on(undisturbed, WORLD_SIZE)
    expected = weights(undisturbed)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(config).items())
    summary = summarize(Path(config.run_dir))
    starts = [event["step"] for event in read_events(Path(config.run_dir)) if event["event"] == "start"]
    assert len(summary.restarts) == NUM_KILLS and starts == sorted(starts), (
        "each goes on where the one before had saved"
    )
    assert killed_until > starts[1] > 0
    print(f"from {starts}; {summary.lost_steps} steps lost, goodput {summary.goodput:.2f}")


def test_a_launcher_that_is_killed_before_the_first_step_takes_its_ranks_along() -> None:
    """They would wait for one another for half an hour, and the next start for them."""
    start = (
        "from pathlib import Path; import time; from star_dist.train.signals import RequestListener\n"
        "with RequestListener(Path(), 0).listening(): print('starting', flush=True); time.sleep(60)"
    )
    launcher = subprocess.Popen(
        ["bash", "-c", '"$@" & wait', "bash", sys.executable, "-c", start],
        env=os.environ | {"TORCHELASTIC_RUN_ID": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert launcher.stdout.readline() == "starting\n"
    (rank,) = psutil.Process(launcher.pid).children()
    launcher.kill()
    assert "the launcher has died before the first step" in launcher.stderr.read()  # which is closed as the rank ends
    deadline = time.monotonic() + 10
    with contextlib.suppress(psutil.NoSuchProcess):
        while rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline, "the rank has closed its files and goes on"
            time.sleep(0.01)


def test_a_killed_launcher_lets_its_ranks_save(run_config: Callable[..., RunConfig]) -> None:
    config = run_config(train={"steps": 1000}, checkpoint={"every": 1000})
    launcher = Launcher(config)
    wait_for_step(config, 3)
    launcher.process.send_signal(signal.SIGKILL)
    launcher.wait()
    end = read_events(Path(config.run_dir))[-1]
    assert end["reason"].startswith("death of the launcher") and end["exit_code"] == 75 and end["step"] >= 3
    assert max(metrics(config)) == end["step"]
