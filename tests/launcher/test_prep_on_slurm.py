"""What the SLURM scripts of data preparation start; `echo` stands for Python."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

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
