"""A run under one ZeRO setting after another: pictures/s, memory and step time, side by side.

    python benchmarks/zero.py [--quick] [--config FILE] [--ranks 2] [--steps 60] [--json FILE] [NAME=OVERRIDES …]

Every setting trains the config's run from its start for --steps steps, in a folder that is thrown away, under torchrun
with --ranks processes (default: one per GPU, 2 on a CPU), at the full learning rate from the first one on; the second
half of the steps counts. A setting that fails, such as for lack of memory, is a row that says so. Without
NAME=OVERRIDES the settings of SETTINGS are compared, of which DeepSpeed's documentation says more:
https://www.deepspeed.ai/docs/config-json/#zero-optimizations-for-fp16-training. A setting of your own:
stage2="train.zero_stage=2 train.micro_batch=16".
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from measure import at_least, chosen_device, print_table, write_json
from tqdm import tqdm

from star_dist.cli import command_parser, run_command
from star_dist.errors import UserError

ROOT = Path(__file__).parents[1]
ZERO = "deepspeed.zero_optimization"
SETTINGS = {
    "3": "",
    "2": "train.zero_stage=2",
    "1": "train.zero_stage=1",
    "0": "train.zero_stage=0",
    "3, nothing kept whole": f"{ZERO}.stage3_param_persistence_threshold=0",
    "3, nothing gathered ahead": f"{ZERO}.stage3_prefetch_bucket_size=0",
    "3, gathered once": f"{ZERO}.stage3_max_live_parameters={10**10} {ZERO}.stage3_max_reuse_distance={10**10}",
    "3, overlap_comm off": f"{ZERO}.overlap_comm=false",
}
MULTI_GPU_SETTINGS = {
    "3, hpZ on each node": f"{ZERO}.zero_hpz_partition_size={max(torch.cuda.device_count(), 1)}",
    "2, overlap_comm": f"train.zero_stage=2 {ZERO}.overlap_comm=true",
}
REPORTS = 10  # of which the second half counts


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "demo.json", metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="20 steps of the first setting")
    parser.add_argument("--ranks", type=at_least(1), metavar="N")
    parser.add_argument("--steps", type=at_least(2 * REPORTS), default=60, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("settings", nargs="*", metavar="NAME=OVERRIDES")
    arguments = parser.parse_args()
    device = chosen_device()
    ranks = arguments.ranks or (torch.cuda.device_count() if device.type == "cuda" else 2)
    settings = dict(setting.split("=", 1) for setting in arguments.settings if "=" in setting)
    if len(settings) < len(arguments.settings):
        raise UserError("a setting is NAME=OVERRIDES, for example stage2=train.zero_stage=2")
    if not settings:
        settings = SETTINGS | (MULTI_GPU_SETTINGS if device.type == "cuda" else {})
    if arguments.quick:
        settings, arguments.steps = dict([next(iter(settings.items()))]), 2 * REPORTS
    rows = []
    for name, overrides in tqdm(settings.items(), unit="setting"):
        rows.append({"setting": name} | measure(arguments.config, overrides.split(), ranks, arguments.steps))
    measured = [row for row in rows if "failed" not in row]
    if not measured:
        raise UserError(f"no setting could be measured; {rows[0]['setting']}: {rows[0]['failed']}")
    for row in measured if measured[0] is rows[0] else ():
        row["of the first"] = row["pictures/s"] / rows[0]["pictures/s"]
    print_table(f"{arguments.config.name}, {ranks} ranks, {arguments.steps} steps, {device.type}", rows)
    write_json(arguments.json, device, {"zero": rows, "config": arguments.config.name, "ranks": ranks})


def measure(config: Path, overrides: list[str], ranks: int, steps: int) -> dict[str, Any]:
    """Pictures/s, seconds per step and peak memory of rank 0; why it failed where the training did."""
    every = steps // REPORTS
    quiet = ["validation.every=0", "samples.every=0", f"checkpoint.every={steps}", "logging.wandb=off"]
    quiet += ["optimizer.warmup_steps=0"]  # a config's own is longer than this training
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--master-port=29650"]
        command += ["launcher/train.py", "--config", str(config.resolve()), f"run_dir={folder}/run"]
        command += [f"train.steps={steps}", f"logging.every={every}", *quiet, *overrides]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if result.returncode != 0:
            reasons = re.findall(r"(?:\berror|Error): .+", result.stderr)
            return {"failed": reasons[0].partition(": ")[2] if reasons else f"exit code {result.returncode}"}
        reports = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    counted = [report for report in reports if "throughput/images_per_s" in report][REPORTS // 2 :]
    return {
        "pictures/s": statistics.median(report["throughput/images_per_s"] for report in counted),
        "step s": statistics.median(report["time/step_s"] for report in counted),
        "peak GiB": max(report["memory/peak_bytes"] for report in counted) / 2**30,
    }


if __name__ == "__main__":
    run_command(main)
