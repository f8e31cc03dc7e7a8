"""STAR: a decoder-only transformer that predicts each token map from all smaller ones and from text.

T image tokens of the packed batch, S text tokens, B samples, C code dimension, D width, V codebook size, W text width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from star_dist.model.activation_checkpointing import Checkpointing
from star_dist.model.attention import AttentionContext, PackedAttention, check_kernel_name, choose_kernel
from star_dist.model.block_functions import PLAIN, BlockFunctions, layer_norm
from star_dist.model.blocks import Block
from star_dist.model.chunked_loss import LinearCrossEntropy, fast_float32_products
from star_dist.model.config import StarConfig
from star_dist.model.layout import PackedLayout
from star_dist.model.rope import Rotary, packed_rotary
from star_dist.scales import ScaleSchedule


class Head(nn.Linear):
    """LayerNorm and the projection to the codebook, in float32 whatever the rest runs in; products as TF32 where
    `fast_float32_products` says so.
    """

    def forward(self, x_TD: Tensor, targets_T: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (T, V), or with targets per-token losses (T,) and hits (T,), for which no logits are kept."""
        x_TD = layer_norm(x_TD.to(torch.promote_types(x_TD.dtype, torch.float32)))
        if targets_T is not None:
            return LinearCrossEntropy.apply(x_TD, self.weight, self.bias, targets_T)
        with fast_float32_products(self.weight.dtype, x_TD.device):
            return F.linear(x_TD, self.weight.to(x_TD.dtype), self.bias.to(x_TD.dtype))


class STAR(nn.Module):
    """The transformer alone: the tokenizer and the text encoder are not part of it.

    Parameters are left for `initialization.initial_value` or a checkpoint to fill; the names are those of the public
    checkpoints. attention: the kernel of `attention.py`. checkpointing: see `activation_checkpointing.py`. functions:
    how blocks run, plain or compiled.
    """

    def __init__(
        self,
        config: StarConfig,
        attention: str = "auto",
        checkpointing: Checkpointing = "none",
        functions: BlockFunctions = PLAIN,
    ) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = checkpointing
        self.functions = functions
        self.attention = check_kernel_name(attention)
        self.encoder_proj = nn.Linear(config.text_width, config.width)
        self.pos_start = nn.Parameter(torch.empty(1, 1, config.width))
        self.word_embed = nn.Linear(config.code_dim, config.width)
        self.lvl_embed = nn.Embedding(len(config.scales), config.width)
        if config.positions == "learned":
            self.pos_embed = nn.Embedding(ScaleSchedule(config.scales).num_tokens, config.width)
        self.blocks = nn.ModuleList(Block(config, functions) for _ in range(config.depth))
        self.head_logits = Head(config.width, config.vocab_size)

    def use_functions(self, functions: BlockFunctions) -> None:
        """Runs with other functions from now on."""
        for module in self.modules():
            if hasattr(module, "functions"):
                module.functions = functions

    def start_token(self, pooled_BW: Tensor) -> Tensor:
        """Input at the 1x1 scale, from the pooled text; (B, W) -> (B, D)."""
        return self.encoder_proj(pooled_BW) + self.pos_start.flatten()

    def add_positions(self, x_TD: Tensor, scale_ids_T: Tensor, positions_T: Tensor) -> Tensor:
        """Adds the level embedding, and the learned positions of the ablation without RoPE."""
        x_TD = x_TD + self.lvl_embed(scale_ids_T)
        if self.config.positions == "learned":
            x_TD = x_TD + self.pos_embed(positions_T)
        return x_TD

    def rotary(
        self, schedules: tuple[ScaleSchedule, ...], device: torch.device, positions_T: Tensor | None = None
    ) -> Rotary | None:
        """The rotations of all tokens of the given samples; none in the ablation without RoPE.

        positions_T: where each token stands in its sample, for samples of one schedule that lack some.
        """
        if self.config.positions != "rope":
            return None
        if positions_T is None:
            return packed_rotary(self.config, schedules, device)
        cosines, sines = packed_rotary(self.config, (ScaleSchedule(schedules[0].sides),), device)
        return cosines[positions_T], sines[positions_T]

    def run_blocks(self, x_TD: Tensor, text_SW: Tensor, rotary: Rotary | None, context: AttentionContext) -> Tensor:
        for layer, block in enumerate(self.blocks):
            options = {"rotary": rotary, "context": context.of_layer(layer)}
            x_TD = self.functions.run_block(block, self.checkpointing, x_TD, text_SW, **options)
        return x_TD

    def forward(
        self,
        inputs_TC: Tensor,
        text_SW: Tensor,
        pooled_BW: Tensor,
        targets_T: Tensor | None = None,
        *,
        layout: PackedLayout,
        positions_T: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Teacher-forced prediction of every token.

        inputs_TC: what the tokenizer's `teacher_forcing_input` gives for scales 2..K, with a zero row for each sample's
        first token. text_SW: text features of all samples, one after another as `layout.text_lengths` says.
        pooled_BW: pooled text. positions_T: where each token stands in its sample, where the layout's one schedule has
        `kept_lengths`. Returns logits (T, V) float32, or with targets the per-token cross-entropy (T,) and
        whether the likeliest token was the target (T,).
        """
        dtype = self.word_embed.weight.dtype
        device = inputs_TC.device
        x_TD = self.word_embed(inputs_TC.to(dtype))
        x_TD = x_TD.index_copy(0, layout.first_tokens(device), self.start_token(pooled_BW.to(dtype)))
        positions = layout.positions(device) if positions_T is None else positions_T
        x_TD = self.add_positions(x_TD, layout.scale_ids(device), positions)
        training = torch.is_grad_enabled()
        # Checkpointing has its say without gradients too: a run is validated with the kernel that it trains with.
        options = {"functions": self.functions, "checkpointing": self.checkpointing}
        kernel = choose_kernel(self.attention, device, dtype, training=training, **options)
        context = PackedAttention(layout, kernel, device)
        x_TD = self.run_blocks(x_TD, text_SW.to(dtype), self.rotary(layout.schedules, device, positions_T), context)
        return self.head_logits(x_TD, targets_T)


def pack_inputs(teacher_forcing_BLC: Tensor) -> Tensor:
    """The tokenizer's inputs of scales 2..K as the packed model input; (B, L - 1, C) -> (B * L, C)."""
    return F.pad(teacher_forcing_BLC, (0, 0, 1, 0)).flatten(0, 1)
