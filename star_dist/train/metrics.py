"""What a run reports: metrics.jsonl always, Weights & Biases by choice, and a progress bar with the remaining time."""

from __future__ import annotations

import json
import re
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from star_dist.config import RunConfig, dump_config
from star_dist.errors import Unavailable, UserError, first_line
from star_dist.files import append_json_line, training_goes_on
from star_dist.run_folder import METRICS_FILE, keep_metrics_up_to
from star_dist.train.gpu_peaks import GPU_PEAK_TFLOPS

GPU_MATMUL_SIDE = 8192  # large enough for a GPU's full rate

# The training's step as a value of its own: W&B's counter only grows, and drops what comes again after a rollback.
WANDB_STEP = "step"


class MetricsLog:
    """Writes one line per report on rank 0; on other ranks it does nothing.

    Lines of steps after `first_step` are removed when it opens: they were trained after the checkpoint that the run
    goes on from, and will be trained again.
    """

    def __init__(self, config: RunConfig, run_dir: Path, first_step: int, *, enabled: bool) -> None:
        self.enabled = enabled
        if not enabled:
            return
        self.run_dir = run_dir
        keep_metrics_up_to(first_step, run_dir)
        self.bar = tqdm(
            total=config.train.steps,
            initial=first_step,
            unit="step",
            desc=f"train {config.name}",
            mininterval=0.5 if sys.stderr.isatty() else 15,
        )
        self.wandb = _start_wandb(config, run_dir)

    def go_back(self, step: int) -> None:
        """Forgets the reports of later steps, which come again."""
        if self.enabled:
            with training_goes_on(self.run_dir / METRICS_FILE):
                keep_metrics_up_to(step, self.run_dir)
            self.bar.n = step
            self.bar.refresh()

    def advance(self) -> None:
        if self.enabled:
            self.bar.update()

    def report(self, step: int, values: dict[str, float | None]) -> None:
        if not self.enabled:
            return
        append_json_line(self.run_dir / METRICS_FILE, {"step": step, **values})
        if "loss/total" in values:
            self.bar.set_postfix(
                loss=f"{values['loss/total']:.3f}",
                images_per_s=f"{values['throughput/images_per_s']:.1f}",
                refresh=False,
            )
        if self.wandb is not None:
            self.wandb.log({WANDB_STEP: step, **values})

    def report_picture(self, step: int, name: str, path: Path) -> None:
        if self.enabled and self.wandb is not None:
            import wandb

            self.wandb.log({WANDB_STEP: step, name: wandb.Image(str(path))})

    def say(self, text: str) -> None:
        """One line for people, above the progress bar."""
        if self.enabled:
            self.bar.write(text, file=sys.stderr)

    def close_bar(self) -> None:
        """Leaves its line, so that what is said last stands on one of its own."""
        if self.enabled:
            self.bar.close()

    def finish(self) -> None:
        """The run is trained to its end. W&B notes by itself where it ends before, and with which exit code."""
        if self.enabled and self.wandb is not None:
            self.wandb.finish()


def peak_flops(config: RunConfig, device: torch.device) -> tuple[float, str]:
    """FLOP/s that MFU is measured against, and where the number comes from."""
    if config.logging.peak_tflops is not None:
        return config.logging.peak_tflops * 1e12, "logging.peak_tflops"
    return device_peak_flops(device)


def device_peak_flops(device: torch.device) -> tuple[float, str]:
    """Dense bf16 peak of a GPU by its data sheet, where there is one in the table, else (also on a part of one, by MIG)
    what a product reaches here: of bf16 on a GPU, of float32 on a CPU.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for gpu, tflops in GPU_PEAK_TFLOPS.items():
            if re.search(rf"\b{gpu}\b(?!.*\bMIG\b)", name):  # "A100" is in "RTX A1000", too
                return tflops * 1e12, f"data sheet of {gpu}"
        return measured_matmul_flops(device, GPU_MATMUL_SIDE, dtype=torch.bfloat16), "measured bf16 matrix product"
    return measured_matmul_flops(device), "measured float32 matrix product"


def measured_matmul_flops(
    device: torch.device,
    size: int = 1024,
    repeats: int = 5,
    dtype: torch.dtype = torch.float32,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """FLOP/s of a square matrix product on this process's device. clock: wall time, or `time.process_time`."""
    a = torch.randn(size, size, device=device, dtype=dtype)
    torch.mm(a, a).sum().item()
    start = clock()
    for _ in range(repeats):
        product = torch.mm(a, a)
    product.sum().item()
    return repeats * 2 * size**3 / (clock() - start)


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held at once: of the GPU's allocator, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _start_wandb(config: RunConfig, run_dir: Path) -> Any:
    if config.logging.wandb == "off":
        return None
    import wandb

    identity = run_dir / "wandb_id"  # one run folder is one run there, however often it was restarted
    if not identity.is_file():
        identity.write_text(uuid.uuid4().hex[:12])
    try:
        run = wandb.init(
            project=config.logging.wandb_project,
            name=config.name,
            id=identity.read_text(),
            resume="allow",
            dir=str(run_dir),
            mode=config.logging.wandb,
            config=json.loads(dump_config(config)),
        )
    except wandb.Error as error:
        reason = first_line(error)
        unreachable = isinstance(error, wandb.errors.CommError)
        if unreachable and not isinstance(error, wandb.errors.AuthenticationError):
            raise Unavailable(f"Weights & Biases: {reason}; start again, or set logging.wandb to offline") from None
        raise UserError(f"Weights & Biases: {reason}; log in, or set logging.wandb to offline or off") from None
    run.define_metric("*", step_metric=WANDB_STEP)
    return run
