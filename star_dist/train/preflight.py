"""Checks of the nodes before a training: what each has, whether they are alike, and whether they reach one another."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch.distributed import PrefixStore

from star_dist.cli import UNAVAILABLE_EXIT
from star_dist.config import CheckpointSection, DataSection, RunConfig
from star_dist.device import rank_device
from star_dist.environment import describe_environment
from star_dist.errors import Unavailable, UserError, first_line
from star_dist.files import free_bytes
from star_dist.object_store import is_s3
from star_dist.process import ProcessInfo
from star_dist.text import TextEncoder
from star_dist.train.checkpoint import FREE_SPACE_MARGIN
from star_dist.train.metrics import measured_matmul_flops
from star_dist.train.places import S3Place
from star_dist.train.planning import checkpoint_bytes

ARRIVAL_TIMEOUT_S = 300
SLOW_FRACTION = 0.7  # of the median rank's matrix product
ALL_REDUCE_BYTES = {"cuda": 2**28, "cpu": 2**22}
MATMUL_SIZE = {"cuda": 8192, "cpu": 512}
ROUNDS = 3


@dataclass
class RankCheck:
    """What one rank found; `facts` must be the same on all nodes; problems, unreachable, warnings: sentences.

    unreachable: problems that may be over at another attempt, such as a store that does not answer.
    free_bytes: where the loader's caches are, or else temporary files.
    """

    rank: int
    node: str
    facts: dict[str, Any]
    matmul_tflops: float
    free_bytes: int
    problems: list[str] = field(default_factory=list)
    unreachable: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def add(self, error: OSError | UserError) -> None:
        """Takes a problem down by its kind."""
        (self.unreachable if isinstance(error, Unavailable) else self.problems).append(str(error))


@dataclass(frozen=True)
class Preflight:
    """The result, the same on every rank. all_reduce_gb_per_s: bus bandwidth as nccl-tests count it."""

    ranks: list[RankCheck]
    all_reduce_gb_per_s: float | None
    problems: dict[str, list[str]]  # by node

    def table(self) -> str:
        """One line per node."""
        lines = [f"{'node':<24} {'ranks':>5} {'device':<28} {'matmul TFLOP/s':>15} {'free disk GB':>13}  result"]
        for node in dict.fromkeys(check.node for check in self.ranks):
            checks = [check for check in self.ranks if check.node == node]
            slowest = min(check.matmul_tflops for check in checks)
            warnings = [f"warning: {warning}" for check in checks for warning in check.warnings]
            result = "; ".join([*(self.problems.get(node) or ["ok"]), *warnings])
            device = str(checks[0].facts["device"])
            free_gb = min(check.free_bytes for check in checks) / 1e9
            lines.append(f"{node:<24} {len(checks):>5} {device:<28} {slowest:>15.2f} {free_gb:>13.1f}  {result}")
        if self.all_reduce_gb_per_s is not None:
            lines.append(f"all-reduce over {len(self.ranks)} ranks: {self.all_reduce_gb_per_s:.2f} GB/s")
        return "\n".join(lines)

    @property
    def exit_code(self) -> int:
        """Of the command: 0, 1 for bad nodes, or 69 where all that is wrong is out of reach."""
        unreachable = sum(len(check.unreachable) for check in self.ranks)
        bad = sum(len(problems) for problems in self.problems.values()) - unreachable
        return 1 if bad else UNAVAILABLE_EXIT if unreachable else 0

    def as_json(self) -> dict[str, Any]:
        return {
            "ranks": [asdict(check) for check in self.ranks],
            "all_reduce_gb_per_s": self.all_reduce_gb_per_s,
            "problems": self.problems,
        }


def preflight(config: RunConfig, process: ProcessInfo) -> Preflight:
    """Runs all checks on all ranks of the job.

    Raises:
        Unavailable: ranks that do not arrive, with the nodes that did, or a node whose GPUs cannot be used.
        UserError: see `rank_device`.
    """
    device = rank_device(process)
    node = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    _meet(node, device)
    check = _check_rank(config, process, node, device)
    if config.checkpoint.remote is None:
        _check_shared(Path(config.run_dir), process, check)
    checks: list[RankCheck] = [None] * process.world_size
    torch.distributed.all_gather_object(checks, check)
    bandwidth = _all_reduce_bandwidth(process.world_size, device) if process.world_size > 1 else None
    torch.distributed.destroy_process_group()
    return Preflight(checks, bandwidth, _problems(checks))


def _meet(node: str, device: torch.device) -> None:
    """Joins all ranks, after making sure that all are there, so that a missing one has a name."""
    timeout = timedelta(seconds=ARRIVAL_TIMEOUT_S)
    try:
        store, rank, world_size = next(torch.distributed.rendezvous("env://", timeout=timeout))
    except torch.distributed.DistError as error:
        raise Unavailable(
            f"node {node} does not reach {os.environ.get('MASTER_ADDR')}, where rank 0 should be, within "
            f"{ARRIVAL_TIMEOUT_S} s: {first_line(error)}"
        ) from None
    arrivals = PrefixStore("preflight", store)
    arrivals.set(f"rank {rank}", node)
    deadline_s = time.monotonic() + ARRIVAL_TIMEOUT_S
    missing = list(range(world_size))
    while missing and time.monotonic() < deadline_s:
        missing = [other for other in missing if not arrivals.check([f"rank {other}"])]
        time.sleep(0.05 if missing else 0)
    if missing:
        present = {arrivals.get(f"rank {other}").decode() for other in range(world_size) if other not in missing}
        raise Unavailable(
            f"ranks {missing} did not arrive within {ARRIVAL_TIMEOUT_S} s; those of nodes {sorted(present)} did, so a "
            f"node of the job beside these is bad or cannot reach {os.environ.get('MASTER_ADDR')}"
        )
    backend = "cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, store=PrefixStore("group", store), rank=rank, world_size=world_size)


def _check_rank(config: RunConfig, process: ProcessInfo, node: str, device: torch.device) -> RankCheck:
    environment = describe_environment()
    facts = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else environment["cpu"],
        "devices": torch.cuda.device_count(),
        "driver": _driver_version() if device.type == "cuda" else None,
        "nccl": torch.cuda.nccl.version() if device.type == "cuda" else None,
        "python": environment["python"],
        "commit": environment["git_commit"],
        **environment["packages"],
    }
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    matmul = max(measured_matmul_flops(device, MATMUL_SIZE[device.type], dtype=dtype) for _ in range(ROUNDS)) / 1e12
    caches = [Path(source.local) for source in config.data.all_sources if source.remote is not None]
    free = min(free_bytes(folder) for folder in caches or [Path(tempfile.gettempdir())])
    check = RankCheck(process.rank, node, facts, matmul, free)
    if process.local_rank == 0:  # the rest is the node's, not the rank's
        _check_hardware(config, process, device, check)
        _check_node(config, process, check)
        check.problems += _check_room(config, caches, writes_checkpoints=process.rank == 0)
    return check


def _check_hardware(config: RunConfig, process: ProcessInfo, device: torch.device, check: RankCheck) -> None:
    """Devices and CPUs of a node against its ranks: too few, or more than are used."""
    ranks, devices, cpus = process.local_world_size, torch.cuda.device_count(), len(os.sched_getaffinity(0))
    if device.type == "cuda" and devices < ranks:
        check.problems.append(f"{devices} GPUs for {ranks} ranks")
    elif devices > ranks:
        check.warnings.append(f"{devices - ranks} of {devices} GPUs stand idle ({ranks} ranks, RANKS_PER_NODE)")
    if device.type == "cpu" and config.train.precision == "bf16":
        check.warnings.append("no GPU: trains in bf16 on CPUs; ask for GPUs (SBATCH_GPUS_PER_NODE in site.sh)")
    wanted = ranks * (1 + config.data.num_workers)
    if cpus < wanted:
        said = (
            f"{cpus} CPUs for {ranks} ranks with {config.data.num_workers} loader workers each (data.num_workers); ask "
            f"for whole nodes or more CPUs"
        )
        (check.problems if device.type == "cuda" and cpus < ranks else check.warnings).append(said)


def _check_room(config: RunConfig, caches: list[Path], *, writes_checkpoints: bool) -> list[str]:
    """Disks that cannot hold what the run may put there; what a warm cache holds already counts as room."""
    problems = []
    limit = config.data.cache_limit
    if limit is not None:
        from streaming.base.util import bytes_to_int

        for folder in caches:
            room = free_bytes(folder) + sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            if room < bytes_to_int(limit):
                problems.append(
                    f"{room / 1e9:.1f} GB free or in use by the cache {folder}, data.cache_limit is {limit}"
                )
    if writes_checkpoints and config.checkpoint.remote is None:
        needed = checkpoint_bytes(config) * FREE_SPACE_MARGIN
        free = free_bytes(Path(config.run_dir) / "checkpoints")
        if free < needed:
            problems.append(f"a checkpoint takes {needed / 1e9:.2f} GB and run_dir has {free / 1e9:.2f} GB free")
    return problems


def _check_node(config: RunConfig, process: ProcessInfo, check: RankCheck) -> None:
    """The run's folder, stores, tokenizer and data, as this node sees them."""
    run_dir = Path(config.run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=run_dir):
            pass
    except OSError as error:
        check.problems.append(f"run_dir {run_dir} cannot be written: {error.strerror}")
    for source in config.data.all_sources:
        if source.remote is not None and is_s3(source.remote):
            _check_s3(source.remote, config.data, check)
    if config.checkpoint.remote is not None:
        _check_s3(config.checkpoint.remote, config.checkpoint, check, writes=True)
    try:
        from star_dist.data.fetch import fetch_matching_metadata
        from star_dist.tokenizer.io import load_tokenizer, tokenizer_hash

        config.accumulation_steps(process.world_size)
        tokenizer = load_tokenizer(Path(config.tokenizer.path))
        fetch_matching_metadata(config, tokenizer_hash(tokenizer))
    except UserError as error:
        check.add(error)
    if config.needs_text_encoder:
        try:
            TextEncoder(config.text, torch.device("cpu"))
        except UserError as error:
            check.add(error)


