"""Text in, PIL pictures out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from star_dist.data.pictures import to_pil
from star_dist.export import TEXT_ENCODER_FOLDER, load_export_tokenizer, load_model
from star_dist.inference.sampler import SamplingOptions, sample_tokens
from star_dist.model.star import STAR
from star_dist.scales import ScaleSchedule
from star_dist.text import TextEncoder, TextFeatures
from star_dist.tokenizer.vqvae import MultiScaleVQVAE

DEFAULT_OPTIONS = SamplingOptions()


class StarPipeline:
    """A trained model with everything it needs to draw pictures.

    >>> pipeline = StarPipeline.from_pretrained("runs/demo/export")
    >>> pipeline("a red heart", seed=1)[0].save("heart.png")
    """

    def __init__(self, model: STAR, tokenizer: MultiScaleVQVAE, text_encoder: TextEncoder) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self.schedule = ScaleSchedule(model.config.scales)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> StarPipeline:
        """Loads an inference folder. device: a GPU if there is one. dtype: the stored one, fp32 on a CPU.

        Raises:
            UserError: no inference folder there, or a damaged one.
        """
        folder = Path(folder)
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if dtype is None and device.type == "cpu":
            dtype = torch.float32
        config, model = load_model(folder, dtype)
        copied = folder / TEXT_ENCODER_FOLDER
        text = config.text.model_copy(update={"encoder": str(copied)}) if copied.is_dir() else config.text
        tokenizer = load_export_tokenizer(folder, config)
        return cls(model.to(device), tokenizer.to(device), TextEncoder(text, device))

    def __call__(
        self,
        prompts: str | Sequence[str],
        seed: int | Sequence[int] = 0,
        options: SamplingOptions = DEFAULT_OPTIONS,
    ) -> list[Image.Image]:
        """Draws one picture per prompt. seed: one per picture, or a first one that counts up."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        seeds = [seed + i for i in range(len(prompts))] if isinstance(seed, int) else list(seed)
        tokens_BL = self.sample_tokens(self.text_encoder(prompts), options, seeds)
        return to_pil(self.tokenizer.decode(tokens_BL, self.schedule))

    def sample_tokens(self, text: TextFeatures, options: SamplingOptions, seeds: Sequence[int]) -> Tensor:
        """Token maps of one picture per caption; (B, L) int64."""
        empty = self.text_encoder([""])
        return sample_tokens(self.model, self.tokenizer.quantize, text, empty, self.schedule, options, seeds)
