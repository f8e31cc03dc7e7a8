"""Which process this is among all that train together, from the environment of any launcher. Imports no torch."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from star_dist.errors import UserError


@dataclass(frozen=True)
class ProcessInfo:
    """rank of world_size processes; local_rank of local_world_size on this host."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int


def prepare_process_environment(omp_threads: int | None = None) -> ProcessInfo:
    """Completes what torch.distributed, DeepSpeed and streaming read from the environment; call before importing them.

    `deepspeed` sets LOCAL_SIZE but no LOCAL_WORLD_SIZE (streaming then takes every rank for the first of its host);
    torchrun sets all; without a launcher this is one process of one.

    Raises:
        UserError: several tasks of a bare `srun`, which would be as many trainings that overwrite each other.
    """
    if omp_threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(omp_threads)
    if "RANK" not in os.environ:
        tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
        if tasks > 1:
            raise UserError(
                f"srun started {tasks} tasks without a launcher; start one task per node with `deepspeed` or "
                f"`torchrun` in it"
            )
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
        os.environ["MASTER_PORT"] = str(_free_port())
    if "LOCAL_WORLD_SIZE" not in os.environ:
        os.environ["LOCAL_WORLD_SIZE"] = os.environ.get("LOCAL_SIZE", os.environ["WORLD_SIZE"])
    return ProcessInfo(*(int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
