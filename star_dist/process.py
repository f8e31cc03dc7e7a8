"""Which process this is among all that train together, from the environment of any launcher. Imports no torch."""

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass

from star_dist.errors import Unavailable, UserError


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
    torchrun sets all; a bare `srun` with one task per rank sets variables of its own; without any of them this is one
    process of one.

    Raises:
        UserError: tasks of a bare `srun` that are not equally many on every node, or nodes that cannot be named.
    """
    if omp_threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(omp_threads)
    if "RANK" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        os.environ.update(_ranks_of_srun())
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
        os.environ["MASTER_PORT"] = str(_free_port())
    if "LOCAL_WORLD_SIZE" not in os.environ:
        os.environ["LOCAL_WORLD_SIZE"] = os.environ.get("LOCAL_SIZE", os.environ["WORLD_SIZE"])
    return ProcessInfo(*(int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")))


def allocated_gpus() -> str | None:
    """The variable by which this process was given GPUs, with its value; None where it was given none.

    `deepspeed` sets CUDA_VISIBLE_DEVICES on machines without GPUs, too.
    """
    visible = None if "LOCAL_SIZE" in os.environ else os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return None if visible in ("", "-1", "NoDevFiles") else f"CUDA_VISIBLE_DEVICES={visible}"
    count = os.environ.get("SLURM_GPUS_ON_NODE", "0")
    return None if count in ("", "0") else f"SLURM_GPUS_ON_NODE={count}"


def check_gpus_are_there(available: bool) -> None:
    """Keeps a command from running on CPUs where it was given GPUs; `available`: whether torch sees one.

    Raises:
        Unavailable: it was given GPUs and sees none.
    """
    given = allocated_gpus()
    if given is not None and not available:
        node = os.environ.get("SLURMD_NODENAME", socket.gethostname())
        raise Unavailable(
            f"node {node} gave this process GPUs ({given}), but torch can use none; check nvidia-smi there and that "
            f"torch is a CUDA build, or set CUDA_VISIBLE_DEVICES to nothing to use CPUs"
        )


def _ranks_of_srun() -> dict[str, str]:
    """torch.distributed's variables from Slurm's, which gives every task its own."""
    environment = os.environ
    tasks, nodes = int(environment["SLURM_STEP_NUM_TASKS"]), int(environment.get("SLURM_STEP_NUM_NODES", "1"))
    per_node = environment.get("SLURM_STEP_TASKS_PER_NODE", str(tasks))  # such as 8(x4), or 8(x3),4
    local = re.fullmatch(r"(\d+)(\(x\d+\))?", per_node)
    if local is None or int(local[1]) * nodes != tasks:
        raise UserError(
            f"srun started {tasks} tasks on {nodes} nodes, {per_node} of them on each; give --ntasks-per-node, so "
            f"that all have equally many"
        )
    return {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_WORLD_SIZE": local[1],
        "MASTER_ADDR": environment.get("MASTER_ADDR") or _first_host(environment["SLURM_STEP_NODELIST"]),
        # Every task must find the same one without asking, below those that Linux gives to outgoing connections.
        "MASTER_PORT": environment.get("MASTER_PORT") or str(20000 + int(environment["SLURM_JOB_ID"]) % 12000),
    }


def _first_host(nodes: str) -> str:
    """The first of a list as Slurm writes it, such as gpu[003-005,9]-ib,login.

    Raises:
        UserError: it has no such form.
    """
    match = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\]([^,\[]*))?(?:,|$)", nodes)
    if match is None:
        raise UserError(f"cannot tell the first host of SLURM_STEP_NODELIST {nodes!r}; set MASTER_ADDR")
    return "".join(part or "" for part in match.groups())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
