"""What the SLURM scripts of data preparation start; `echo` stands for Python. And what no script starts without."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.launcher.slurm_cluster import stand_in

ROOT = Path(__file__).parents[2]


def submit(script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "SLURM_SUBMIT_DIR": str(ROOT), "PYTHON": "echo"} | variables
    command = ["bash", str(ROOT / "launcher" / "slurm" / script), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def array(task: int, first: int, last: int, count: int) -> dict[str, str]:
    names = ("ID", "MIN", "MAX", "COUNT")
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in zip(names, (task, first, last, count))}


@pytest.mark.parametrize("job", ["tokenize", "caption"])
def test_every_task_of_an_array_takes_its_partition(job: str) -> None:
    done = submit(f"{job}.sbatch", "c.json", "batch=8", SLURM_CPUS_PER_TASK="16", **array(3, 0, 63, 64))
    assert done.stdout.strip() == f"-m data_prep.{job} --config c.json --partition 3/64 --workers 16 batch=8"
    assert done.returncode == 0 and not done.stderr


@pytest.mark.parametrize("job", ["tokenize", "caption"])
def test_single_partitions_need_the_number_of_all(job: str) -> None:
    done = submit(f"{job}.sbatch", "c.json", **array(17, 3, 17, 2))
    assert done.returncode == 2 and "set PARTITIONS to the number of all partitions" in done.stderr
    done = submit(f"{job}.sbatch", "c.json", PARTITIONS="64", **array(17, 3, 17, 2))
    assert done.stdout.split()[-2:] == ["--partition", "17/64"]
    assert submit(f"{job}.sbatch", "c.json").returncode == 2


def test_merge_verifies_what_it_merged() -> None:
    done = submit("merge.sbatch", "s3://bucket/set")
    assert done.stdout.splitlines() == ["-m data_prep.merge s3://bucket/set", "-m data_prep.verify s3://bucket/set"]
    done = submit("merge.sbatch", "s3://b/s", "--endpoint", "http://x", "--region", "eu", SLURM_CPUS_PER_TASK="4")
    options = "s3://b/s --endpoint http://x --region eu"
    assert done.stdout.splitlines() == [f"-m data_prep.merge {options}", f"-m data_prep.verify {options} --workers 4"]
    assert submit("merge.sbatch", "s3://bucket/set", PYTHON="false").returncode == 1
    assert submit("merge.sbatch").returncode == 2


@pytest.mark.parametrize(
    ("job", "kind", "number"), [("tokenize", "task", "12_3"), ("caption", "task", "12_3"), ("merge", "job", "15")]
)
def test_what_cannot_reach_something_is_requeued_as_often_as_the_site_says(
    job: str, kind: str, number: str, tmp_path: Path
) -> None:
    stand_in(tmp_path, "scontrol", f'echo "$*" >> {tmp_path}/requeued', f"[[ ! -e {tmp_path}/refuses ]]")
    stand_in(tmp_path, "squeue", "echo RUNNING")
    stand_in(tmp_path, "sleep")
    site = tmp_path / "site.sh"
    site.touch()
    variables = {"SLURM_JOB_ID": "15", "STAR_SITE": str(site)}
    if kind == "task":
        variables |= array(3, 0, 63, 64) | {"SLURM_ARRAY_JOB_ID": "12"}
    variables["PATH"] = f"{tmp_path}:{os.environ['PATH']}"

    def ends(code: int, restarts: str = "") -> str:
        """What a job says that ends with a code after that many restarts."""
        python = stand_in(tmp_path, "python.sh", f"exit {code}")
        counted = {"SLURM_RESTART_COUNT": restarts} if restarts else {}  # the first start has no such variable
        done = submit(f"{job}.sbatch", "c.json", **variables | counted | {"PYTHON": python})
        assert done.returncode == code and not done.stdout
        return done.stderr

    def requeued() -> list[str]:
        log = tmp_path / "requeued"
        return log.read_text().splitlines() if log.exists() else []

    for code, restarts in ((0, ""), (1, ""), (2, ""), (143, ""), (69, "3")):
        assert not ends(code, restarts) and not requeued()
    assert "exit code 69: requeueing (restart 1 of at most 3)" in ends(69)
    assert "(restart 3 of at most 3)" in ends(69, "2")
    assert requeued() == [f"requeue {number}"] * 2
    site.write_text("MAX_FAILURES=1\n")
    assert not ends(69, "1") and len(requeued()) == 2
    (tmp_path / "refuses").touch()
    assert f"error: Slurm does not requeue this {kind}; submit it again" in ends(69)


@pytest.mark.parametrize(
    "job", ["tokenize", "caption", "merge", "train", "train_tokenizer", "evaluate", "export", "sample"]
)
def test_a_site_file_that_is_named_must_be_there(job: str, tmp_path: Path) -> None:
    site = tmp_path / "site.sh"
    done = submit(f"{job}.sbatch", "c.json", STAR_SITE=str(site), **array(0, 0, 0, 1))
    reason = f"STAR_SITE is {site}, which is no file; copy launcher/slurm/site.sh there and fill it in"
    assert done.stderr == f"error: {reason}\n" and done.returncode == 2 and not done.stdout
    site.write_text("echo read; exit 3\n")
    done = submit(f"{job}.sbatch", "c.json", STAR_SITE=str(site), **array(0, 0, 0, 1))
    assert done.stdout == "read\n" and done.returncode == 3


@pytest.mark.parametrize("job", ["tokenize", "caption", "merge"])
def test_a_checkout_may_have_no_site_file(job: str, tmp_path: Path) -> None:
    scripts = tmp_path / "launcher" / "slurm"
    shutil.copytree(ROOT / "launcher" / "slurm", scripts)
    (scripts / "site.sh").unlink()
    done = submit(f"{job}.sbatch", "c.json", STAR_REPO=str(tmp_path), **array(0, 0, 0, 1))
    assert done.returncode == 0 and f"-m data_prep.{job}" in done.stdout and not done.stderr


def test_unfinished_work_of_jobs_on_s3_lies_where_all_nodes_see_it() -> None:
    """In the checkout, so that a task that starts again on another node goes on."""
    works = [json.loads(path.read_text()).get("work") for path in (ROOT / "configs" / "prep").glob("*.json")]
    assert sum(work is not None for work in works) == 2
    assert not any(Path(work).is_absolute() for work in works if work)
