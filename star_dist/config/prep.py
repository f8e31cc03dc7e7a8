"""Configuration of data preparation: `python -m data_prep.tokenize --config FILE`, `data_prep.caption`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from star_dist.config.base import Count, Endpoint, LocalFolder, Name, Positive, Section
from star_dist.config.run import TextSection
from star_dist.scales import ScaleSchedule


class StorageSection(Section):
    """An S3 store other than Amazon's. null: the environment's (S3_ENDPOINT_URL, AWS_DEFAULT_REGION)."""

    endpoint: Endpoint | None = None
    region: str | None = None


class ResolutionSection(Section):
    """One resolution of the data set, in pixels, with its schedule of token maps.

    min_side: smaller pictures are left out of this resolution alone. batch: null takes the job's.
    """

    resolution: Positive
    scales: tuple[Positive, ...]
    min_side: Count = 0
    batch: Positive | None = None

    @model_validator(mode="after")
    def _scales_are_a_schedule(self) -> ResolutionSection:
        _ = self.schedule
        return self

    @property
    def schedule(self) -> ScaleSchedule:
        return ScaleSchedule(self.scales)


class PrepConfig(Section):
    """One tokenization job: a source of captioned pictures to an MDS data set (`python -m data_prep.tokenize`).

    source: `{"kind": …, …}`, what `data_prep/sources/KIND.py` takes. output: a folder or `s3://bucket/prefix`.
    work: a folder for what is not finished, on a cluster one that all nodes see; null takes `OUTPUT.work` (required
    where the output is on S3).
    resolution and scales, or resolutions: one data set at `output`, or one at `output/RESOLUTION` for each.
    validation_fraction: pictures held out, chosen by a hash of their key, so that the choice never depends on order.
    text_features: also store the features of this text encoder; null stores captions alone.
    batch: pictures that the tokenizer takes at once. chunk: pictures after which a killed job goes on.
    min_side, max_aspect (longer side over shorter), min_caption_chars, max_caption_chars: pictures beyond are left out.
    min_scores: least values of the source's score columns, such as `{"aesthetic": 5.0}`.
    """

    source: dict[str, Any]
    output: Name
    work: LocalFolder | None = None
    storage: StorageSection = StorageSection()
    tokenizer: Name
    resolution: Positive | None = None
    scales: tuple[Positive, ...] | None = None
    resolutions: tuple[ResolutionSection, ...] = ()
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    text_features: TextSection | None = None
    batch: Positive = 64
    chunk: Positive = 4096
    min_side: Count = 0
    max_aspect: Annotated[float, Field(ge=1)] | None = None
    min_caption_chars: Positive = 1
    max_caption_chars: Positive = 2000
    min_scores: dict[str, float] = {}
    shard_size_bytes: Annotated[int, Field(gt=0, lt=2**32)] = 64 * 2**20  # MDS has offsets of 32 bits
    attribution: str = ""

    @model_validator(mode="after")
    def _sections_fit_together(self) -> PrepConfig:
        if self.resolutions and (self.resolution is not None or self.scales is not None):
            raise ValueError("resolutions is given beside resolution or scales; give one of the two forms")
        if not self.resolutions and (self.resolution is None or self.scales is None):
            raise ValueError("resolution and scales are missing; give both, or resolutions")
        sides = [section.resolution for section in self.all_resolutions]
        if len(set(sides)) < len(sides):
            raise ValueError(f"resolutions has {sides}; give each resolution once")
        if self.min_caption_chars > self.max_caption_chars:
            raise ValueError(
                f"min_caption_chars {self.min_caption_chars} is more than max_caption_chars {self.max_caption_chars}; "
                f"change one of them"
            )
        return self

    @property
    def all_resolutions(self) -> tuple[ResolutionSection, ...]:
        """Whichever form the config has, smallest first."""
        if self.resolutions:
            return tuple(sorted(self.resolutions, key=lambda section: section.resolution))
        return (ResolutionSection(resolution=self.resolution, scales=self.scales),)

    def folder_of(self, resolution: int) -> str:
        """Where a resolution's data set lies under the output, with a slash at its end; empty for the output itself."""
        return f"{resolution}/" if self.resolutions else ""


class CaptionConfig(Section):
    """One re-captioning job (`python -m data_prep.caption`): a source of pictures to another named caption of each.

    model: a Hugging Face id or folder of an image-to-text or vision-language model.
    name: of the new captions, by which a tokenization job's source.recaptions finds them. output: a folder or `s3://…`.
    prompt: what the model is asked; null for models that take a picture alone.
    side: longer side in pixels that pictures are shrunk to before the model's own processing.
    """

    source: dict[str, Any]
    output: Name
    work: LocalFolder | None = None
    storage: StorageSection = StorageSection()
    model: Name
    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")] = "recaptioned"
    prompt: str | None = None
    batch: Positive = 16
    max_new_tokens: Positive = 256
    side: Positive = 1024
