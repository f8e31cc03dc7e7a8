"""A run folder with everything that submits its job. Imports no torch: it runs on login nodes."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

from star_dist.config import RunConfig, dump_config
from star_dist.environment import git_commit
from star_dist.errors import UserError
from star_dist.files import write_text_atomically
from star_dist.run_folder import SUBMITTED_CONFIG_FILE
from star_dist.train.checkpoint import CheckpointFolder, check_same_run

REPOSITORY = Path(__file__).parents[1]
SCRIPT_FILE = "submit.sh"
ENVIRONMENT_FILE = "submission.json"


@dataclass(frozen=True)
class Submission:
    """script: the text of RUN/submit.sh."""

    run_dir: Path
    config: RunConfig
    script: str
    commit: str | None

    def submit(self) -> str:
        """Writes the run folder and runs the script; returns what sbatch says.

        Raises:
            UserError: the folder cannot be written, or sbatch refuses the job.
        """
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            write_text_atomically(self.run_dir / SUBMITTED_CONFIG_FILE, dump_config(self.config) + "\n")
            facts = {"git_commit": self.commit, "repository": str(REPOSITORY)}
            write_text_atomically(self.run_dir / ENVIRONMENT_FILE, json.dumps(facts, indent=2) + "\n")
            write_text_atomically(self.run_dir / SCRIPT_FILE, self.script)
            (self.run_dir / SCRIPT_FILE).chmod(0o755)
        except OSError as error:
            raise UserError(f"cannot write to run_dir {self.run_dir}: {error.strerror}") from None
        result = subprocess.run([str(self.run_dir / SCRIPT_FILE)], capture_output=True, text=True)
        if result.returncode:
            said = (result.stderr.strip() or result.stdout.strip()).splitlines() or ["nothing was said"]
            raise UserError(f"{self.run_dir / SCRIPT_FILE} failed: {said[-1]}")
        return result.stdout.strip()


def prepare_submission(config: RunConfig, options: list[str]) -> Submission:
    """What submits a training; `options` go to sbatch. Nothing is written.

    Raises:
        UserError: the run folder holds another run, or a damaged checkpoint.
    """
    run_dir = Path(config.run_dir).absolute()
    checkpoint = CheckpointFolder(run_dir, config.checkpoint).find(config.checkpoint.resume_step)
    if checkpoint is not None:
        check_same_run(checkpoint, config)
    commit = git_commit()
    site = Path(os.environ.get("STAR_SITE", REPOSITORY / "launcher" / "slurm" / "site.sh")).absolute()
    if not site.is_file():
        raise UserError(f"STAR_SITE {site} does not exist; copy launcher/slurm/site.sh there and fill it in")
    command = [
        "sbatch",
        *options,
        f"--job-name={config.name}",
        f"--output={run_dir}/slurm-%j.out",
        str(REPOSITORY / "launcher" / "slurm" / "train.sbatch"),
        str(run_dir / SUBMITTED_CONFIG_FILE),
    ]
    script = "\n".join(
        [
            "#!/usr/bin/env bash",
            f"# Written by launcher/submit.py from commit {commit or 'unknown'}; run it again to submit the job again.",
            "set -eu",
            f"export STAR_REPO={shlex.quote(str(REPOSITORY))} STAR_SITE={shlex.quote(str(site))}",
            f"cd {shlex.quote(str(Path.cwd()))}  # relative paths of the config start here, as at submission",
            'source "$STAR_SITE"',
            " \\\n    ".join(shlex.quote(part) for part in command),
            "",
        ]
    )
    return Submission(run_dir, config, script, commit)
