"""Runs a function on several gloo ranks, forked from the warm test process (2 s instead of 20 s of imports)."""

from __future__ import annotations

import contextlib
import gc
import io
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import deepspeed.module_inject.auto_ep_layer
import deepspeed.ops
import deepspeed.runtime.superoffload.superoffload_stage3
import deepspeed.runtime.zero.muon.muon_optimizer
import psutil
import streaming
import torch
import torch._inductor.lowering
import transformers

import star_dist.train.trainer

# Loaded here so that forked ranks find it loaded: DeepSpeed alone imports Inductor for 10 s at its first start.
WARM = (
    streaming,
    torch._inductor.lowering,
    transformers.BertModel,
    deepspeed.runtime.zero.muon.muon_optimizer,
    deepspeed.runtime.superoffload.superoffload_stage3,
    deepspeed.module_inject.auto_ep_layer,
    star_dist.train.trainer,
    deepspeed.ops.__compatible_ops__,
)

TIMEOUT_S = 180


class RankFailed(AssertionError):
    """A rank raised; the message is its traceback."""


class Ranks:
    """Running ranks; `results` waits for them, `kill` ends them with SIGKILL as a crash would."""

    def __init__(self, function: Callable[..., Any], world_size: int, *arguments: Any) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        gc.freeze()  # a rank's collections need not go through a million objects of the test process
        context = multiprocessing.get_context("fork")
        self.processes, self.pipes = [], []
        for rank in range(world_size):
            receiving, sending = context.Pipe(duplex=False)
            process = context.Process(target=_rank, args=(sending, rank, world_size, port, function, arguments))
            process.start()
            os.setpgid(process.pid, process.pid)  # with what it forks, so that `kill` can end them together
            sending.close()
            self.processes.append(process)
            self.pipes.append(receiving)
        gc.unfreeze()  # what is frozen when Python ends outlives it, and Triton lists that

    def results(self) -> list[Any]:
        """What each rank's function returned.

        Raises:
            RankFailed: a rank raised, died or did not end in time.
        """
        results = []
        deadline = time.monotonic() + TIMEOUT_S
        try:
            for rank, pipe in enumerate(self.pipes):
                if not pipe.poll(max(0.0, deadline - time.monotonic())):
                    raise RankFailed(f"rank {rank} did not end within {TIMEOUT_S} s")
                try:
                    succeeded, value = pipe.recv()
                except EOFError:
                    raise RankFailed(f"rank {rank} died") from None
                if not succeeded:
                    raise RankFailed(f"rank {rank}:\n{value}")
                results.append(value)
        finally:
            self.kill()
        return results

    def kill(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.join()


def run_ranks(function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
    """Runs `function(*arguments)` on `world_size` ranks and returns their results in rank order."""
    return Ranks(function, world_size, *arguments).results()


def run_script(path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a script as `python PATH …` would, in a forked process: its exit code and what it printed."""

    def script() -> tuple[int, str, str]:
        sys.argv = [str(path), *arguments]
        sys.path.insert(0, str(path.parent))
        code: Any = None
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as errors:
            try:
                runpy.run_path(str(path), run_name="__main__")
            except SystemExit as ended:
                code = ended.code
        assert code is None or isinstance(code, int), code
        return code or 0, out.getvalue(), errors.getvalue()

    return subprocess.CompletedProcess(path, *run_ranks(script, 1)[0])


def signal_this_rank_and_its_workers(number: signal.Signals) -> None:
    """At once, as launchers do."""
    processes = [os.getpid(), *(child.pid for child in psutil.Process().children())]
    subprocess.run(["kill", f"-{number.value}", *map(str, processes)], check=True)


def renew_thread_pool() -> None:
    """For the first thread of a forked process: the pool of its parent is renewed at the first use, and the threads of
    autograd, which begin together, would do it at the same moment ("Invalid thread pool!", PyTorch 2.15)."""
    torch.set_num_threads(1)


def _rank(
    sending: Connection, rank: int, world_size: int, port: int, function: Callable[..., Any], arguments: tuple
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    renew_thread_pool()
    try:
        sending.send((True, function(*arguments)))
    except BaseException:
        sending.send((False, traceback.format_exc()))
    sending.close()
    signal.pause()  # the parent ends the whole group; its own clean-up handlers are not this process's to run
