"""The commands as people type them: help at once, mistakes in one line, the whole way under the real launcher."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError

from star_dist import cli, environment, weights
from star_dist.config import RunConfig, dump_config
from star_dist.train.export_checkpoint import export_checkpoint
from star_dist.weights import write_weights
from tests.launcher.slurm_cluster import stand_in
from tests.ranks import run_ranks, run_script
from tests.s3 import S3Bucket
from tests.train.runs import train_on

ROOT = Path(__file__).parents[2]
COMMANDS = [
    ["launcher/train.py"],
    ["launcher/train_tokenizer.py"],
    ["launcher/plan.py"],
    ["launcher/export.py"],
    ["launcher/convert.py"],
    ["launcher/convert.py", "from-public"],
    ["launcher/convert.py", "to-public"],
    ["launcher/edit.py"],
    ["launcher/edit.py", "inpaint"],
    ["launcher/edit.py", "outpaint"],
    ["launcher/edit.py", "vary"],
    ["-m", "star_dist.command"],
    ["-m", "star_dist.command", "serve"],
    ["launcher/sample.py"],
    ["launcher/sample_grid.py"],
    ["launcher/evaluate.py"],
    ["launcher/submit.py"],
    ["launcher/status.py"],
    ["launcher/preflight.py"],
    ["launcher/retry.py"],
    ["-m", "data_prep.tokenize"],
    ["-m", "data_prep.merge"],
    ["-m", "data_prep.verify"],
    ["-m", "data_prep.caption"],
    ["-m", "data_prep.openmoji"],
]
SLOW_IMPORTS = {"boto3", "deepspeed", "numpy", "PIL", "streaming", "torch", "transformers"}


def run(*command: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_answers_at_once(command: list[str]) -> None:
    """Help needs none of what takes seconds to import."""
    result = run(sys.executable, "-X", "importtime", *command, "--help")
    assert result.returncode == 0 and result.stdout.startswith("usage:")
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "argparse" in imported and not imported & SLOW_IMPORTS


@pytest.mark.parametrize("unbuffered", ["1", ""])
def test_a_reader_that_ends_early_is_no_error(unbuffered: str) -> None:
    """As of `| head -1`: the exit code of SIGPIPE, and no traceback."""
    command = (
        f"PYTHONUNBUFFERED={unbuffered} {sys.executable} launcher/plan.py --config configs/d30.json --gpus 8 --gpu h200"
    )
    result = run("bash", "-c", f"{command} | true; exit ${{PIPESTATUS[0]}}")
    assert (result.returncode, result.stderr) == (141, "")


def save_into_full_file() -> None:
    with open("/dev/full", "wb") as file:  # opened here: safetensors, as root, would put a file in the device's place
        torch.save({"a": torch.zeros(100_000)}, file)


def fail(error: Exception) -> Callable[[], None]:
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize("rank", [None, "0"])
@pytest.mark.parametrize(
    ("main", "place"),
    [
        (fail(OSError(errno.ENOSPC, "No space left on device", "/runs/a/facts.jsonl")), " to /runs/a/facts.jsonl"),
        (fail(OSError(errno.ENOSPC, "No space left on device", "/from", None, "/to")), " to /to"),
        (fail(OSError(errno.ENOSPC, "No space left on device")), ""),
        (fail(SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")), ""),
        (save_into_full_file, ""),
    ],
    ids=["named", "copied", "unnamed", "safetensors", "torch"],
)
def test_a_full_disk_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    main: Callable[[], None],
    place: str,
    rank: str | None,
) -> None:
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
        if rank is not None:
            monkeypatch.setenv(name, rank)
    with pytest.raises(SystemExit) as ended:
        cli.run_command(main)
    said = f"error: cannot write{place}: No space left on device; make room and run the same command again\n"
    assert ended.value.code == 2 and capsys.readouterr().err == said


def test_a_quota_that_is_used_up_is_a_full_disk(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.run_command(fail(OSError(errno.EDQUOT, "Disk quota exceeded", "out.png")))
    assert ended.value.code == 2 and "cannot write to out.png: Disk quota exceeded; make" in capsys.readouterr().err


def test_other_errors_stay_what_they_are(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as ended:
        cli.run_command(fail(PermissionError(errno.EACCES, "Permission denied", "out.png")))
    assert ended.value.code == 1 and capsys.readouterr().err == "error: out.png: Permission denied\n"
    for error in (SafetensorError("Error while deserializing header"), RuntimeError("os error 28")):
        with pytest.raises(type(error), match=re.escape(str(error))):
            cli.run_command(fail(error))


@pytest.mark.parametrize("unbuffered", ["1", ""])
def test_output_to_a_full_disk_is_one_line(unbuffered: str) -> None:
    command = (
        f"PYTHONUNBUFFERED={unbuffered} {sys.executable} launcher/plan.py --config configs/d30.json --gpus 8 --gpu h200"
    )
    result = run("bash", "-c", f"{command} > /dev/full")
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert re.match(r"error: cannot write( to standard output)?: No space left on device; make room", result.stderr)


def test_weights_that_a_full_disk_does_not_take(small_disk: Path, inference_folder: Path) -> None:
    with pytest.raises(OSError, match="No space left") as error:
        write_weights({"a": torch.zeros(100_000)}, small_disk)
    assert error.value.filename == str(small_disk)
    for kind in ("pth", "safetensors"):
        command = ["to-public", str(inference_folder), "--out", str(small_disk / "public"), "--format", kind]
        result = run_script(ROOT / "launcher/convert.py", *command)
        errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert result.returncode == 2 and "Traceback" not in result.stderr
        assert errors == [
            f"error: cannot write to {small_disk}/public/star.{kind}: No space left on device; make room and run the "
            f"same command again"
        ]
        assert not list(small_disk.iterdir())


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (
            ["launcher/train.py", "--config", "configs/d30.json", "train.stepz=3"],
            "unknown key train.stepz; did you mean train.steps?",
        ),
        (["launcher/train.py", "--config", "absent.json"], "cannot read config absent.json"),
        (["launcher/train.py", "--config", "configs/d30.json", "train.steps=soon"], "train.steps: input should be"),
        (
            ["launcher/train.py", "--config", "configs/d30.json", "samples.top_k=[1,2]"],
            "top_k has 2 values, the model has 10 scales; give one value or 10",
        ),
        (
            ["launcher/train.py", "--config", "configs/d30.json", "samples.smoothing=[0.3,0.1]"],
            "smoothing has 2 values, the model has 10 scales; give one value or 10",
        ),
        (
            ["launcher/train.py", "--config", "configs/d30.json", "--dry-run", "--gpus", "7"],
            "is not a multiple of train.micro_batch 16 x 7 ranks",
        ),
        (["launcher/train.py", "--config", "configs/d30.json", "--dry-run", "--gpus", "0"], "--gpus must be positive"),
        (["launcher/export.py", "absent", "--out", "out"], "absent is no run folder"),
        (
            ["launcher/edit.py", "outpaint", "absent", "absent.png", "heart", "--out", "x.png", "--box", "0,1"],
            "--box takes four numbers, left,top,right,bottom; got '0,1'",
        ),
        (
            ["launcher/edit.py", "vary", "absent", "absent.png", "heart", "--out", "x.png", "--keep-scales", "1"],
            "cannot read absent.png",
        ),
        (["-m", "star_dist.command", "serve", "absent"], "absent is no inference folder"),
        (["-m", "star_dist.command", "serve", "absent", "--port", "99999"], "--port must lie in 0..65535, got 99999"),
        (["-m", "star_dist.command", "serve", "absent", "--host", "192.0.2.1"], "cannot listen on 192.0.2.1 port 7860"),
        (["launcher/convert.py", "to-public", "absent", "--out", "no/out"], "absent is no inference folder"),
        (
            [
                "launcher/convert.py",
                "from-public",
                "--transformer",
                "a",
                "--tokenizer",
                "b",
                "--out",
                "c",
                "--scales",
                "2,1",
            ],
            "--scales takes growing whole numbers from 1 on, got '2,1'",
        ),
        (
            ["launcher/convert.py", "from-public", "--transformer", "a", "--tokenizer", "b", "--out", "c"],
            "both have ten scales: give --resolution or --scales",
        ),
        (["launcher/sample.py", "absent", "a heart", "--out", "x.png"], "absent is no inference folder"),
        (
            ["launcher/sample.py", "absent", "--prompts-file", "docs/demo_samples.png", "--out", "x.png"],
            "cannot read docs/demo_samples.png: byte 0 is no UTF-8",
        ),
        (
            ["launcher/sample.py", "absent", "a heart", "--out", "x.png", "--seed=-1"],
            "--seed must lie in 0..9223372036854775807 for 1 pictures, got -1",
        ),
        (
            ["launcher/edit.py", "vary", "absent", "absent.png", "heart", "--out", "x.png", "--seed", str(2**63 - 1)]
            + ["--keep-scales", "1", "--count", "2"],
            "--seed must lie in 0..9223372036854775806 for 2 pictures, got 9223372036854775807",
        ),
        (
            ["launcher/sample.py", "absent", "a heart", "--out", "x.png", "--device", "abacus"],
            "there is no device abacus",
        ),
        (["launcher/plan.py", "seed=1", "--gpus", "7", "--config", "configs/d30.json"], "x 7 ranks"),
        (
            ["launcher/train.py", "--config", "docs/demo_samples.png"],
            "cannot read config docs/demo_samples.png: byte 0",
        ),
        (["launcher/status.py", "absent"], "absent is no run folder"),
        (["launcher/evaluate.py", "absent"], "absent is neither a run folder nor an export"),
        (["launcher/submit.py", "configs/d30.json", "--nodes", "0"], "--nodes must be positive, got 0"),
        (["launcher/sample.py", "absent", "--out", "x.png"], "no prompt given"),
        (["launcher/sample.py", "absent", "a heart", "--out", "x.gif"], "must end in .png or .jpg"),
        (
            ["launcher/sample_grid.py", "absent", "--data", "absent", "--captions", "absent", "--out", "x"],
            "--out x must end in .png or .jpg",
        ),
        (["launcher/sample.py", "absent", "a heart", "--out", "x.png", "--top-p", "7"], "top_p must lie in 0..1"),
        (
            ["launcher/sample.py", "absent", "a heart", "--out", "x.png", "--top-k", "1,x"],
            "--top-k takes whole numbers separated by commas, got '1,x'",
        ),
        (["launcher/sample.py", "no/such", "a heart", "--out", "x.png"], "there is no folder no/such, and no Hugging"),
        (
            ["-m", "data_prep.tokenize", "--config", "configs/prep/demo.json", "tokenizer=/absent"],
            "no tokenizer at /absent",
        ),
        (
            ["-m", "data_prep.tokenize", "--config", "configs/prep/demo.json", "--device", "abacus"],
            "there is no device abacus",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_mistakes_end_in_one_line(command: list[str], said: str) -> None:
    result = run(sys.executable, *command)
    assert result.returncode == 2
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and said in errors[0]
    assert "Traceback" not in result.stderr


def test_a_rank_that_has_lost_another_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "OTHER_RANKS_WAIT_S", 0)

    def ends_first_or_is_left() -> tuple[int, str] | None:
        torch.distributed.init_process_group("gloo")
        if os.environ["RANK"] == "1":
            return torch.distributed.destroy_process_group()
        with contextlib.redirect_stderr(io.StringIO()) as said, pytest.raises(SystemExit) as ended:
            cli.run_command(torch.distributed.barrier)
        return ended.value.code, said.getvalue()

    (code, said), _ = run_ranks(ends_first_or_is_left, 2)
    assert code == 1
    assert re.fullmatch(r"error: rank 0 has lost another rank, whose own message says why it ended \(.*peer\)\n", said)


@pytest.mark.parametrize(
    ("config", "parameters"), [("d16", "273,909,248"), ("d30", "1,676,809,096"), ("d30_1024", "1,676,816,776")]
)
def test_dry_run_needs_nothing(config: str, parameters: str) -> None:
    result = run(sys.executable, "launcher/train.py", "--config", f"configs/{config}.json", "--dry-run", "--gpus", "8")
    assert result.returncode == 0, result.stderr
    for said in (
        parameters,
        "FLOPs per picture",
        "memory per GPU",
        '"stage": 3',
        '"train_batch_size"',
        "tokens per picture",
    ):
        assert said in result.stdout


@pytest.mark.slow
def test_edits_in_batches_are_those_of_one_batch(inference_folder: Path, tmp_path: Path) -> None:
    Image.new("RGB", (16, 16), (200, 40, 30)).save(tmp_path / "photo.png")
    drawn = []
    for batch in ("3", "2"):
        out = tmp_path / batch / "fox.png"
        command = ["vary", str(inference_folder), str(tmp_path / "photo.png"), "red heart"]
        command += ["--keep-scales", "1", "--count", "3", "--seed", "5", "--batch", batch, "--out", str(out)]
        result = run_script(ROOT / "launcher/edit.py", *command, "--device", "cpu", "--dtype", "fp32")
        assert result.returncode == 0, result.stderr
        drawn.append([out.with_stem(f"fox-{i}").read_bytes() for i in range(3)])
    assert drawn[0] == drawn[1] and len(set(drawn[0])) == 3


def test_bare_srun_gives_every_task_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    from star_dist.errors import UserError
    from star_dist.process import ProcessInfo, prepare_process_environment

    slurm = {"STEP_NUM_TASKS": 32, "STEP_NUM_NODES": 4, "STEP_TASKS_PER_NODE": "8(x4)", "PROCID": 17, "LOCALID": 1}
    slurm |= {"STEP_NODELIST": "gpu[003-005,9]-ib", "JOB_ID": 81234}
    ours = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    monkeypatch.setattr(os, "environ", {name: value for name, value in os.environ.items() if name not in ours})
    os.environ.update({f"SLURM_{name}": str(value) for name, value in slurm.items()})
    given = dict(os.environ)
    assert prepare_process_environment() == ProcessInfo(17, 1, 32, 8)
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("gpu003-ib", "29234")
    for name, value, said in [
        ("SLURM_STEP_TASKS_PER_NODE", "8(x3),4", r"8\(x3\),4 of them on each; give --ntasks-per-node"),
        ("SLURM_STEP_NODELIST", "[", r"cannot tell the first host of SLURM_STEP_NODELIST '\['; set MASTER_ADDR"),
    ]:
        monkeypatch.setattr(os, "environ", given | {name: value})
        with pytest.raises(UserError, match=said):
            prepare_process_environment()


def test_nothing_falls_back_to_cpus_where_gpus_were_given(monkeypatch: pytest.MonkeyPatch) -> None:
    from star_dist.device import find_device, rank_device
    from star_dist.errors import Unavailable
    from star_dist.process import ProcessInfo, check_gpus_are_there

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("LOCAL_SIZE", raising=False)
    monkeypatch.setenv("SLURMD_NODENAME", "gpu7")
    for variables in ({"CUDA_VISIBLE_DEVICES": "0,1"}, {"SLURM_GPUS_ON_NODE": "8"}):
        with monkeypatch.context() as patch:
            patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
            for name, value in variables.items():
                patch.setenv(name, value)
            check_gpus_are_there(True)
            for use in (
                lambda: check_gpus_are_there(False),
                lambda: find_device(None),
                lambda: rank_device(ProcessInfo(0, 0, 1, 1)),
            ):
                with pytest.raises(Unavailable, match=r"node gpu7 gave this process GPUs .*torch can use none"):
                    use()
            assert find_device("cpu").type == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert find_device(None).type == "cpu"


def test_a_rank_without_a_gpu_of_its_own_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where Slurm binds one GPU to each task."""
    from star_dist.device import rank_device
    from star_dist.errors import UserError
    from star_dist.process import ProcessInfo

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=r"rank 9 is number 1 on its node, .* sees 1 GPU\(s\).*--gpu-bind=none"):
        rank_device(ProcessInfo(9, 1, 16, 8))


