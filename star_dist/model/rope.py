"""Normalized two-dimensional axial rotary position encoding (STAR section 3.3).

d channels of a head, T tokens, H heads. The first half of a head's channels carries the column, the second half the
row; neighbouring channels rotate together. The conventions differ in the coordinates alone.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from star_dist.model.config import RopeConvention, StarConfig
from star_dist.scales import ScaleSchedule

Rotary = tuple[Tensor, Tensor]
"""What `rotate` multiplies a channel and its neighbour by: cosines, and sines that are negative for even channels.

(T, d) float32 each.
"""


def axis_coordinates(side: int, convention: RopeConvention, extent: float) -> Tensor:
    """Coordinates of the cells of one axis of a map; (side,) float32.

    `paper`: i / side * extent for i = 1..side (equation 2). `public`: i / (side - 1) * extent for i = 0..side - 1,
    with a 1x1 map at 0.
    """
    if convention == "paper":
        return torch.arange(1, side + 1, dtype=torch.float32) / side * extent
    return torch.arange(side, dtype=torch.float32) / max(side - 1, 1) * extent


def schedule_rotary(config: StarConfig, schedule: ScaleSchedule) -> Rotary:
    """Rotations of one sample's tokens; (L, d) each."""
    num_frequencies = config.head_dim // 4
    exponents = torch.arange(num_frequencies, dtype=torch.float32) / num_frequencies
    frequencies = config.rope_theta**-exponents
    angles = []
    for side in schedule.sides:
        axis = axis_coordinates(side, config.rope_convention, config.rope_extent)
        row, column = torch.meshgrid(axis, axis, indexing="ij")
        coordinates_N2 = torch.stack([column.flatten(), row.flatten()], dim=1)
        angles.append((coordinates_N2[:, :, None] * frequencies).flatten(1))
    angles_Ld = torch.cat(angles).repeat_interleave(2, dim=-1)
    sines_Ld = angles_Ld.sin()
    sines_Ld[:, ::2].neg_()
    return angles_Ld.cos(), sines_Ld


@lru_cache(maxsize=32)
def packed_rotary(config: StarConfig, schedules: tuple[ScaleSchedule, ...], device: torch.device) -> Rotary:
    """Rotations of all tokens of a packed batch; (T, d) each."""
    with torch.device("cpu"):
        tables = {schedule: schedule_rotary(config, schedule) for schedule in set(schedules)}
    cosines = torch.cat([tables[schedule][0] for schedule in schedules])
    sines = torch.cat([tables[schedule][1] for schedule in schedules])
    return cosines.to(device), sines.to(device)


def rotate(x_THd: Tensor, rotary: Rotary) -> Tensor:
    """Rotates channel pairs by each token's angles; (…, T, H, d) float32 or better.

    Every channel is written at its own place: even and odd ones apart, then interleaved, take two to three times as
    long, and torch.compile puts them into memory in float32 on the way.
    """
    cosines, sines = (table.unsqueeze(-2) for table in rotary)
    neighbours_THd = x_THd.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return x_THd * cosines + neighbours_THd * sines
