"""The real sbatch scripts on a real Slurm of two nodes: time limits, lost nodes, and the curve afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
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
from star_dist.files import read_json_lines
from star_dist.train.facts import append_event, read_events
from tests.launcher.slurm_cluster import SlurmCluster, stand_in, why_not
from tests.train.runs import last_step, metrics, train_on, weights

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


def site_file(folder: Path, *lines: str) -> Path:
    """A site file as a user fills it in."""
    path = folder / "site.sh"
    text = (ROOT / "launcher/slurm/site.sh").read_text()
    path.write_text("\n".join([f"PYTHON={sys.executable}", "export OMP_NUM_THREADS=1", *lines, text]))
    return path


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """For trainings; each node has a loader cache and a /dev/shm of its own, as real ones have."""
    wrapper = stand_in(
        tmp_path,
        "on_node.sh",
        "exec unshare --mount bash -c 'mount -t tmpfs none /dev/shm && exec \"$@\"' node "
        f'"$@" data.local={tmp_path}/cache_$SLURMD_NODENAME',
    )
    return site_file(tmp_path, "RANKS_PER_NODE=1", f"IN_CONTAINER=({wrapper})", "export GLOO_SOCKET_IFNAME=lo")


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


def wait_until(
    condition: Callable[[], bool], what: str, config: RunConfig, explain: Callable[[], str] = lambda: ""
) -> None:
    deadline = time.monotonic() + JOB_TIMEOUT_S
    while not condition():
        if time.monotonic() > deadline:
            logs = "\n".join(path.read_text()[-4000:] for path in Path(config.run_dir).glob("slurm-*.out"))
            pytest.fail(f"not {what} within {JOB_TIMEOUT_S} s:\n{logs}\n{explain()}")
        time.sleep(0.2)


def start_again_at_once(cluster: SlurmCluster, job: str, config: RunConfig, restarts: int) -> None:
    """Slurm lets a requeued job wait for two minutes; an operator's `scontrol` does not."""

    def begun() -> bool:
        state = cluster.job(job)
        if int(state.get("Restarts", 0)) < restarts:
            return False
        if state.get("JobState") == "PENDING":
            if state.get("Priority") == "0":  # Slurm holds a job that it could not start
                cluster.run("scontrol", "release", job)
            cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now")
        return state.get("JobState") == "RUNNING"

    wait_until(begun, f"started {restarts} times again", config, lambda: cluster.describe(job))


def ends(config: RunConfig) -> list[dict]:
    """How the attempts of a run ended that could say so."""
    return [event for event in read_events(Path(config.run_dir)) if event["event"] == "end"]


