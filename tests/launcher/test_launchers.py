"""One training under every launcher, 2 ranks each (srun: test_slurm.py)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from star_dist.config import RunConfig, dump_config
from tests.ranks import run_script
from tests.train.runs import last_step, metrics, wait_for_step

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]


def environment(**more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return kept | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT), **more}


def test_a_run_goes_on_under_every_launcher_and_draws(run_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    """`deepspeed --num_gpus 2`, killed; `deepspeed --hostfile`, killed; `torchrun` to the end; export and a picture.

    The hostfile names this node alone: `deepspeed` reaches others by ssh, which has no server on test machines.
    """
    config = run_config(train={"steps": 60}, checkpoint={"every": 5})
    (tmp_path / "config.json").write_text(dump_config(config))
    training = ["launcher/train.py", "--config", str(tmp_path / "config.json")]
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("localhost slots=2\n")
    deepspeed = [sys.executable, "-m", "deepspeed.launcher.runner"]
    address = ["--master_addr", "127.0.0.1", "--master_port", "29632"]
    on_hosts = ["--hostfile", str(hostfile), "--no_ssh", "--node_rank", "0", *address]
    for launcher in (["--num_gpus", "2", "--master_port", "29613"], on_hosts):
        before = last_step(config)
        with (tmp_path / "log").open("w+") as log:
            command = [*deepspeed, *launcher, *training]
            options = dict(cwd=ROOT, env=environment(), stdout=log, stderr=log, start_new_session=True)
            running = subprocess.Popen(command, **options)
            wait_for_step(config, before + 7, lambda running=running: running.poll() is None)
            assert last_step(config) >= before + 7, (tmp_path / "log").read_text()[-3000:]
            os.killpg(running.pid, signal.SIGKILL)
            running.wait()
    assert last_step(config) < 60
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29634"]
    command = [*torchrun, *training]
    result = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr[-3000:]
    assert list(metrics(config)) == list(range(1, 61))
    facts = json.loads((Path(config.run_dir) / "environment.json").read_text())
    assert facts["first_step"] >= 10 and facts["world_size"] == 2

    export, picture = tmp_path / "export", tmp_path / "heart.png"
    result = run_script(ROOT / "launcher/export.py", config.run_dir, "--out", str(export))
    assert result.returncode == 0 and "exported step 60" in result.stdout, result.stderr
    result = run_script(ROOT / "launcher/sample.py", str(export), "red heart", "--seed", "1", "--out", str(picture))
    assert result.returncode == 0 and picture.read_bytes().startswith(b"\x89PNG"), result.stderr


def test_what_a_run_says_last_stands_alone(run_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Not behind the progress bar, nor before a list of what libraries miss when Python ends."""
    config = run_config(train={"steps": 1000})
    (tmp_path / "config.json").write_text(dump_config(config))
    command = [sys.executable, "launcher/train.py", "--config", str(tmp_path / "config.json")]
    running = subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    wait_for_step(config, 3, lambda: running.poll() is None)
    running.send_signal(signal.SIGUSR1)
    said = running.communicate(timeout=60)[1].splitlines()
    assert running.returncode == 75
    assert said[-1] == f"SIGUSR1: the run goes on from step {last_step(config)} when started again", said[-3:]


def test_a_killed_rank_ends_the_others_without_a_word(run_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    """What they would print, tracebacks of lost connections, hides the line that says why the first one ended."""
    config = run_config(train={"steps": 1000})
    (tmp_path / "config.json").write_text(dump_config(config))
    node = [sys.executable, "launcher/node.py", "--nproc-per-node=2", "--master-port=29638"]
    command = [*node, "launcher/train.py", "--config", str(tmp_path / "config.json")]
    running = subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    wait_for_step(config, 3, lambda: running.poll() is None)
    ranks = [process for process in psutil.Process(running.pid).children() if "LOCAL_RANK" in process.environ()]
    next(rank for rank in ranks if rank.environ()["LOCAL_RANK"] == "1").kill()
    said = running.communicate(timeout=60)[1]
    assert running.returncode == 137
    assert "Traceback" not in said and "error:" not in said, said


def test_node_py_keeps_exit_codes(tmp_path: Path) -> None:
    """A rank's own code, or 128 and the signal that ended it."""
    script = tmp_path / "rank.py"
    script.write_text("import os, sys\nif sys.argv[1] == '9': os.kill(os.getpid(), 9)\nsys.exit(int(sys.argv[1]))\n")
    for given, expected in (("75", 75), ("9", 137)):
        command = [sys.executable, "launcher/node.py", "--nproc-per-node=1", "--master-port=29636", str(script), given]
        assert subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True).returncode == expected
