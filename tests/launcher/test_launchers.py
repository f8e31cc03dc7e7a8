"""The same training under every launcher, 2 ranks each (others: test_commands.py, test_slurm.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from star_dist.config import RunConfig, dump_config
from tests.train.runs import metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]


def environment(**more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return kept | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT), **more}


def launchers(folder: Path) -> dict[str, list[str]]:
    """What stands before the script, by launcher. The hostfile names this node alone: `deepspeed` reaches others by
    ssh, which has no server on test machines."""
    hostfile = folder / "hostfile"
    hostfile.write_text("localhost slots=2\n")
    address = ["--master_addr", "127.0.0.1", "--master_port", "29632"]
    deepspeed = [sys.executable, "-m", "deepspeed.launcher.runner"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29634"]
    return {
        "deepspeed --hostfile": [*deepspeed, "--hostfile", str(hostfile), "--no_ssh", "--node_rank", "0", *address],
        "torchrun": torchrun,
    }


@pytest.mark.parametrize("name", ["deepspeed --hostfile", "torchrun"])
def test_every_launcher_starts_the_same_training(
    run_config: Callable[..., RunConfig], tmp_path: Path, name: str
) -> None:
    config = run_config(train={"steps": 2})
    (tmp_path / "config.json").write_text(dump_config(config))
    command = [*launchers(tmp_path)[name], "launcher/train.py", "--config", str(tmp_path / "config.json")]
    result = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr[-3000:]
    assert sorted(metrics(config)) == [1, 2]
    assert json.loads((Path(config.run_dir) / "environment.json").read_text())["world_size"] == 2


def test_node_py_keeps_exit_codes(tmp_path: Path) -> None:
    """A rank's own code, or 128 and the signal that ended it."""
    script = tmp_path / "rank.py"
    script.write_text("import os, sys\nif sys.argv[1] == '9': os.kill(os.getpid(), 9)\nsys.exit(int(sys.argv[1]))\n")
    for given, expected in (("75", 75), ("9", 137)):
        command = [sys.executable, "launcher/node.py", "--nproc-per-node=1", "--master-port=29636", str(script), given]
        assert subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True).returncode == expected
