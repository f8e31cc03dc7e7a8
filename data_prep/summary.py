"""What a partition's worker says at its end."""

from __future__ import annotations

from dataclasses import dataclass

from data_prep.job import Manifest


@dataclass(frozen=True)
class Summary:
    """read, kept, rejected: of the whole partition. samples: by resolution and split. bytes: of all files written.

    items_now, seconds: of this run, which may have gone on after another. stages: seconds by what they were spent on;
    those of all threads overlap the others.
    """

    place: str
    read: int
    kept: int
    rejected: dict[str, int]
    too_small: dict[str, int]
    samples: dict[str, dict[str, int]]
    bytes: int
    items_now: int
    seconds: float
    stages: dict[str, float]

    @classmethod
    def of(cls, manifest: Manifest, *, items_now: int, seconds: float, stages: dict[str, float], place: str) -> Summary:
        return cls(
            place=place,
            read=manifest.read,
            kept=manifest.kept,
            rejected=manifest.rejected,
            too_small=manifest.too_small,
            samples=manifest.samples,
            bytes=sum(file.bytes for file in manifest.files.values()),
            items_now=items_now,
            seconds=seconds,
            stages=stages,
        )

    @property
    def pictures_per_s(self) -> float:
        """Items read per second of this run."""
        return self.items_now / self.seconds

    def __str__(self) -> str:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in self.rejected.items()) or "none"
        rate = f"{self.pictures_per_s:.1f} pictures/s ({self.items_now} in {self.seconds:.1f} s)"
        lines = [
            f"{self.place}: read {self.read}, kept {self.kept}, rejected {self.read - self.kept} ({reasons}), "
            f"{self.bytes / 1e6:.1f} MB, {rate}"
        ]
        for resolution, counts in self.samples.items():
            left_out = self.too_small.get(resolution, 0)
            splits = ", ".join(f"{split}: {count}" for split, count in counts.items())
            lines.append(f"  {resolution} pixels: {splits}" + (f"; too small: {left_out}" if left_out else ""))
        return "\n".join(lines)