def test_retry_takes_a_code_for_final_that_the_training_wrote_down(
    run_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """2 is also Python's own, where a node has lost the file system of the script."""
    from star_dist.train.facts import append_event, read_events

    config = run_config()
    (tmp_path / "config.json").write_text(dump_config(config))
    run_dir = Path(config.run_dir)
    run_dir.mkdir()

    def retry() -> tuple[int, str]:
        result = run(sys.executable, "launcher/retry.py", "--config", str(tmp_path / "config.json"), "--exit-code=2")
        return result.returncode, result.stdout + result.stderr

    assert retry() == (0, "exit code 2: failure 1 of 3 without a new checkpoint, once more\n")
    assert read_events(run_dir)[-1]["event"] == "failed"
    append_event(run_dir, "mistake", rank=0, reason="no tokenizer", exit_code=2)
    assert retry() == (1, "exit code 2: nothing that another attempt would change\n")
    (run_dir / "facts.jsonl").unlink()
    (run_dir / "facts.jsonl").symlink_to("/dev/full")
    code, said = retry()
    assert code == 1 and "attempts cannot be counted: giving up" in said


def test_preflight_calls_what_may_come_back_unreachable(
    run_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that does not arrive, and a store that does not answer, but not beside other problems."""
    import torch

    from star_dist.errors import Unavailable
    from star_dist.process import ProcessInfo
    from star_dist.train import preflight

    process = ProcessInfo(0, 0, 2, 2)
    monkeypatch.setattr(preflight, "ARRIVAL_TIMEOUT_S", 0.1)
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda *_, **__: iter([(torch.distributed.HashStore(), 0, 2)]))
    with pytest.raises(Unavailable, match=r"ranks \[1\] did not arrive within 0\.1 s; those of nodes \['n1'\] did"):
        preflight._meet("n1", torch.device("cpu"))

    def unreachable(place: preflight.S3Place) -> None:
        raise Unavailable(f"cannot list {place}: the store cannot be reached")

    monkeypatch.setattr(preflight.S3Place, "check_access", unreachable)
    for tokenizer, expected in (({}, 69), ({"path": "/absent"}, 1)):
        check = preflight.RankCheck(0, "n1", {"device": "cpu", "devices": 0}, 1.0, 1)
        config = run_config(checkpoint={"remote": "s3://bucket/run"}, tokenizer=tokenizer)
        preflight._check_node(config, process, check)
        result = preflight.Preflight([check], None, preflight._problems([check]))
        assert result.exit_code == expected and "the store cannot be reached" in result.table()


def test_submit_says_what_it_would_submit(run_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = run_config()
    (tmp_path / "config.json").write_text(dump_config(config))
    command = ["launcher/submit.py", str(tmp_path / "config.json"), "--nodes", "8", "train.steps=9", "--dry-run"]
    result = run(sys.executable, *command, "--sbatch=--exclusive")
    assert result.returncode == 0, result.stderr
    assert "--nodes=8" in result.stdout and "--exclusive" in result.stdout and "train.sbatch" in result.stdout
    assert not Path(config.run_dir).exists()


SITE = """set -eo pipefail
PS1="$NOT_SET_ANYWHERE"
echo no module cuda >&2
[[ -d /absent ]] && export TMPDIR=/absent
"""


def submit_from(
    folder: Path, site: str, config: RunConfig, *arguments: str, **more: str
) -> subprocess.CompletedProcess[str]:
    """submit.py with a site's file and an sbatch that says what it was given."""
    (folder / "site.sh").write_text(site)
    stand_in(folder, "sbatch", 'echo "$STAR_REPO|$STAR_SITE|${SBATCH_EXPORT:-}|$*"')
    (folder / "config.json").write_text(dump_config(config))
    command = [sys.executable, str(ROOT / "launcher/submit.py"), str(folder / "config.json"), "--nodes", "2"]
    own = {"PATH": f"{folder}:{os.environ['PATH']}", "STAR_SITE": str(folder / "site.sh"), "PYTHONPATH": str(ROOT)}
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "S3_"))}
    options = dict(cwd=folder, env=kept | own | more, capture_output=True, text=True, timeout=100)
    return subprocess.run([*command, *arguments], **options)