def _check_shared(run_dir: Path, process: ProcessInfo, check: RankCheck) -> None:
    """Whether this node sees what rank 0 makes in the run's folder, which is to hold checkpoints."""
    with contextlib.ExitStack() as stack:
        names = [None]
        if process.rank == 0:
            with contextlib.suppress(OSError):  # that it cannot be written, `_check_node` has found
                names[0] = Path(stack.enter_context(tempfile.NamedTemporaryFile(dir=run_dir)).name).name
        torch.distributed.broadcast_object_list(names)
        if process.local_rank == 0 and names[0] is not None and not (run_dir / names[0]).exists():
            check.problems.append(
                f"run_dir {run_dir} is not that of rank 0; set it to a folder that all nodes share, or "
                f"checkpoint.remote to S3"
            )
        torch.distributed.barrier()  # before it is removed


def _check_s3(url: str, section: DataSection | CheckpointSection, check: RankCheck, *, writes: bool = False) -> None:
    """Lists a prefix, reads the first bytes of what is there, and writes an object where checkpoints go."""
    try:
        place = S3Place(url, section.s3_endpoint_url, section.s3_region)
        place.check_access()
        if writes:
            place.check_writing()
    except (OSError, UserError) as error:
        check.add(error)


def _all_reduce_bandwidth(world_size: int, device: torch.device) -> float:
    """GB/s that each rank sends and receives in a ring: bytes x 2 (n - 1) / n / seconds, the best of ROUNDS."""
    values = torch.ones(ALL_REDUCE_BYTES[device.type] // 4, device=device)
    best_s = float("inf")
    for _ in range(ROUNDS):
        torch.distributed.barrier()
        start_s = time.perf_counter()
        torch.distributed.all_reduce(values)
        values[0].item()
        best_s = min(best_s, time.perf_counter() - start_s)
    worst_s = torch.tensor(best_s, device=device)
    torch.distributed.all_reduce(worst_s, torch.distributed.ReduceOp.MAX)
    return values.numel() * 4 * 2 * (world_size - 1) / world_size / worst_s.item() / 1e9


def _problems(checks: list[RankCheck]) -> dict[str, list[str]]:
    """What each node has wrong: its own findings, facts that most other ranks do not share, a slow device."""
    problems: dict[str, list[str]] = {}
    for check in checks:
        for problem in check.problems + check.unreachable:
            problems.setdefault(check.node, []).append(f"rank {check.rank}: {problem}")
    for name in checks[0].facts:
        usual, _ = Counter(repr(check.facts[name]) for check in checks).most_common(1)[0]
        for node, value in dict.fromkeys((check.node, repr(check.facts[name])) for check in checks):
            if value != usual:
                problems.setdefault(node, []).append(f"{name} is {value}, elsewhere {usual}")
    if checks[0].facts["devices"]:
        median = sorted(check.matmul_tflops for check in checks)[len(checks) // 2]
        for check in checks:
            if check.matmul_tflops < SLOW_FRACTION * median:
                slow = f"matrix product at {check.matmul_tflops:.1f} TFLOP/s, the median is {median:.1f}"
                problems.setdefault(check.node, []).append(f"rank {check.rank}: {slow}")
    return problems


def _driver_version() -> str | None:
    try:
        return Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:
        return None
