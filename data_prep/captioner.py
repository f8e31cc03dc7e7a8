"""Image-to-text and vision-language models of Hugging Face behind one call: pictures to captions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from star_dist.config import CaptionConfig
from star_dist.errors import UserError, first_line
from star_dist.hub import hub_error


class Captioner:
    """A model with its processor, by their Hugging Face id or folder; greedy, so the same picture has one caption.

    Raises:
        UserError: the model cannot be loaded, lacks weights, is none that turns pictures into text, or does not go with
            the prompt. Unavailable: the hub does not answer.
    """

    def __init__(self, config: CaptionConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.processor, self.model = _load(config, device)
        self.tokenizer = getattr(self.processor, "tokenizer", self.processor)
        self.tokenizer.padding_side = "left"  # so that all new tokens start at the same place
        self.text = self._prompt_text()
        self._check_captions()

    def __call__(self, pictures: Sequence[Image.Image]) -> list[str]:
        """One caption per picture, in one line."""
        return self._captions(pictures, self.config.max_new_tokens)

    def _check_captions(self) -> None:
        """Captions two pictures by one token.

        Raises:
            UserError: the model does not go with the prompt, or without one.
        """
        try:
            self._captions([Image.new("RGB", (64, 64))] * 2, 1)
        except UserError:
            raise
        except Exception as error:  # every kind of model has its own way to say what it misses
            raise UserError(
                f"model {self.config.model!r} cannot caption pictures with prompt {json.dumps(self.config.prompt)}: "
                f"{first_line(error)}; change prompt, or take another model"
            ) from None

    @torch.inference_mode()
    def _captions(self, pictures: Sequence[Image.Image], max_new_tokens: int) -> list[str]:
        inputs: dict[str, Any] = {"images": [[picture] for picture in pictures] if self.nested else list(pictures)}
        if self.text is not None:
            inputs |= {"text": [self.text] * len(pictures), "padding": True}
            if (first := self.tokenizer.bos_token) and self.text.startswith(first):
                inputs["add_special_tokens"] = False  # the chat template has put it there
        encoded = self.processor(**inputs, return_tensors="pt").to(self.device)
        if "pixel_values" in encoded:
            encoded["pixel_values"] = encoded["pixel_values"].to(self.model.dtype)
        made = self.model.generate(**encoded, max_new_tokens=max_new_tokens, do_sample=False)
        prompt = encoded.get("input_ids")
        if prompt is not None and made.shape[1] >= prompt.shape[1]:
            # Decoder-only models repeat the prompt before their answer, others do not.
            repeated = (made[:, : prompt.shape[1]] == prompt).all()
            made = made[:, prompt.shape[1] :] if repeated else made
        texts = self.tokenizer.batch_decode(made, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]

    @property
    def nested(self) -> bool:
        """Processors of models that take several pictures a prompt want a list of lists."""
        return self.model.config.model_type in ("idefics2", "idefics3", "smolvlm", "mllama", "gemma3")

    def _prompt_text(self) -> str | None:
        """The prompt as the model's own chat template has it, or as it is."""
        if getattr(self.processor, "chat_template", None) is None:
            return self.config.prompt
        if self.config.prompt is None:
            raise UserError(f"model {self.config.model} takes a question beside the picture; set prompt")
        content = [{"type": "image"}, {"type": "text", "text": self.config.prompt}]
        return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


class _PictureProcessor:
    """An image processor and a tokenizer as one, for models whose repository has them apart (ViT-GPT2)."""

    chat_template = None

    def __init__(self, image_processor: Any, tokenizer: Any) -> None:
        self.image_processor, self.tokenizer = image_processor, tokenizer

    def __call__(self, images: Sequence[Image.Image], **options: Any) -> Any:
        if "text" in options:
            raise UserError("this model takes a picture alone; set prompt to null")
        return self.image_processor(images=images, return_tensors=options["return_tensors"])


def _load(config: CaptionConfig, device: torch.device) -> tuple[Any, Any]:
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        processor = AutoProcessor.from_pretrained(config.model)
        if not (hasattr(processor, "image_processor") and hasattr(processor, "tokenizer")):
            processor = _PictureProcessor(
                AutoImageProcessor.from_pretrained(config.model), AutoTokenizer.from_pretrained(config.model)
            )
        model, found = AutoModelForImageTextToText.from_pretrained(
            config.model, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # of damaged files: SafetensorError, tokenizers' bare Exception
        raise hub_error(
            error,
            f"model {config.model!r} could not be loaded: {first_line(error)} (model takes a Hugging Face id or folder "
            f"of an image-to-text or vision-language model)",
        ) from None
    # transformers fills them with random values; poolers take no part in captions.
    missing = [key for key in sorted(found["missing_keys"]) if "pooler." not in key]
    if missing:
        raise UserError(
            f"model {config.model!r} lacks {len(missing)} of its weights, such as {missing[0]}; get it anew"
        )
    return processor, model.to(device).eval()
