"""Text in, PIL pictures out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from star_dist.data.pictures import to_pil
from star_dist.errors import UserError
from star_dist.export import (
    DTYPES,
    TEXT_ENCODER_FOLDER,
    ExportConfig,
    fetch_inference_folder,
    load_export_tokenizer,
    load_model,
    write_inference_folder,
)
from star_dist.inference.options import SamplingOptions
from star_dist.inference.sampler import KnownTokens, SampledPictures, SampledScale, sample_pictures
from star_dist.model.star import STAR
from star_dist.scales import ScaleSchedule
from star_dist.text import TextEncoder
from star_dist.tokenizer.io import tokenizer_hash
from star_dist.tokenizer.vqvae import MultiScaleVQVAE

DEFAULT_OPTIONS = SamplingOptions()


@dataclass(frozen=True)
class ScalePreview:
    """scale of num_scales is drawn; `pictures` decodes what there is so far, only when it is called."""

    scale: int
    num_scales: int
    pictures: Callable[[], list[Image.Image]]


class StarPipeline:
    """A trained model with everything it needs to draw pictures.

    >>> pipeline = StarPipeline.from_pretrained("runs/demo/export")
    >>> pipeline("a red heart", seed=1)[0].save("heart.png")

    origin: which run the weights are from, where they come from a folder.
    """

    def __init__(
        self, model: STAR, tokenizer: MultiScaleVQVAE, text_encoder: TextEncoder, origin: ExportConfig | None = None
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self.origin = origin
        self.schedule = ScaleSchedule(model.config.scales)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
    ) -> StarPipeline:
        """Loads an inference folder, or a Hugging Face model id that has one.

        device: a GPU if there is one. dtype: the stored one, fp32 on a CPU. revision: of the id, a branch or commit.

        Raises:
            UserError: no inference folder there, or a damaged one.
        """
        folder = fetch_inference_folder(source, revision)
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if dtype is None and device.type == "cpu":
            dtype = torch.float32
        config, model = load_model(folder, dtype)
        copied = folder / TEXT_ENCODER_FOLDER
        text = config.text.model_copy(update={"encoder": str(copied)}) if copied.is_dir() else config.text
        tokenizer = load_export_tokenizer(folder, config)
        return cls(model.to(device), tokenizer.to(device), TextEncoder(text, device), config)

    def save_pretrained(self, folder: str | Path, dtype: Literal["bf16", "fp32"] | None = None) -> None:
        """Writes an inference folder that `from_pretrained` reads. dtype: of the transformer; null keeps it.

        Raises:
            UserError: the folder holds something else than an earlier inference folder.
        """
        names = {stored: name for name, stored in DTYPES.items()}
        weights = {name: parameter.detach().cpu() for name, parameter in self.model.named_parameters()}
        write_inference_folder(
            Path(folder),
            weights,
            ExportConfig(
                model=self.model.config,
                text=self.text_encoder.config,
                tokenizer_hash=tokenizer_hash(self.tokenizer),
                resolution=self.resolution,
                dtype=dtype or names[self.model.word_embed.weight.dtype],
                run_name=self.origin.run_name if self.origin else "star",
                step=self.origin.step if self.origin else 0,
                facts=self.origin.facts if self.origin else {},
            ),
            self.tokenizer,
        )

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> StarPipeline:
        """Moves everything to a device; dtype is the transformer's alone (tokens need the tokenizer in float32)."""
        device = torch.device(device) if device is not None else self.device
        if dtype is not None and dtype not in DTYPES.values():
            raise UserError(f"the pipeline runs in torch.bfloat16 or torch.float32, got {dtype}")
        self.model.to(device, dtype)
        self.tokenizer.to(device)
        self.text_encoder.to(device)
        return self

    @property
    def device(self) -> torch.device:
        return self.model.word_embed.weight.device

    @property
    def resolution(self) -> int:
        """Side of the pictures in pixels."""
        return self.schedule.resolution(self.tokenizer.config.downsampling)

    def __call__(
        self,
        prompts: str | Sequence[str],
        seed: int | Sequence[int] = 0,
        options: SamplingOptions = DEFAULT_OPTIONS,
        *,
        known: KnownTokens | None = None,
        on_scale: Callable[[ScalePreview], None] | None = None,
    ) -> list[Image.Image]:
        """Draws one picture per prompt.

        seed: one per picture, or a first one that counts up. known: what to keep of a picture (editing.py).
        on_scale: called after every scale; what it raises ends the drawing.

        Raises:
            UserError: not one seed per prompt, or options for another number of scales.
        """

        def preview(drawn: SampledScale) -> None:
            on_scale(ScalePreview(drawn.scale, drawn.num_scales, lambda: self.decode(drawn.latent_BCHH)))

        return self.decode(
            self.sample(prompts, seed, options, known=known, on_scale=preview if on_scale else None).latent_BCHH
        )

    def sample(
        self,
        prompts: str | Sequence[str],
        seed: int | Sequence[int] = 0,
        options: SamplingOptions = DEFAULT_OPTIONS,
        *,
        known: KnownTokens | None = None,
        on_scale: Callable[[SampledScale], None] | None = None,
    ) -> SampledPictures:
        """Tokens and latents in place of pictures; see `__call__`."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        seeds = [seed + i for i in range(len(prompts))] if isinstance(seed, int) else list(seed)
        text, empty = self.text_encoder(prompts), self.text_encoder([""])
        return sample_pictures(
            self.model, self.tokenizer.quantize, text, empty, self.schedule, options, seeds, known=known,
            on_scale=on_scale,
        )  # fmt: skip

    def decode(self, latent_BCHH: Tensor) -> list[Image.Image]:
        """Pictures of latents; (B, C, H, H)."""
        return to_pil(self.tokenizer.decode_quantized(latent_BCHH))
