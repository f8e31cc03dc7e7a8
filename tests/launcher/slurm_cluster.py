"""A real Slurm of two nodes on this machine, in a temporary folder: munged, slurmctld and two slurmd."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import time
from pathlib import Path

from tests.s3 import free_ports

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue")
NODES = ("n1", "n2")
START_TIMEOUT_S = 60

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket
MpiDefault=none
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool_%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd_%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd_%n.log
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,sched_interval=1
KillWait=10
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 State=UNKNOWN
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def stand_in(folder: Path, name: str, *lines: str) -> str:
    """A script of bash in place of a program; returns its path."""
    path = folder / name
    path.write_text("\n".join(["#!/bin/bash", *lines, ""]))
    path.chmod(0o755)
    return str(path)


def why_not() -> str | None:
    """Why no cluster can be started here; None if it can."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"{', '.join(missing)} not installed (apt-get install slurm-wlm munge)"
    return None if os.geteuid() == 0 else "slurmd runs jobs as root only"


class SlurmCluster:
    """A context manager; the daemons live inside it. `root` must be short: sockets have paths of 100 bytes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._daemons: list[subprocess.Popen] = []
        self.environment = os.environ | {"SLURM_CONF": str(root / "slurm.conf")}

    def __enter__(self) -> SlurmCluster:
        self.root.chmod(0o755)
        for folder in ("state", *(f"spool_{node}" for node in NODES)):
            (self.root / folder).mkdir()
        key = self.root / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        config = CONFIG.format(host=socket.gethostname().split(".")[0], ports=free_ports(3), root=self.root)
        (self.root / "slurm.conf").write_text(config)
        try:
            munge_files = [f"--{kind}-file={self.root}/munged.{kind}" for kind in ("log", "pid", "seed")]
            self._start(
                "munged",
                "--foreground",
                "--force",
                f"--socket={self.root}/munge.socket",
                f"--key-file={key}",
                *munge_files,
            )
            _wait_for(lambda: (self.root / "munge.socket").exists(), "munged's socket")
            self._start("slurmctld", "-D", "-c", "-f", str(self.root / "slurm.conf"))
            for node in NODES:
                self._start("slurmd", "-D", "-N", node, "-f", str(self.root / "slurm.conf"))
            _wait_for(
                lambda: self.run("sinfo", "--noheader", "--format=%T %D").split() == ["idle", "2"], "two idle nodes"
            )
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["scancel", "--signal=KILL", "--user=root"], env=self.environment, capture_output=True)
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def run(self, *command: str) -> str:
        """Output of a Slurm command, nothing if it fails."""
        result = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        return result.stdout.strip()

    def job(self, job_id: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        words = self.run("scontrol", "--oneliner", "show", "job", job_id).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def describe(self, job_id: str) -> str:
        """For a test that fails: what the controller knows of a job and of the nodes, and has done last."""
        log = (self.root / "slurmctld.log").read_text()[-4000:]
        return "\n".join((self.run("scontrol", "show", "job", job_id), self.run("sinfo", "--long", "--Node"), log))

    def _start(self, *command: str) -> None:
        log = (self.root / f"{command[0]}_{len(self._daemons)}.out").open("w")
        self._daemons.append(
            subprocess.Popen(command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        )


def _wait_for(condition, what: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {what} within {START_TIMEOUT_S} s")
        time.sleep(0.1)
