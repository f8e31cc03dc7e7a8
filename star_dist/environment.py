"""The facts that a result needs beside it to be understood later: machine, packages, commit. Imports no torch."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RECORDED_PACKAGES = (
    "torch",
    "deepspeed",
    "flash-attn",
    "flash-attn-4",
    "transformers",
    "mosaicml-streaming",
    "safetensors",
    "numpy",
)


def describe_environment() -> dict[str, Any]:
    """When, where, with which packages (null: not installed), from which commit and by which command."""
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": platform.node(),
        "cpu": _cpu_name(),
        "python": sys.version.split()[0],
        "packages": {name: _version(name) for name in RECORDED_PACKAGES},
        "git_commit": git_commit(),
        "command": sys.argv,
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def git_commit() -> str | None:
    """Commit of the code, with a mark for uncommitted changes; None outside a git checkout."""
    where = ["-C", str(Path(__file__).parent), "-c", "safe.directory=*"]  # the checkout may be another user's
    command = ["git", *where, "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
