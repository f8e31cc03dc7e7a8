"""Configuration of a tokenization job: `python -m data_prep.tokenize --config FILE`."""

from __future__ import annotations

from typing import Any

from pydantic import model_validator

from star_dist.config.base import Count, Fraction, Positive, Section
from star_dist.config.run import TextSection
from star_dist.scales import ScaleSchedule


class PrepConfig(Section):
    """One tokenization job: a source of captioned pictures to an MDS data set (`python -m data_prep.tokenize`).

    validation_fraction: pictures held out, chosen by a hash of their key, so that the choice never depends on order.
    text_features: also store the features of this text encoder; null stores captions alone.
    """

    source: dict[str, Any]
    output: str
    tokenizer: str
    resolution: Positive
    scales: tuple[Positive, ...]
    validation_fraction: Fraction = 0.0
    text_features: TextSection | None = None
    batch: Positive = 64
    min_side: Count = 0
    max_caption_chars: Positive = 2000
    shard_size_bytes: Positive = 64 * 2**20
    attribution: str = ""

    @model_validator(mode="after")
    def _scales_are_a_schedule(self) -> PrepConfig:
        _ = self.schedule
        return self

    @property
    def schedule(self) -> ScaleSchedule:
        return ScaleSchedule(self.scales)
