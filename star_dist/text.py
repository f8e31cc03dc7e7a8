"""Frozen text encoders: captions to per-token features and a pooled vector, packed without padding.

B captions, S text tokens of the batch, W text width.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from star_dist.config import TextSection
from star_dist.errors import UserError, first_line
from star_dist.hub import hub_error
from star_dist.model.layout import copy_to_device


@dataclass(frozen=True)
class TextFeatures:
    """hidden_SW: features of all captions' tokens, caption after caption. pooled_BW. lengths: tokens per caption."""

    hidden_SW: Tensor
    pooled_BW: Tensor
    lengths: tuple[int, ...]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Features (tokens, W) and pooled vector (W,) of one caption."""
        start = sum(self.lengths[:index])
        return self.hidden_SW[start : start + self.lengths[index]], self.pooled_BW[index]

    @classmethod
    def pack(cls, captions: Sequence[tuple[Tensor, Tensor]]) -> TextFeatures:
        """Packs per-caption (hidden, pooled) pairs."""
        hidden, pooled = zip(*captions)
        return cls(torch.cat(hidden), torch.stack(pooled), tuple(len(tokens) for tokens in hidden))

    def to(self, device: torch.device) -> TextFeatures:
        """A copy of features on the CPU, which the host does not wait for."""
        return TextFeatures(
            copy_to_device(self.hidden_SW, device), copy_to_device(self.pooled_BW, device), self.lengths
        )


class TextEncoder:
    """Any Hugging Face text encoder: CLIP text models, T5 encoders, BERT-like encoders, decoders such as Qwen's.

    copy: the folder of a copy, to load in place of what `config.encoder` names.

    Raises:
        UserError: the model cannot be found or does not encode text alone, its width is not the configured one, or it
            cannot take as many tokens.
    """

    def __init__(
        self,
        config: TextSection,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        copy: Path | None = None,
    ) -> None:
        self.config, self.copy = config, copy
        self.tokenizer, self.model = _load(config, dtype, copy)
        self.model.eval().requires_grad_(False)
        self.device = torch.device("cpu")  # an index that is out of range would end every later use of a GPU
        width = self._width()
        if width != config.width:
            raise UserError(
                f"text encoder {config.encoder} has width {width}, text.width is {config.width}; change one"
            )
        self._check_max_tokens()
        self.to(device)

    def check_fit(self, captions: Sequence[str]) -> None:
        """`check_fit` with this encoder's tokenizer and limit."""
        check_fit(self.tokenizer, captions, self.config.max_tokens)

    def to(self, device: torch.device) -> None:
        """Moves the model; later features come from that device."""
        self.device = device
        self.model.to(device)
        self.__dict__.pop("_empty_caption", None)

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> TextFeatures:
        """Encodes captions; longer ones are cut at `text.max_tokens`.

        A caption that comes twice is encoded once, and the empty one, which takes the place of a tenth of all in
        training, once for good. No other is kept: the batch that a caption is encoded in decides its last bits, and a
        resumed run, whose cache begins empty, would not equal one that was never stopped.
        """
        others = [caption for caption in dict.fromkeys(captions) if caption]
        if len(others) == len(captions):
            return self._encode(captions)
        parts = [self._empty_caption, *([self._encode(others)] if others else [])]
        lengths = [length for part in parts for length in part.lengths]
        starts = (0, *accumulate(lengths))
        place_of = {caption: place for place, caption in enumerate(("", *others))}
        places = [place_of[caption] for caption in captions]
        rows = torch.tensor([row for place in places for row in range(starts[place], starts[place + 1])])
        hidden_SW = torch.cat([part.hidden_SW for part in parts])
        pooled_BW = torch.cat([part.pooled_BW for part in parts])
        return TextFeatures(
            hidden_SW.index_select(0, copy_to_device(rows, self.device)),
            pooled_BW.index_select(0, copy_to_device(torch.tensor(places), self.device)),
            tuple(lengths[place] for place in places),
        )

    def _width(self) -> int:
        """Of the features, found by encoding a short caption.

        Raises:
            UserError: the model wants more than text, or has no pooled output where that is asked for.
        """
        try:
            return self._encode(["a"]).hidden_SW.shape[1]
        except UserError:
            raise
        except Exception as error:  # every kind of model has its own way to say what it misses
            raise UserError(
                f"text encoder {self.config.encoder} of kind {self.model.config.model_type} does not encode text "
                f"alone: {first_line(error)}; take a text model of CLIP, a T5, a model like BERT or a decoder of text"
            ) from None

    def _check_max_tokens(self) -> None:
        """Encodes as long a caption as there can be.

        Raises:
            UserError: the model has fewer positions.
        """
        positions = getattr(self.model.config, "max_position_embeddings", None)
        if positions is None:
            return  # T5 takes any length, and the largest would be slow here
        try:
            self._encode(["a " * self.config.max_tokens])
        except (IndexError, RuntimeError, ValueError):
            raise UserError(
                f"text.max_tokens is {self.config.max_tokens}, too many for text encoder {self.config.encoder}; it has "
                f"{positions} positions, of which some kinds keep a few for themselves; make text.max_tokens smaller"
            ) from None

    @cached_property
    def _empty_caption(self) -> TextFeatures:
        # Tokenizers that add nothing of their own (Qwen's, GPT-2's) make no token of it; a model needs one.
        return self._encode(["" if self.tokenizer("")["input_ids"] else self.tokenizer.pad_token])

    def _encode(self, captions: Sequence[str]) -> TextFeatures:
        batch = self.tokenizer(
            list(captions),
            padding=True,
            truncation=True,
            max_length=self.config.max_tokens,
            return_attention_mask=True,
            return_tensors="pt",
        )
        mask_BS = batch["attention_mask"].bool()
        lengths = tuple(mask_BS.sum(1).tolist())
        present = copy_to_device(mask_BS.flatten().nonzero().flatten(), self.device)
        ids, mask_BS = copy_to_device(batch["input_ids"], self.device), copy_to_device(mask_BS, self.device)
        output = self.model(input_ids=ids, attention_mask=mask_BS.long())
        hidden_BSW = output.last_hidden_state
        hidden_SW = hidden_BSW.flatten(0, 1).index_select(0, present)
        return TextFeatures(hidden_SW, self._pool(output, hidden_BSW, mask_BS), lengths)

    def _pool(self, output: object, hidden_BSW: Tensor, mask_BS: Tensor) -> Tensor:
        is_clip = self.model.config.model_type.startswith("clip")
        if self.config.pooling == "pooler" or (self.config.pooling == "auto" and is_clip):
            pooled = getattr(output, "pooler_output", None)
            if pooled is None:
                raise UserError(f"text.pooling is pooler, but {self.config.encoder} has no pooled output; use mean")
            return pooled
        weights_BS1 = mask_BS.unsqueeze(-1).to(hidden_BSW.dtype)
        return (hidden_BSW * weights_BS1).sum(1) / weights_BS1.sum(1)


