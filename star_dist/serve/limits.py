"""What one server lets its users ask for. Imports neither torch nor pydantic, so that `--help` answers at once."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """pictures: drawn by one job, so that a batch fits the memory. prompt_letters: of each prompt. waiting: jobs in the
    queue besides the one that is drawn. kept, kept_bytes: finished jobs whose pictures stay in memory, and how much of
    it those of all jobs may take; those that were drawn last stay in any case. body_bytes: of a request."""

    pictures: int = 16
    prompt_letters: int = 1000
    waiting: int = 16
    kept: int = 100
    kept_bytes: int = 10**9
    body_bytes: int = 256 * 1024
