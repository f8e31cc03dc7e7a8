"""Names and shapes of the public STAR transformers and the public VAR tokenizer, and the way there and back.

The transformer's computing parameters have the same names and shapes as ours. The public layout
(tests/golden/star_official_layout.json) has two kinds more: a class embedding that STAR never uses, and zero buffers
that stand for the keys' absent bias.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from star_dist.config import Section, TextSection
from star_dist.config.base import Positive
from star_dist.errors import UserError
from star_dist.model.config import RopeConvention, StarConfig
from star_dist.model.star import STAR
from star_dist.scales import PUBLIC_SCALES, ScaleSchedule
from star_dist.tokenizer.config import VQVAEConfig
from star_dist.weights import check_names_and_shapes

logger = logging.getLogger(__name__)

CLASS_EMBEDDING = "class_emb.weight"
PUBLIC_CLASSES = 1001
ZERO_BUFFER = "zero_k_bias"


class PublicCheckpointOptions(Section):
    """What the files of a public checkpoint do not tell; the defaults are the public models'.

    scales: empty where they are not known. tokenizer_scales: those it was trained with; empty takes the public ten
    where the file has statistics of ten scales, else `scales`. tokenizer_hash: of the tokenizer that the transformer
    was trained with, null where it is not known.

    Raises:
        ValueError: scales that do not start with 1 or do not grow.
    """

    scales: tuple[Positive, ...] = ()
    tokenizer_scales: tuple[Positive, ...] = ()
    rope_convention: RopeConvention = "public"
    rope_theta: float = Field(10000.0, gt=0)
    rope_extent: float = Field(64.0, gt=0)
    norm_groups: Positive = 32
    text: TextSection = TextSection()
    tokenizer_hash: str | None = None

    @model_validator(mode="after")
    def _scales_are_schedules(self) -> PublicCheckpointOptions:
        for scales in (self.scales, self.tokenizer_scales):
            if scales:
                ScaleSchedule(scales)
        return self

    def public_code_must_change(self) -> dict[str, Any]:
        """What the public code has as constants, where the model has it otherwise.

        The scales are an argument there, but one for the transformer and the tokenizer together.
        """
        public = PublicCheckpointOptions()
        constants = ("rope_convention", "rope_theta", "rope_extent", "norm_groups")
        changes = {name: getattr(self, name) for name in constants if getattr(self, name) != getattr(public, name)}
        if len(self.tokenizer_scales) != len(self.scales):
            changes["tokenizer_scales"] = list(self.tokenizer_scales)
        return changes


def check_weights(weights: dict[str, Tensor], model: STAR, source: str) -> dict[str, Tensor]:
    """Accepts our own and the public layout: drops what carries no information, refuses what does not fit.

    Returns the weights under the model's names; a warning names what was ignored.

    Raises:
        UserError: missing or unknown names or wrong shapes, all of them named.
    """
    weights = dict(weights)
    for name in list(weights):
        if name == CLASS_EMBEDDING:
            logger.warning("%s: ignored %s, which STAR never uses", source, name)
            del weights[name]
        elif name.endswith(ZERO_BUFFER):
            if weights[name].any():
                raise UserError(f"{source}: {name} must be zero (keys have no bias), but it is not")
            del weights[name]
    check_names_and_shapes(weights, dict(model.named_parameters()), source)
    return weights


def public_weights(
    weights: Mapping[str, Tensor], config: StarConfig, class_embedding: Tensor | None = None
) -> dict[str, Tensor]:
    """Our transformer's weights under the public layout, ready for a strict load there.

    class_embedding: the one that a converted checkpoint came with; zeros where there is none.

    Raises:
        UserError: a model that the public code cannot express.
    """
    for option, needed in (("positions", "rope"), ("cross_attention", True)):
        if getattr(config, option) != needed:
            raise UserError(
                f"the public layout has no model with {option} {getattr(config, option)}; it needs {option} {needed}"
            )
    public = dict(weights)
    like = weights["word_embed.weight"]
    for layer in range(config.depth):
        for part in ("attn", "cross_attn"):
            public[f"blocks.{layer}.{part}.{ZERO_BUFFER}"] = like.new_zeros(config.width)
    public[CLASS_EMBEDDING] = (
        like.new_zeros(PUBLIC_CLASSES, config.width) if class_embedding is None else class_embedding
    )
    return public


def infer_star_config(weights: Mapping[str, Tensor], untold: PublicCheckpointOptions, source: str) -> StarConfig:
    """The architecture of a public transformer: what its shapes tell, and scales and RoPE from `untold`.

    Raises:
        UserError: no such transformer, or one with another number of levels than there are scales.
    """
    what = "no STAR transformer of the public layout"
    width, code_dim = _shape(weights, "word_embed.weight", 2, source, what)
    levels = _shape(weights, "lvl_embed.weight", 2, source, what)[0]
    scales = untold.scales
    if levels != len(scales):
        raise UserError(
            f"{source} has {levels} levels, there are {len(scales)} scales: {list(scales)}; give {levels} sides"
        )
    layers = [
        int(name.split(".")[1]) for name in weights if name.startswith("blocks.") and name.split(".")[1].isdigit()
    ]
    try:
        return StarConfig(
            depth=max(layers, default=0) + 1,
            scales=scales,
            width=width,
            heads=_shape(weights, "blocks.0.attn.scale_mul_1H11", 4, source, what)[1],
            ffn_ratio=_shape(weights, "blocks.0.ffn.fc1.weight", 2, source, what)[0] // width,
            vocab_size=_shape(weights, "head_logits.weight", 2, source, what)[0],
            code_dim=code_dim,
            text_width=_shape(weights, "encoder_proj.weight", 2, source, what)[1],
            rope_convention=untold.rope_convention,
            rope_theta=untold.rope_theta,
            rope_extent=untold.rope_extent,
        )
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(f"{source} is {what}: {error}") from None


def infer_tokenizer_config(weights: Mapping[str, Tensor], untold: PublicCheckpointOptions, source: str) -> VQVAEConfig:
    """The architecture of a public tokenizer: what its shapes tell, and scales and norm groups from `untold`.

    Raises:
        UserError: no such tokenizer, or one with statistics of another number of scales.
    """
    what = "no multi-scale VQ-VAE of the public layout"
    channels = _shape(weights, "encoder.conv_in.weight", 4, source, what)[0]
    vocab_size, code_dim = _shape(weights, "quantize.embedding.weight", 2, source, what)
    levels = _count(weights, "encoder.down.{}.block.0.norm1.weight")
    widths = [_shape(weights, f"encoder.down.{i}.block.0.conv2.weight", 4, source, what)[0] for i in range(levels)]
    rows = _shape(weights, "quantize.ema_vocab_hit_SV", 2, source, what)[0]
    public = PUBLIC_SCALES[256]
    scales = untold.tokenizer_scales or (public if rows == len(public) else untold.scales)
    if rows != len(scales):
        raise UserError(
            f"{source} has statistics of {rows} scales, not of the {len(scales)} {list(scales)}; give the {rows} sides "
            f"that it was trained with as --tokenizer-scales"
        )
    try:
        return VQVAEConfig(
            vocab_size=vocab_size,
            code_dim=code_dim,
            channels=channels,
            channel_multipliers=tuple(width // channels for width in widths),
            blocks_per_level=_count(weights, "encoder.down.0.block.{}.norm1.weight"),
            norm_groups=untold.norm_groups,
            num_phi=_count(weights, "quantize.quant_resi.qresi_ls.{}.weight"),
            scales=scales,
        )
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(f"{source} is {what}: {error}") from None


def _shape(weights: Mapping[str, Tensor], name: str, dimensions: int, source: str, what: str) -> torch.Size:
    if name not in weights:
        raise UserError(f"{source} is {what}: it has no {name}")
    shape = weights[name].shape
    if len(shape) != dimensions or 0 in shape:
        raise UserError(f"{source} is {what}: {name} has shape {tuple(shape)}, expected {dimensions} dimensions")
    return shape


def _count(weights: Mapping[str, Tensor], pattern: str) -> int:
    count = 0
    while pattern.format(count) in weights:
        count += 1
    return count