def check_fit(tokenizer: Any, captions: Sequence[str], max_tokens: int) -> None:
    """For captions that somebody has typed: those of a data set may be cut.

    Raises:
        UserError: a caption has more tokens than the text encoder takes, or is no text.
    """
    for caption in captions:
        try:
            caption.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"a prompt holds half a character at letter {error.start + 1} (a lone surrogate): {caption[:40]!a}"
            ) from None
        tokens = len(tokenizer(caption, truncation=False, verbose=False)["input_ids"])
        if tokens > max_tokens:
            raise UserError(f"a prompt has {tokens} tokens, the model takes {max_tokens}; shorten {caption[:40]!r}…")


def save_text_encoder(config: TextSection, folder: Path, copy: Path | None = None) -> TextSection:
    """Copies a text encoder that lives in a local folder or package, so that an export does not depend on it.

    A Hugging Face id stays a reference and nothing is written. copy: as `TextEncoder` takes it. Returns the section
    that describes the copy, named as `portable_name` does.
    """
    if copy is None and not _local_path(config.encoder).is_dir():
        return config
    tokenizer, model = _load(config, torch.float32, copy)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    named = portable_name(config)
    return config.model_copy(update={"encoder": named, "encoder_subfolder": "", "tokenizer_subfolder": ""})


def portable_name(config: TextSection) -> str:
    """What an export calls a text encoder: of a folder the last part, because an export is for other machines."""
    if config.encoder.startswith(PACKAGE_PREFIX) or not Path(config.encoder).is_dir():
        return config.encoder
    return Path(os.path.abspath(config.encoder)).name  # of "." too


PACKAGE_PREFIX = "package:"
# Classes of the text half of models that have another half, by model type.
TEXT_PARTS = {
    "clip": "CLIPTextModel",
    "clip_text_model": "CLIPTextModel",
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
}


def _local_path(encoder: str) -> Path:
    """`package:NAME/FOLDER` is a folder inside an installed Python package; anything else is a path or a hub id."""
    if not encoder.startswith(PACKAGE_PREFIX):
        return Path(encoder)
    package, _, folder = encoder.removeprefix(PACKAGE_PREFIX).partition("/")
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise UserError(f"text.encoder is {encoder!r}, but the Python package {package!r} is not installed")
    return Path(found.origin).parent / folder


def _load(config: TextSection, dtype: torch.dtype, copy: Path | None = None):
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # forked loader workers would warn on every start
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    path = copy or _local_path(config.encoder)
    source = str(path) if path.is_dir() else config.encoder
    name = config.encoder if copy is None else str(copy)
    try:
        model_type = transformers.AutoConfig.from_pretrained(source, subfolder=config.encoder_subfolder).model_type
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, subfolder=config.tokenizer_subfolder)
        text_part = getattr(transformers, TEXT_PARTS.get(model_type, "AutoModel"))  # imports that model alone
        model, found = text_part.from_pretrained(
            source,
            subfolder=config.encoder_subfolder,
            dtype=dtype,
            use_safetensors=True,
            # With SDPA transformers looks whether the mask leaves anything out, for which the host waits for its GPU.
            attn_implementation="eager",
            output_loading_info=True,
        )
    except Exception as error:  # of damaged files: SafetensorError, TypeError, tokenizers' bare Exception
        lacking = "" if importlib.util.find_spec("sentencepiece") else "; a spiece.model alone needs sentencepiece"
        raise hub_error(
            error,
            f"text encoder {name!r} could not be loaded: {first_line(error)} "
            f"(text.encoder takes a Hugging Face id, a local folder or package:NAME/FOLDER; the model is looked for in "
            f"its text.encoder_subfolder {config.encoder_subfolder!r}, as safetensors, and the tokenizer in its "
            f"text.tokenizer_subfolder {config.tokenizer_subfolder!r}{lacking})",
        ) from None
    # transformers fills them with random values. BERT-like models often come without the pooler, which mean leaves out.
    missing = [key for key in sorted(found["missing_keys"]) if config.pooling == "pooler" or "pooler." not in key]
    if missing:
        raise UserError(
            f"text encoder {name!r} lacks {len(missing)} of its weights, such as {missing[0]}; get it anew"
            + (", or set text.pooling to mean" if all("pooler." in key for key in missing) else "")
        )
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:  # Llama's and GPT-2's; what stands in padding is masked
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, model
