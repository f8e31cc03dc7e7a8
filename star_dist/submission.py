"""A run folder with everything that submits its job. Imports no torch: it runs on login nodes."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from star_dist.config import RunConfig, dump_config
from star_dist.environment import git_commit
from star_dist.errors import UserError
from star_dist.files import write_text_atomically
from star_dist.run_folder import SUBMITTED_CONFIG_FILE
from star_dist.train.checkpoint import CheckpointFolder, check_same_run

REPOSITORY = Path(__file__).parents[1]
READ_SITE = "launcher/slurm/read_site.sh"
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
        # Not by its own name: the folder may lie in a file system where login nodes execute nothing.
        result = subprocess.run(["bash", str(self.run_dir / SCRIPT_FILE)], capture_output=True, text=True)
        if result.returncode:
            raise UserError(f"{self.run_dir / SCRIPT_FILE} failed: {_last_words(result)}")
        print(result.stderr, end="", file=sys.stderr)  # such as a module that the site's file does not find
        return result.stdout.strip()


def prepare_submission(config: RunConfig, options: list[str]) -> Submission:
    """What submits a training; `options` go to sbatch. Nothing is written.

    Raises:
        UserError: the run folder holds another run, or a damaged checkpoint; or there is no site's file, or it fails.
    """
    run_dir = Path(config.run_dir).absolute()
    site = Path(os.environ.get("STAR_SITE", REPOSITORY / "launcher" / "slurm" / "site.sh")).absolute()
    if not site.is_file():
        raise UserError(f"STAR_SITE {site} does not exist; copy launcher/slurm/site.sh there and fill it in")
    if config.checkpoint.remote is not None:
        os.environ.update(_environment_of(site))  # it may say where S3 is
    checkpoint = CheckpointFolder(run_dir, config.checkpoint).find(config.checkpoint.resume_step)
    if checkpoint is not None:
        check_same_run(checkpoint, config)
    commit = git_commit()
    output = f"{run_dir}/slurm".replace("%", "%%")  # sbatch fills in what stands behind a single one
    command = [
        "sbatch",
        *options,
        f"--job-name={config.name}",
        f"--output={output}-%j.out",
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
            f'source "$STAR_REPO/{READ_SITE}"',
            # Where a site gives jobs nothing of the environment, these two go with them all the same.
            "if [[ ${SBATCH_EXPORT:-} == NONE ]]; then export SBATCH_EXPORT=STAR_REPO,STAR_SITE; fi",
            " \\\n    ".join(shlex.quote(part) for part in command),
            "",
        ]
    )
    return Submission(run_dir, config, script, commit)


def _environment_of(site: Path) -> dict[str, str]:
    """The environment as a site's file leaves it.

    Raises:
        UserError: the file ends the shell.
    """
    command = ["bash", "-c", 'source "$0" > /dev/null && exec env --null', str(REPOSITORY / READ_SITE)]
    result = subprocess.run(command, env=os.environ | {"STAR_SITE": str(site)}, capture_output=True, text=True)
    if result.returncode:
        raise UserError(f"STAR_SITE {site} failed: {_last_words(result)}")
    return dict(line.split("=", 1) for line in result.stdout.split("\0") if line)


def _last_words(result: subprocess.CompletedProcess[str]) -> str:
    return next(reversed((result.stderr.strip() or result.stdout.strip()).splitlines()), "nothing was said")