def test_submit_takes_a_site_written_for_a_plain_shell(run_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    """As `module` and `activate` are; into a folder whose name sbatch would fill in."""
    config = run_config(run_dir=str(tmp_path / "50%j ü"))
    result = submit_from(tmp_path, SITE, config, SBATCH_EXPORT="NONE")
    assert result.returncode == 0, result.stderr
    assert result.stderr == "no module cuda\n"
    repo, site, exported, given = result.stdout.strip().split("|")
    assert (repo, site, exported) == (str(ROOT), str(tmp_path / "site.sh"), "STAR_REPO,STAR_SITE")
    assert f"--output={tmp_path}/50%%j ü/slurm-%j.out " in given and given.endswith("/50%j ü/submitted_config.json")
    assert submit_from(tmp_path, "", config).stdout.split("|")[2] == ""  # everything goes with the job as before


def test_submit_runs_nothing_by_its_own_name(run_config: Callable[..., RunConfig], small_disk: Path) -> None:
    """Some login nodes execute no file of the shared file system."""
    subprocess.run(["mount", "-o", "remount,noexec", small_disk], check=True)
    (folder := small_disk.parent / "bin").mkdir()
    result = submit_from(folder, "", run_config(run_dir=str(small_disk / "run")))
    assert result.returncode == 0, result.stderr


def test_submit_looks_for_checkpoints_where_the_site_says(
    run_config: Callable[..., RunConfig], s3: S3Bucket, tmp_path: Path
) -> None:
    config = run_config(checkpoint={"remote": f"{s3.url}/run"})
    site = "".join(f"export {name}={value}\n" for name, value in s3.server.environment.items())
    result = submit_from(tmp_path, site, config, "--dry-run")
    assert result.returncode == 0, result.stderr
    result = submit_from(tmp_path, "echo no module cuda >&2; exit 3", config, "--dry-run")
    assert result.returncode == 2 and result.stderr == f"error: STAR_SITE {tmp_path}/site.sh failed: no module cuda\n"


def test_a_sites_file_leaves_a_jobs_shell_as_it_was(tmp_path: Path) -> None:
    """Under -e a job would end with the training, before it is requeued. What the file leaves out has its default."""
    (tmp_path / "site.sh").write_text(SITE)
    script = "set -u; source launcher/slurm/read_site.sh; false; echo $- $PYTHON $PREFLIGHT $MAX_FAILURES; echo $absent"
    variables = {"PATH": os.environ["PATH"], "STAR_SITE": str(tmp_path / "site.sh")}
    result = subprocess.run(["bash", "-c", script], cwd=ROOT, env=variables, capture_output=True, text=True)
    options, *defaults = result.stdout.split()
    assert "u" in options and "e" not in options and defaults == ["python", "yes", "3"]
    assert "absent: unbound variable" in result.stderr


def test_a_filter_of_squeue_keeps_no_job_from_coming_back(tmp_path: Path) -> None:
    """People set them for the lists that they look at."""
    stand_in(tmp_path, "squeue", "[[ ${SQUEUE_STATES:-} == PENDING ]] || echo RUNNING")
    stand_in(tmp_path, "scontrol", 'echo "$*"')
    stand_in(tmp_path, "sleep")
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SQUEUE_STATES": "PENDING"}
    script = "set -u; source launcher/slurm/requeue.sh; requeue_and_exit 75"
    result = subprocess.run(["bash", "-c", script], cwd=ROOT, env=variables, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (75, "requeue 7\n", "")


@pytest.mark.parametrize(
    ("limit", "code", "said"), [("3:00", 2, "the job's time limit is 3:00 minutes"), ("1:00:00", 75, "")]
)
def test_a_job_that_is_asked_to_save_as_soon_as_it_begins(limit: str, code: int, said: str, tmp_path: Path) -> None:
    """And whose controller answers at the second time."""
    stand_in(tmp_path, "squeue", f'[[ "$*" == *%l* ]] && echo {limit} || echo RUNNING')
    stand_in(
        tmp_path,
        "scontrol",
        f'echo "$*" >> {tmp_path}/asked',
        '[[ "$*" == "show hostnames"* ]] && echo n1',
        f'[[ "$*" == *"show node n1" ]] && {{ mkdir {tmp_path}/busy 2> {tmp_path}/null && exit 1; }}',
        'echo "NodeName=n1 NodeAddr=127.0.0.1 Port=6818"',
    )
    stand_in(tmp_path, "srun", 'echo "$*"', "kill -USR1 $PPID", "read -t 1 <> <(:)")
    stand_in(tmp_path, "sleep")
    (tmp_path / "site.sh").write_text("")
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "STAR_SITE": str(tmp_path / "site.sh")}
    variables |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "STAR_REPO": str(ROOT)}
    command = ["bash", "launcher/slurm/train.sbatch", "config.json"]
    result = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=60)
    assert "--master-addr=127.0.0.1 " in result.stdout and "preflight.py" in result.stdout
    assert result.returncode == code and said in result.stderr, result.stderr
    assert ("requeue 7" in (tmp_path / "asked").read_text()) == (code == 75)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_the_commit_of_another_users_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Git answers nothing there by itself."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "--quiet"], ["commit", "--quiet", "--allow-empty", "--message=a"]):
        subprocess.run([*git, *command], check=True)
    subprocess.run(["chown", "-R", "65534", tmp_path], check=True)
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "environment.py"))
    assert re.fullmatch(r"[0-9a-f]{40}", environment.git_commit())


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_evaluate_agrees_with_the_trainings_own_validation(
    run_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """Also of an export, in several files as beyond 5 GB."""
    config = run_config(train={"steps": 2, "precision": precision}, validation={"every": 2, "num_samples": 7})
    expected = train_on(config, 2)[2]
    evaluate = ROOT / "launcher/evaluate.py"
    result = run_script(evaluate, config.run_dir)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["step"] == 2 and found["num_samples"] == 7
    for key, value in expected.items():
        if key.startswith("validation/"):
            assert found[key] == pytest.approx(value, abs=2e-6)
    if precision == "fp32":
        assert found["skipped_samples"] == 0
        monkeypatch.setattr(weights, "MAX_SHARD_SIZE", "40KB")
        export = tmp_path / "export"
        export_checkpoint(Path(config.run_dir), export, None, "fp32")
        assert not (export / "model.safetensors").exists()
        result = run_script(evaluate, str(export))
        assert result.returncode == 2 and "which knows no data; name the config of its data" in result.stderr
        result = run_script(evaluate, str(export), "--config", f"{config.run_dir}/config.json")
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout) == found | {"model": str(export)}
        result = run_script(evaluate, config.run_dir, "model.attention=flash")
        assert result.returncode == 2 and "Traceback" not in result.stderr
        assert len([line for line in result.stderr.splitlines() if line.startswith("error: ")]) == 1


@pytest.mark.slow
def test_preflight_names_what_is_wrong(run_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Two ranks: a table, and a data set that is not there."""
    (tmp_path / "config.json").write_text(dump_config(run_config()))
    command = [sys.executable, "launcher/node.py", "--nproc-per-node=2", "--master-port=29638", "launcher/preflight.py"]
    command += ["--config", str(tmp_path / "config.json"), "--json", str(tmp_path / "new" / "findings.json")]
    result = run(*command)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "all-reduce over 2 ranks" in result.stdout and result.stdout.splitlines()[1].endswith("ok")
    assert json.loads((tmp_path / "new" / "findings.json").read_text())["ranks"][1]["matmul_tflops"] > 0
    result = run(*command, "data.local=/absent", "text.encoder=/absent")
    assert result.returncode == 1 and "no data set at /absent" in result.stdout and "error: bad nodes:" in result.stderr
    assert "text encoder '/absent' could not be loaded" in result.stdout