def ranks_on(node: str) -> list[psutil.Process]:
    """The training processes of one of the nodes."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = " ".join(process.info["cmdline"] or ())
        if "launcher/train.py" in command and f"cache_{node}" in command and "node.py" not in command:
            found.append(process)
    return found


@pytest.mark.timeout(1200)  # four starts of two ranks each, on a machine that others use, too
def test_a_job_comes_back_after_a_signal_a_lost_node_and_a_cancelled_step(
    cluster: SlurmCluster, site: Path, run_config: Callable[..., RunConfig], dataset_folder: Path, tmp_path: Path
) -> None:
    """SIGUSR1 as before a time limit, SIGKILL of one node's ranks, `scancel` of the step; the curve and the weights
    are those of a run that nothing happened to."""
    sections = dict(
        train={"steps": 80},
        checkpoint={"every": 8, "keep_last": 3},
        data={"remote": str(dataset_folder), "local": "set by each node"},
    )
    config = run_config(**sections)
    job = submit(cluster, site, config)
    wait_until(lambda: last_step(config) >= 10, "at step 10", config)
    with site.open("a") as lines:
        lines.write("\nPREFLIGHT=no\n")  # the first start has shown it, and the next test when it comes again
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    start_again_at_once(cluster, job, config, restarts=1)
    end = ends(config)[-1]
    assert end["reason"].startswith("SIGUSR1") and end["step"] >= 10

    wait_until(lambda: last_step(config) >= end["step"] + 12, "12 steps later", config)
    for rank in ranks_on("n2"):
        rank.send_signal(signal.SIGKILL)
    start_again_at_once(cluster, job, config, restarts=2)

    wait_until(lambda: last_step(config) >= end["step"] + 24, "24 steps later", config)
    cluster.run("scancel", f"{job}.0")
    start_again_at_once(cluster, job, config, restarts=3)
    wait_until(lambda: cluster.job(job)["JobState"] == "COMPLETED", "completed", config)

    undisturbed = run_config(**sections | {"run_dir": str(tmp_path / "undisturbed"), "data": {}})
    assert metrics(config) == train_on(undisturbed, 2)
    found, expected = weights(config), weights(undisturbed)
    assert all(torch.equal(found[name], expected[name]) for name in expected)

    log = next(Path(config.run_dir).glob("slurm-*.out")).read_text()
    assert "preflight" not in log and re.search(r"n1 .* ok\n", log) and re.search(r"n2 .* ok\n", log)
    result = subprocess.run(
        [sys.executable, "launcher/status.py", config.run_dir, "--json"], cwd=ROOT, capture_output=True, text=True
    )
    status = json.loads(result.stdout)
    assert status["step"] == 80 and status["last_checkpoint"] == 80 and status["state"] == "ended: finished"
    reasons = [restart["reason"] for restart in status["restarts"]]
    assert len(reasons) == 3 and reasons[0].startswith("SIGUSR1")
    assert status["restarts"][0]["lost_steps"] == 0 < status["lost_steps"] <= 20
    assert 0 < status["goodput"] < 1


def test_a_cancelled_job_stays_cancelled_and_a_signalled_one_comes_back(
    cluster: SlurmCluster, run_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """Ranks that save and exit with 75 whenever they are asked to, for which a few lines stand in: what counts here is
    the job around them. Two signals while the nodes are checked, then `scancel` while it trains."""
    config = run_config()
    ranks = stand_in(
        tmp_path,
        "python.sh",
        f'[[ "$*" == *node.py* ]] || exec {sys.executable} "$@"',
        f'echo "$*" >> {tmp_path}/started',
        f"[[ $* == *preflight.py* && -e {tmp_path}/passes_at_once ]] && exit 0",
        '[[ "$*" == *preflight.py* ]] && code=0 || code=75',
        "trap 'exit $code' USR1 TERM",
        "for _ in {1..600}; do sleep 0.1; done",
    )
    job = submit(cluster, site_file(tmp_path, f"export PYTHON={ranks}", "RANKS_PER_NODE=1"), config)

    def started() -> list[str]:
        """The last word of each start on one of the two nodes."""
        path = tmp_path / "started"
        lines = path.read_text().splitlines() if path.is_file() else []
        return [re.search(r"(preflight|train)\.py", line)[1] for line in lines][::2]

    wait_until(lambda: started() == ["preflight"], "checking its nodes", config)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    start_again_at_once(cluster, job, config, restarts=1)
    wait_until(lambda: started() == ["preflight"] * 2, "checking its nodes again", config)  # nothing has run on them
    append_event(Path(config.run_dir), "end", step=3, reason="SIGUSR1", exit_code=75)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    start_again_at_once(cluster, job, config, restarts=2)
    wait_until(lambda: started() == ["preflight"] * 2 + ["train"], "training without another check", config)
    (tmp_path / "passes_at_once").touch()
    for process in psutil.process_iter(["cmdline"]):
        if (process.info["cmdline"] or [])[1:2] == [str(ranks)]:  # bash, which runs it
            process.kill()
    start_again_at_once(cluster, job, config, restarts=3)
    expected = ["preflight"] * 2 + ["train", "preflight", "train"]
    wait_until(lambda: started() == expected, "training after another check, as after any failure", config)
    cluster.run("scancel", job)
    wait_until(lambda: cluster.job(job).get("JobState") == "CANCELLED", "cancelled", config)
    time.sleep(3)  # Slurm took a requeue for as long as it was completing
    assert cluster.job(job)["JobState"] == "CANCELLED" and cluster.job(job)["Restarts"] == "3"
    log = next(Path(config.run_dir).glob("slurm-*.out")).read_text()
    assert log.count("asking the ranks to save") == 3 and "Slurm is ending this job itself: not requeued" in log


def test_a_users_mistake_is_not_tried_again(
    cluster: SlurmCluster, site: Path, run_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """On a node where other programs hold the ports that the first jobs would take."""
    config = run_config(tokenizer={"path": "/absent"})
    with contextlib.ExitStack() as stack:
        for port in range(20000, 20020):
            with contextlib.suppress(OSError):  # somebody else holds it, which is as good
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
        job = submit(cluster, site, config)
        wait_until(lambda: cluster.job(job)["JobState"] == "FAILED", "failed", config)
    log = next(Path(config.run_dir).glob("slurm-*.out")).read_text()
    assert "no tokenizer at /absent" in log and "preflight failed" in log
    assert cluster.job(job)["Restarts"] == "0"


def test_a_tokenizers_training_comes_back_where_it_was(
    cluster: SlurmCluster, run_config: Callable[..., RunConfig], pictures_folder: Path, tmp_path: Path
) -> None:
    """Saved long before its next checkpoint was due, when Slurm said that its time was up."""
    environment = cluster.environment | {
        "STAR_SITE": str(site_file(tmp_path, "RANKS_PER_NODE=1", "export GLOO_SOCKET_IFNAME=lo")),
        "STAR_REPO": str(ROOT),
    }
    folder, script = tmp_path / "tokenizer", ROOT / "launcher/slurm/train_tokenizer.sbatch"
    options = ["steps=150", "checkpoint_every=1000", "log_every=1", f"run_dir={folder}"]
    command = ["sbatch", "--parsable", "--nodes=2", f"--output={tmp_path}/log", str(script)]
    command += [str(ROOT / "configs/tokenizer_demo.json"), f"data.pictures={pictures_folder}", *options]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    job, config = result.stdout.strip(), run_config(run_dir=str(folder))

    def steps() -> list[int]:
        return [report["step"] for report in read_json_lines(folder / "metrics.jsonl")]

    def log() -> str:
        return (tmp_path / "log").read_text()[-4000:]

    wait_until(lambda: len(steps()) >= 3, "training", config, log)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    start_again_at_once(cluster, job, config, restarts=1)
    wait_until(lambda: cluster.job(job)["JobState"] == "COMPLETED", "completed", config, log)
    assert steps() == list(range(1, 151)) and (folder / "model.safetensors").is_file()
    assert "SIGUSR1: the training goes on from step" in (tmp_path / "log").read_text()


def test_the_jobs_before_and_after_a_training(
    cluster: SlurmCluster,
    prep_values: dict,
    run_config: Callable[..., RunConfig],
    tokenizer_folder: Path,
    tmp_path: Path,
) -> None:
    """An array of tokenizations, one of which finds its storage away at first, and what merges them; then evaluate and
    export, and sample from what was exported."""
    python = stand_in(
        tmp_path,
        "python.sh",
        f"[[ $* == *'--partition 1/2'* ]] && mkdir {tmp_path}/away 2> /dev/null && exit 69",
        f'exec {sys.executable} "$@"',
    )
    site = site_file(tmp_path, f"PYTHON={python}")
    environment = cluster.environment | {"STAR_SITE": str(site), "STAR_REPO": str(ROOT)}

    def sbatch(*arguments: str) -> str:
        command = ["sbatch", "--parsable", f"--output={tmp_path}/%x-%j.out", *arguments]
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    def script(name: str) -> str:
        return str(ROOT / "launcher" / "slurm" / name)

    def logs() -> str:
        return "\n".join(path.read_text()[-2000:] for path in sorted(tmp_path.glob("*.out")))

    def completed(job: str) -> bool:
        state = cluster.job(job).get("JobState")
        assert state in ("PENDING", "RUNNING", "COMPLETING", "COMPLETED"), f"{job} {state}:\n{logs()}"
        return state == "COMPLETED"

    config = run_config(train={"steps": 4}, validation={"every": 4, "num_samples": 8})
    reported = train_on(config, 2)[4]
    data = tmp_path / "data"
    (tmp_path / "prep.json").write_text(json.dumps(prep_values | {"output": str(data)}))
    array = sbatch("--array=0-1", script("tokenize.sbatch"), str(tmp_path / "prep.json"))
    merge = sbatch(f"--dependency=afterok:{array}", script("merge.sbatch"), str(data))
    export = sbatch(script("export.sbatch"), config.run_dir, "--out", str(tmp_path / "export"))
    sample = [script("sample.sbatch"), str(tmp_path / "export"), "red heart", "--out", str(tmp_path / "heart.png")]
    jobs = [merge, export, sbatch(f"--dependency=afterok:{export}", *sample)]
    jobs.append(sbatch(script("evaluate.sbatch"), config.run_dir, "--out", str(tmp_path / "evaluation.json")))
    start_again_at_once(cluster, f"{array}_1", config, restarts=1)
    for job in jobs:
        wait_until(lambda: completed(job), "completed", config)  # noqa: B023
    assert (data / "dataset.json").is_file()
    assert logs().count("exit code 69: requeueing") == 1
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert found["validation/loss/total"] == pytest.approx(reported["validation/loss/total"], rel=1e-5)
    assert (tmp_path / "heart.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("options", [["--batch", "--signal=TERM"], []], ids=["to the shell alone", "as Slurm ends it"])
def test_nothing_is_left_of_a_task_of_data_preparation_that_is_ended(
    cluster: SlurmCluster, run_config: Callable[..., RunConfig], tmp_path: Path, options: list[str]
) -> None:
    """Its script passes no signal on to the command."""
    started = tmp_path / "started"
    python = stand_in(tmp_path, "python.sh", f"echo $$ > {started}.new && mv {started}.new {started}", "exec sleep 600")
    environment = cluster.environment | {"STAR_SITE": str(site_file(tmp_path, f"PYTHON={python}"))}
    command = ["sbatch", "--parsable", "--array=0-0", f"--output={tmp_path}/log", "launcher/slurm/tokenize.sbatch", "c"]
    job = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True).stdout.strip()
    wait_until(started.exists, "started", run_config())
    process = psutil.Process(int(started.read_text()))
    cluster.run("scancel", *options, job)
    process.wait(30)
    assert not process.is_running()
    wait_until(lambda: cluster.job(job)["JobState"] in ("CANCELLED", "FAILED"), "ended", run_config())
