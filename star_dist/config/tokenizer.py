"""Configuration of a tokenizer training: `launcher/train_tokenizer.py --config FILE`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from star_dist.config.base import Count, Fraction, LocalFolder, Momentum, Positive, Section, Seed
from star_dist.scales import ScaleSchedule
from star_dist.tokenizer.config import VQVAEConfig

# The convolutions of the discriminator (star_dist/tokenizer/losses.py), which decide what it can judge.
DISCRIMINATOR_KERNEL = 4
DISCRIMINATOR_PADDING = 1
DISCRIMINATOR_STRIDES = (2, 2, 2, 1, 1)


class TokenizerLossSection(Section):
    """Weights of the tokenizer's losses. perceptual and adversarial are off at 0.

    vgg16_weights: torchvision's VGG-16 state dict for the perceptual term. adversarial_start: first step at which the
    discriminator's judgement reaches the decoder.
    """

    l1: float = Field(1.0, ge=0)
    l2: float = Field(1.0, ge=0)
    commitment: float = Field(0.25, ge=0)
    perceptual: float = Field(0.0, ge=0)
    vgg16_weights: str | None = None
    adversarial: float = Field(0.0, ge=0)
    adversarial_start: Count = 0


class TokenizerDataSection(Section):
    """A folder of pictures, taken with all its sub-folders.

    keep_in_memory: every rank's loader workers (or the rank itself, with `num_workers` 0) decode a picture only once,
    and each keeps copies of its own.
    """

    pictures: LocalFolder
    num_workers: Count = 2
    keep_in_memory: bool = False
    horizontal_flip: bool = True


class TokenizerTrainConfig(Section):
    """One training run of the multi-scale VQ-VAE.

    muon_learning_rate: peak rate of Muon, which then trains the inner convolutions; null trains everything with AdamW
    at `learning_rate`. restart_codes_every: steps between moving unused codes onto cells of the current batch, 0 for
    never. omp_threads: CPU threads of each rank; null leaves the launcher's choice.
    """

    run_dir: LocalFolder
    seed: Seed = 0
    resolution: Positive
    tokenizer: VQVAEConfig
    data: TokenizerDataSection
    loss: TokenizerLossSection = TokenizerLossSection()
    steps: Positive
    global_batch: Positive
    precision: Literal["bf16", "fp32"] = "fp32"
    learning_rate: float = Field(gt=0)
    muon_learning_rate: float | None = Field(None, gt=0)
    final_fraction: Fraction = 0.02
    warmup_steps: Count = 50
    betas: tuple[Momentum, Momentum] = (0.9, 0.95)
    weight_decay: float = Field(0.01, ge=0)
    gradient_clipping: float = Field(1.0, gt=0)
    restart_codes_every: Count = 0
    checkpoint_every: Positive = 500
    log_every: Positive = 50
    sample_pictures: Count = 32
    omp_threads: Positive | None = None

    @model_validator(mode="after")
    def _sizes_fit_together(self) -> TokenizerTrainConfig:
        resolution = self.schedule.resolution(self.tokenizer.downsampling)
        if resolution != self.resolution:
            raise ValueError(
                f"resolution {self.resolution} is not the last of tokenizer.scales ({self.schedule.latent_side}) x the "
                f"downsampling of {len(self.tokenizer.channel_multipliers)} tokenizer.channel_multipliers "
                f"({self.tokenizer.downsampling}) = {resolution}; change one of them"
            )
        if self.loss.perceptual and self.loss.vgg16_weights is None:
            raise ValueError(f"loss.perceptual is {self.loss.perceptual} but loss.vgg16_weights is null; give the file")
        if self.loss.adversarial and self.resolution < least_judged_side():
            raise ValueError(
                f"loss.adversarial is {self.loss.adversarial}, but its discriminator judges pictures of "
                f"{least_judged_side()} pixels and more, and resolution is {self.resolution}; set loss.adversarial to "
                f"0, or train at a larger resolution"
            )
        return self

    @property
    def schedule(self) -> ScaleSchedule:
        return ScaleSchedule(self.tokenizer.scales)


def least_judged_side() -> int:
    """Side of the smallest picture that the discriminator gives one judgement of."""
    side = 1
    for stride in reversed(DISCRIMINATOR_STRIDES):
        side = (side - 1) * stride + DISCRIMINATOR_KERNEL - 2 * DISCRIMINATOR_PADDING
    return side
