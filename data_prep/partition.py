"""Partitions of a job: which part of a source one worker takes, by a rule that depends on nothing but i and N."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from star_dist.errors import UserError


@dataclass(frozen=True)
class Partition:
    """Part `index`, counted from 0, of `count`."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Partition:
        """Reads `i/N`.

        Raises:
            UserError: another form, or i is not in 0 … N-1.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None:
            raise UserError(f"--partition is i/N with i counted from 0, such as 3/64, got {text!r}")
        index, count = map(int, match.groups())
        if index >= count:
            raise UserError(
                f"--partition {text}: i is counted from 0 and must be below N; the last is {count - 1}/{count}"
            )
        return cls(index, count)

    @property
    def name(self) -> str:
        """A folder name that sorts by index."""
        return f"{self.index:05}-of-{self.count:05}"

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def of(self, units: Sequence[str]) -> Sequence[str]:
        """Every count-th unit of a source, from the index-th on.

        Raises:
            UserError: there are fewer units than partitions, so that some would be empty.
        """
        if self.count > len(units):
            raise UserError(
                f"--partition {self} asks for {self.count} partitions of a source of {len(units)} units (pictures of a "
                f"folder, or tar or Parquet files); ask for at most {len(units)}"
            )
        return units[self.index :: self.count]
