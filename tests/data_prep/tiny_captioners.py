"""Tiny models with random weights of the three families that captioners come in; each is saved as its users find it."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    BertConfig,
    BertTokenizerFast,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessor,
)

SIDE, PATCH = 16, 8
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<image>"]
WORDS = ["a", "red", "green", "blue", "heart", "flag", "face", "describe", "user", "assistant", "picture", "the"]
CHAT = (
    "{% for message in messages %}user {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)
TEXT = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
VISION = TEXT | dict(image_size=SIDE, patch_size=PATCH)


def tokenizer(folder: Path, **options: object) -> BertTokenizerFast:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(SPECIAL + WORDS))
    return BertTokenizerFast(vocab_file=str(folder / "vocab.txt"), additional_special_tokens=["<image>"], **options)


def save_blip(folder: Path) -> None:
    """Picture alone, or with the beginning of a caption; one processor."""
    words = tokenizer(folder)
    ids = dict(bos_token_id=2, eos_token_id=3, sep_token_id=3, pad_token_id=0)
    text = TEXT | ids | dict(vocab_size=len(words), encoder_hidden_size=16, projection_dim=16)
    torch.manual_seed(0)
    BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=VISION)).save_pretrained(folder)
    BlipProcessor(BlipImageProcessor(size={"height": SIDE, "width": SIDE}), words).save_pretrained(folder)


def save_vit_bert(folder: Path) -> None:
    """An encoder of pictures and a decoder of text, with image processor and tokenizer apart."""
    words = tokenizer(folder)
    decoder = BertConfig(vocab_size=len(words), is_decoder=True, add_cross_attention=True, **TEXT)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(**VISION), decoder)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 2, 0, 3
    torch.manual_seed(0)
    VisionEncoderDecoderModel(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    words.save_pretrained(folder)


def save_llava(folder: Path) -> None:
    """A decoder that takes picture and question by a chat template, and repeats them."""
    words = tokenizer(folder, model_input_names=["input_ids", "attention_mask"])  # as those of such decoders
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(vocab_size=len(words), bos_token_id=2, eos_token_id=3, pad_token_id=0, **TEXT),
        image_token_index=SPECIAL.index("<image>"),
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    pictures = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    LlavaProcessor(
        pictures,
        words,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    ).save_pretrained(folder)
