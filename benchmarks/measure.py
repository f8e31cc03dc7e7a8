"""What all benchmarks share: timing, memory, one table on the terminal and one JSON file for scripts."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from star_dist.environment import describe_environment

# Else PyTorch's profiler writes lines of its own between the progress bar's. It is read at the first profile.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def at_least(least: int) -> Callable[[str], int]:
    """`type=` of an option that takes a whole number from `least` on."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {text}")
        return value

    return number


def chosen_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """The GPU's name, or how many threads of the CPU are used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} thread(s)"


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_seconds(
    function: Callable[[], Any],
    device: torch.device,
    repeats: int,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Median duration of a call, each waited for. clock: wall time, or `time.process_time` on a shared CPU."""
    for _ in range(warmup):
        function()
    durations = []
    for _ in range(repeats):
        wait_for(device)
        start = clock()
        function()
        wait_for(device)
        durations.append(clock() - start)
    return statistics.median(durations)


def peak_bytes(function: Callable[[], Any], device: torch.device) -> int:
    """Most memory that a call holds at once beyond what was held before."""
    if device.type == "cuda":
        wait_for(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        wait_for(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    held = most = 0
    events = (event for event in record.profiler.kineto_results.events() if event.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def profiled(function: Callable[[], Any], device: torch.device) -> profile:
    """A call's kernels on a GPU, its operators on a CPU."""
    wait_for(device)
    with profile(activities=[ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU]) as record:
        function()
        wait_for(device)
    return record


def kernel_seconds(function: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median time of a call's GPU kernels, without the gaps in which a slow host has not yet launched the next."""
    records = [profiled(function, device) for _ in range(repeats)]
    times = [sum(event.self_device_time_total for event in record.key_averages()) for record in records]
    return statistics.median(times) / 1e6


def fill_with_noise(model: nn.Module) -> None:
    """Random values for all parameters, drawn where they are: `initialize_weights` draws on the CPU, for minutes."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)


def print_table(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Rows as one aligned table, empty where a row lacks what others have; floats with four significant digits."""
    if not rows:
        return
    heads = list(dict.fromkeys(head for row in rows for head in row))
    cells = [heads, *([_shown(row.get(head)) for head in heads] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(heads))]
    print(f"\n{title}")
    for i, line in enumerate(cells):
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
        if i == 0:
            print("  ".join("-" * width for width in widths))


def write_json(path: Path | None, device: torch.device, tables: dict[str, Any]) -> None:
    """All tables with the environment they were measured in."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = describe_environment() | {"device": device_name(device)}
    path.write_text(json.dumps({"environment": facts} | tables, indent=2) + "\n")
    print(f"\nwritten to {path}")


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)
