"""How samples of one or of several resolutions lie one after another in a packed batch, without padding.

T image tokens of the batch, S text tokens of the batch, B samples, L tokens of one sample. Everything here is known on
the CPU before the batch reaches the device, so no kernel has to read lengths back.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, groupby

import torch
from torch import Tensor

from star_dist.scales import ScaleSchedule


@dataclass(frozen=True)
class UniformRun:
    """Neighbouring samples of one schedule: they can be viewed as one (count, L) rectangle."""

    schedule: ScaleSchedule
    first_sample: int
    count: int
    first_token: int

    @property
    def tokens(self) -> slice:
        return slice(self.first_token, self.first_token + self.count * self.schedule.num_tokens)

    @property
    def samples(self) -> slice:
        return slice(self.first_sample, self.first_sample + self.count)


@dataclass(frozen=True)
class PackedLayout:
    """schedules: of every sample. text_lengths: text tokens of every sample (none where the model takes no text)."""

    schedules: tuple[ScaleSchedule, ...]
    text_lengths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.text_lengths and len(self.text_lengths) != len(self.schedules):
            raise ValueError(f"{len(self.schedules)} samples but {len(self.text_lengths)} text lengths")

    @classmethod
    def uniform(cls, schedule: ScaleSchedule, batch: int, text_lengths: tuple[int, ...] = ()) -> PackedLayout:
        return cls((schedule,) * batch, text_lengths)

    @property
    def num_samples(self) -> int:
        return len(self.schedules)

    @property
    def num_tokens(self) -> int:
        return sum(schedule.num_tokens for schedule in self.schedules)

    @cached_property
    def runs(self) -> tuple[UniformRun, ...]:
        runs, first_sample, first_token = [], 0, 0
        for schedule, members in groupby(self.schedules):
            runs.append(UniformRun(schedule, first_sample, len(list(members)), first_token))
            first_sample += runs[-1].count
            first_token = runs[-1].tokens.stop
        return tuple(runs)

    @cached_property
    def text_starts(self) -> tuple[int, ...]:
        return (0, *accumulate(self.text_lengths))[:-1]

    def token_offsets(self, device: torch.device) -> Tensor:
        """Where every sample's image tokens start, and their end; (B + 1,) int32."""
        return _token_offsets(self.schedules, device)

    def text_offsets(self, device: torch.device) -> Tensor:
        """Where every sample's text tokens start, and their end; (B + 1,) int32."""
        return copy_to_device(torch.tensor((*self.text_starts, sum(self.text_lengths)), dtype=torch.int32), device)

    def first_tokens(self, device: torch.device) -> Tensor:
        """Position of every sample's start token; (B,) int64."""
        return _first_tokens(self.schedules, device)

    def scale_ids(self, device: torch.device) -> Tensor:
        """Index of the scale that every token belongs to; (T,) int64."""
        return _scale_ids(self.schedules, device)

    def positions(self, device: torch.device) -> Tensor:
        """Index of every token within its sample; (T,) int64."""
        return _positions(self.schedules, device)


def copy_to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy of a tensor on the CPU that the host does not wait for."""
    if device.type == "cpu":
        return tensor
    if torch.cuda.is_available():
        tensor = tensor.pin_memory()  # of other memory the copy waits for all work that is queued before it
    return tensor.to(device, non_blocking=True)


@lru_cache(maxsize=32)
def _token_offsets(schedules: tuple[ScaleSchedule, ...], device: torch.device) -> Tensor:
    lengths = (schedule.num_tokens for schedule in schedules)
    return copy_to_device(torch.tensor((0, *accumulate(lengths)), dtype=torch.int32), device)


@lru_cache(maxsize=32)
def _first_tokens(schedules: tuple[ScaleSchedule, ...], device: torch.device) -> Tensor:
    return _token_offsets(schedules, device)[:-1].long()


@lru_cache(maxsize=32)
def _scale_ids(schedules: tuple[ScaleSchedule, ...], device: torch.device) -> Tensor:
    ids = [torch.repeat_interleave(torch.tensor(schedule.lengths)) for schedule in schedules]
    return copy_to_device(torch.cat(ids), device)


@lru_cache(maxsize=32)
def _positions(schedules: tuple[ScaleSchedule, ...], device: torch.device) -> Tensor:
    return copy_to_device(torch.cat([torch.arange(schedule.num_tokens) for schedule in schedules]), device)
