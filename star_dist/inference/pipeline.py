"""Text in, PIL pictures out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import index
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from star_dist.data.pictures import to_pil
from star_dist.device import find_device
from star_dist.errors import UserError
from star_dist.export import (
    DTYPES,
    TEXT_ENCODER_FOLDER,
    ExportConfig,
    fetch_inference_folder,
    load_export_tokenizer,
    load_model,
    load_public_extras,
    write_inference_folder,
)
from star_dist.inference.acceleration import RecordedModel
from star_dist.inference.cached_model import CachedModel, ScaleLogits
from star_dist.inference.graphs import CudaGraphRecorder, Recorder
from star_dist.inference.options import SamplingOptions
from star_dist.inference.sampler import KnownTokens, SampledPictures, SampledScale, sample_pictures
from star_dist.model.block_functions import PLAIN, compiled_functions
from star_dist.model.compiling import compiler_problem
from star_dist.model.star import STAR
from star_dist.scales import ScaleSchedule
from star_dist.text import TextEncoder
from star_dist.tokenizer.io import tokenizer_hash
from star_dist.tokenizer.pixels import PixelDecoder
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

    origin: which run the weights are from, where they come from a folder. public_extras: kept for `save_pretrained`,
    see `public_layout.py`.
    """

    def __init__(
        self,
        model: STAR,
        tokenizer: MultiScaleVQVAE,
        text_encoder: TextEncoder,
        origin: ExportConfig | None = None,
        public_extras: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self.origin = origin
        self.public_extras = public_extras
        self.schedule = ScaleSchedule(model.config.scales)
        self.decode_pixels = PixelDecoder(tokenizer)
        self.recorded: RecordedModel | None = None

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
    ) -> StarPipeline:
        """Loads an inference folder, or a Hugging Face model id that has one.

        device: a GPU if there is one; there CUDA graphs are on (`accelerate`). dtype: of the transformer, bf16 on a
        GPU and fp32 on a CPU. revision: of the id, a branch or commit.

        Raises:
            UserError: no inference folder there, or a damaged one, or no such device, or another dtype.
        """
        _check_dtype(dtype)
        folder = fetch_inference_folder(source, revision)
        device = find_device(device)
        if dtype is None:
            dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        config, model = load_model(folder, dtype)
        copied = folder / TEXT_ENCODER_FOLDER
        encoder = TextEncoder(config.text, device, copy=copied if copied.is_dir() else None)
        tokenizer = load_export_tokenizer(folder, config)
        extras = load_public_extras(folder)
        return cls(model.to(device), tokenizer.to(device), encoder, config, extras).accelerate()

    def save_pretrained(self, folder: str | Path, dtype: Literal["bf16", "fp32"] | None = None) -> None:
        """Writes an inference folder that `from_pretrained` reads. dtype: of the transformer; None is what it runs in.

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
            self.public_extras,
            self.text_encoder.copy,
        )

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> StarPipeline:
        """Moves everything to a device; dtype is the transformer's alone (tokens need the tokenizer in float32).

        CUDA graphs are on again where that is a GPU, and compilation stays as it was (`accelerate`).

        Raises:
            UserError: no such device, or another dtype.
        """
        device = find_device(device) if device is not None else self.device
        _check_dtype(dtype)
        self.model.to(device, dtype)
        self.tokenizer.to(device)
        self.text_encoder.to(device)
        self.decode_pixels = PixelDecoder(self.tokenizer)
        return self.accelerate(compile=self.model.functions is not PLAIN)

    def accelerate(self, graphs: bool | None = None, compile: bool = False) -> StarPipeline:
        """How the transformer runs from now on; call it again where its weights were changed in place.

        graphs: record every scale as a CUDA graph in the first drawing of each batch size and replay it in later ones;
        None is on where the pipeline is on a GPU. compile: what lies between a block's products and attention goes
        through torch.compile, once for all scales and batches, but for those of one token or one row; the first
        drawing waits for that.

        Raises:
            UserError: graphs without a GPU, or PyTorch's compiler does not work here.
        """
        if graphs and self.device.type != "cuda":
            raise UserError(f"CUDA graphs need a GPU, the pipeline is on {self.device}; leave them off")
        if compile and (problem := compiler_problem(self.device)):
            raise UserError(
                f"PyTorch's compiler does not work here: {problem}; install a C++ compiler, or do not compile"
            )
        self.model.use_functions(compiled_functions(dynamic=True) if compile else PLAIN)
        self.recorded = None
        if graphs or (graphs is None and self.device.type == "cuda"):
            self.record_with(partial(CudaGraphRecorder, self.device))
        return self

    def record_with(self, new_recorder: Callable[[], Recorder]) -> None:
        """Every scale goes through a recorder from now on; a new one for each cache."""
        text_tokens = self.text_encoder.config.max_tokens
        self.recorded = RecordedModel(self.model, self.schedule, text_tokens, new_recorder)

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
            UserError: no prompt, not one seed per prompt, or options for another number of scales.
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
        if not prompts:
            raise UserError("there is no prompt; give at least one")
        given = seed if isinstance(seed, Iterable) else (index(seed) + i for i in range(len(prompts)))
        seeds = [index(one) for one in given]  # NumPy's whole numbers are no int, and generators take nothing else
        text, empty = self.text_encoder(prompts), self.text_encoder([""])
        return sample_pictures(
            self.model, self.tokenizer.quantize, text, empty, self.schedule, options, seeds, known=known,
            on_scale=on_scale, reserve=self._reserve,
        )  # fmt: skip

    def _reserve(self, rows: int, text_tokens: int) -> ScaleLogits:
        """Texts have room for `text.max_tokens` in any case, so that no picture's last bits depend on others' texts."""
        if self.recorded is not None:
            return self.recorded.reserve(rows, text_tokens)
        return CachedModel(self.model, self.schedule, rows, max(text_tokens, self.text_encoder.config.max_tokens))

    def decode(self, latent_BCHH: Tensor) -> list[Image.Image]:
        """Pictures of latents; (B, C, H, H)."""
        return to_pil(self.decode_pixels(latent_BCHH))


def _check_dtype(dtype: torch.dtype | None) -> None:
    if dtype is not None and dtype not in DTYPES.values():
        raise UserError(f"the pipeline runs in torch.bfloat16 or torch.float32, got {dtype}")
