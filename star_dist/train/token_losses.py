"""From a micro-batch to the losses of its tokens, as training, validation and evaluation compute them.

Nothing here makes the host wait for the device (tests/train/test_host_waits.py).

B samples of a micro-batch, L tokens of a sample, T = B * L.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from star_dist.config import RunConfig
from star_dist.data.batches import drop_captions
from star_dist.data.dataset import MicroBatch
from star_dist.data.fetch import fetch_empty_caption
from star_dist.model.layout import PackedLayout, copy_to_device
from star_dist.model.star import pack_inputs
from star_dist.text import TextEncoder, TextFeatures
from star_dist.tokenizer.quantizer import MultiScaleQuantizer
from star_dist.train.loss_report import scale_loss_weights
from star_dist.train.token_dropping import TokenDropping


class TokenLosses:
    """model: a STAR, or an engine around one. text_encoder: None where the data set has the captions' features.

    schedule: of the tokens that the model sees in training: fewer of a scale where some are dropped.
    """

    def __init__(
        self,
        config: RunConfig,
        model: Callable[..., Any],
        quantizer: MultiScaleQuantizer,
        text_encoder: TextEncoder | None,
        device: torch.device,
    ) -> None:
        self.model = model
        self.quantizer = quantizer
        self.device = device
        self.full_schedule, self.schedule = config.schedule, config.training_schedule
        self.seed = config.seed
        self.caption_dropout = config.train.caption_dropout
        self.text_encoder = None if config.data.text_features else text_encoder
        self.empty_caption = fetch_empty_caption(config.data)[0] if config.data.text_features else None
        self.dropping = None
        if self.schedule != self.full_schedule:
            self.dropping = TokenDropping(self.full_schedule, self.schedule, config.seed, device)
        self.weights_L = None
        if config.train.scale_loss_power:
            weights = scale_loss_weights(config.schedule, config.train.scale_loss_power)
            self.weights_L = torch.tensor(weights, device=device)

    def text(self, batch: MicroBatch, step: int | None) -> TextFeatures:
        """Features of a batch's captions; in training some are replaced by the empty one, for guidance.

        step: of the training, None for data that is held out.
        """
        dropped = (False,) * len(batch)
        if step is not None:
            dropped = drop_captions(batch.sample_ids, seed=self.seed, step=step, rate=self.caption_dropout)
        if batch.features is None:
            return self.text_encoder(["" if drop else caption for caption, drop in zip(batch.captions, dropped)])
        features = [self.empty_caption if drop else stored for stored, drop in zip(batch.features, dropped)]
        return TextFeatures.pack(features).to(self.device)

    def __call__(self, batch: MicroBatch, text: TextFeatures, step: int | None) -> tuple[Tensor, Tensor]:
        """Cross-entropy of every token, and whether the likeliest token was right; (T,) each.

        Both are 0 where training drops the token. step: of the training, None for data that is held out.
        """
        tokens_BL = copy_to_device(batch.tokens_BL, self.device)
        inputs_TC = pack_inputs(self.quantizer.teacher_forcing_input(tokens_BL, self.full_schedule))
        if step is None or self.dropping is None:
            layout = PackedLayout.uniform(self.full_schedule, len(batch), text.lengths)
            return self.model(inputs_TC, text.hidden_SW, text.pooled_BW, tokens_BL.flatten(), layout=layout)
        kept_BM = copy_to_device(self.dropping.positions(batch.sample_ids, step), self.device)
        rows_B1 = torch.arange(len(batch), device=self.device)[:, None]
        inputs_TC = inputs_TC.unflatten(0, tokens_BL.shape)[rows_B1, kept_BM].flatten(0, 1)
        targets_T = tokens_BL.gather(1, kept_BM).flatten()
        layout = PackedLayout.uniform(self.schedule, len(batch), text.lengths)
        positions_T = kept_BM.flatten()
        kept = self.model(inputs_TC, text.hidden_SW, text.pooled_BW, targets_T, layout=layout, positions_T=positions_T)
        losses, hits = (self.dropping.restore(x.float().view(kept_BM.shape), kept_BM).flatten() for x in kept)
        return losses, hits

    def present(self, batch: MicroBatch) -> Tensor | None:
        """1 for every sample and 0 for those of corrupt shards, (B,); None where all are present."""
        if all(batch.present):
            return None
        return copy_to_device(torch.tensor(batch.present, dtype=torch.float32), self.device)

    def loss_sum(self, losses_T: Tensor, present_B: Tensor | None) -> Tensor:
        """What is minimised: the sum over all tokens, weighted by scale where `train.scale_loss_power` says so."""
        losses_BL = losses_T.unflatten(0, (-1, self.full_schedule.num_tokens))
        if self.weights_L is not None:
            losses_BL = losses_BL * self.weights_L
        if present_B is not None:
            losses_BL = losses_BL * present_B[:, None]
        return losses_BL.sum()
