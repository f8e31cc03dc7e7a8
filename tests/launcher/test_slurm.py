"""The real sbatch scripts on a real Slurm of two nodes: time limits, lost nodes, and the curve afterwards."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch

from star_dist.config import RunConfig, dump_config
from tests.launcher.slurm_cluster import SlurmCluster, why_not
from tests.train.runs import last_step, metrics, weights

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.xdist_group("slurm")]

ROOT = Path(__file__).parents[2]
MUST_RUN = "STAR_DIST_SLURM_REQUIRED"
JOB_TIMEOUT_S = 300


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    reason = why_not()
    if reason is not None:
        assert not os.environ.get(MUST_RUN), f"{MUST_RUN} is set, but {reason}"
        pytest.skip(reason)
    root = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    with SlurmCluster(root) as cluster:
        yield cluster
    shutil.rmtree(root)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A site file as a user fills it in; each node has a loader cache and a /dev/shm of its own, as real ones have."""
    wrapper = tmp_path / "on_node.sh"
    wrapper.write_text(
        "#!/bin/bash\n"
        "exec unshare --mount bash -c 'mount -t tmpfs none /dev/shm && exec \"$@\"' node "
        f'"$@" data.local={tmp_path}/cache_$SLURMD_NODENAME\n'
    )
    wrapper.chmod(0o755)
    path = tmp_path / "site.sh"
    text = (ROOT / "launcher/slurm/site.sh").read_text()
    path.write_text(
        f"PYTHON={sys.executable}\nRANKS_PER_NODE=1\nIN_CONTAINER=({wrapper})\n"
        f"export GLOO_SOCKET_IFNAME=lo OMP_NUM_THREADS=1\n{text}"
    )
    return path


def submit(cluster: SlurmCluster, site: Path, config: RunConfig, *options: str) -> str:
    """Through launcher/submit.py; returns the job's number."""
    path = Path(config.run_dir).with_suffix(".json")
    path.write_text(dump_config(config))
    result = subprocess.run(
        [sys.executable, "launcher/submit.py", str(path), "--nodes", "2", *options],
        cwd=ROOT,
        env=cluster.environment | {"STAR_SITE": str(site)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return re.fullmatch(r"Submitted batch job (\d+)", result.stdout.strip())[1]


def wait_until(condition: Callable[[], bool], what: str, config: RunConfig) -> None:
    deadline = time.monotonic() + JOB_TIMEOUT_S
    while not condition():
        if time.monotonic() > deadline:
            logs = "\n".join(path.read_text()[-4000:] for path in Path(config.run_dir).glob("slurm-*.out"))
            pytest.fail(f"not {what} within {JOB_TIMEOUT_S} s:\n{logs}")
        time.sleep(0.2)


def start_again_at_once(cluster: SlurmCluster, job: str, config: RunConfig, restarts: int) -> None:
    """Slurm lets a requeued job wait for two minutes; an operator's `scontrol` does not."""

    def begun() -> bool:
        state = cluster.job(job)
        if state.get("JobState") == "PENDING" and int(state.get("Restarts", 0)) == restarts:
            cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now")
        return state.get("JobState") == "RUNNING" and int(state.get("Restarts", 0)) == restarts

    wait_until(begun, f"started {restarts} times again", config)


def ranks_on(node: str) -> list[psutil.Process]:
    """The training processes of one of the nodes."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = " ".join(process.info["cmdline"] or ())
        if "launcher/train.py" in command and f"cache_{node}" in command and "node.py" not in command:
            found.append(process)
    return found


def test_a_job_comes_back_after_a_signal_and_after_a_lost_node(
    cluster: SlurmCluster, site: Path, run_config: Callable[..., RunConfig], dataset_folder: Path, tmp_path: Path
) -> None:
    """SIGUSR1 as before a time limit, then SIGKILL of one node's ranks; the curve and the weights are those of a run
    that nothing happened to."""
    sections = dict(
        train={"steps": 70},
        checkpoint={"every": 8, "keep_last": 3},
        data={"remote": str(dataset_folder), "local": "set by each node"},
    )
    config = run_config(**sections)
    job = submit(cluster, site, config)
    wait_until(lambda: last_step(config) >= 10, "at step 10", config)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    start_again_at_once(cluster, job, config, restarts=1)
    events = [json.loads(line) for line in (Path(config.run_dir) / "facts.jsonl").read_text().splitlines()]
    end = next(event for event in events if event["event"] == "end")
    assert end["reason"].startswith("SIGUSR1") and end["step"] >= 10

    wait_until(lambda: last_step(config) >= end["step"] + 12, "12 steps later", config)
    for rank in ranks_on("n2"):
        rank.send_signal(signal.SIGKILL)
    start_again_at_once(cluster, job, config, restarts=2)
    wait_until(lambda: cluster.job(job)["JobState"] == "COMPLETED", "completed", config)

    undisturbed = run_config(run_dir=str(tmp_path / "undisturbed"), **sections)
    other = submit(cluster, site, undisturbed, "train.omp_threads=1")
    wait_until(lambda: cluster.job(other)["JobState"] == "COMPLETED", "completed", undisturbed)
    assert metrics(config) == metrics(undisturbed)
    found, expected = weights(config), weights(undisturbed)
    assert all(torch.equal(found[name], expected[name]) for name in expected)

    log = next(Path(config.run_dir).glob("slurm-*.out")).read_text()
    assert "preflight" not in log and re.search(r"n1 .* ok\n", log) and re.search(r"n2 .* ok\n", log)
    result = subprocess.run(
        [sys.executable, "launcher/status.py", config.run_dir, "--json"], cwd=ROOT, capture_output=True, text=True
    )
    status = json.loads(result.stdout)
    assert status["step"] == 70 and status["last_checkpoint"] == 70 and status["state"] == "ended: finished"
    reasons = [restart["reason"] for restart in status["restarts"]]
    assert len(reasons) == 2 and reasons[0].startswith("SIGUSR1")
    assert status["restarts"][0]["lost_steps"] == 0 < status["lost_steps"] <= 20
    assert 0 < status["goodput"] < 1


def test_a_users_mistake_is_not_tried_again(
    cluster: SlurmCluster, site: Path, run_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = run_config(tokenizer={"path": "/absent"})
    job = submit(cluster, site, config)
    wait_until(lambda: cluster.job(job)["JobState"] == "FAILED", "failed", config)
    log = next(Path(config.run_dir).glob("slurm-*.out")).read_text()
    assert "no tokenizer at /absent" in log and "preflight failed" in log
    assert cluster.job(job)["Restarts"] == "0"
