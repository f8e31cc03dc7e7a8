"""Losses by token and by scale: nothing is dropped from held-out data, absent samples count for nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from star_dist.config import RunConfig
from star_dist.data.dataset import MicroBatch
from star_dist.model.initialization import initialize_weights
from star_dist.model.star import STAR
from star_dist.scales import ScaleSchedule
from star_dist.text import TextEncoder
from star_dist.tokenizer.io import load_tokenizer
from star_dist.train.loss_report import by_scale, loss_report
from star_dist.train.optim import parameter_groups
from star_dist.train.token_losses import TokenLosses

CPU = torch.device("cpu")
SCHEDULE = ScaleSchedule((1, 2, 3))


def test_nothing_is_dropped_from_held_out_data(run_config: Callable[..., RunConfig]) -> None:
    """Neither captions nor tokens: validation losses are those of the whole picture under its own caption."""
    config = run_config(train={"caption_dropout": 1.0, "token_keep": 0.5})
    model = STAR(config.star_config())
    initialize_weights(model, seed=0)
    encoder = TextEncoder(config.text, CPU)
    losses = TokenLosses(config, model, load_tokenizer(Path(config.tokenizer.path)).quantize, encoder, CPU)
    tokens = torch.arange(2 * config.schedule.num_tokens).view(2, -1) % 64
    batch = MicroBatch((0, 1), tokens, ("red heart", "blue flag"), None, (True, True))
    held_out, trained = losses.text(batch, None), losses.text(batch, 5)
    assert torch.equal(held_out.hidden_SW, encoder(batch.captions).hidden_SW)
    assert torch.equal(trained.hidden_SW, encoder(["", ""]).hidden_SW)
    assert (losses(batch, held_out, None)[0] > 0).all()
    assert (losses(batch, trained, 5)[0] > 0).sum() == 2 * config.training_schedule.num_tokens


def test_losses_and_hits_go_to_their_scale() -> None:
    per_token = torch.tensor([5.0] + 4 * [3.0] + 9 * [1.0])
    values = torch.stack([per_token, 100 * per_token])
    losses = by_scale(values.flatten(), SCHEDULE, torch.tensor([1.0, 0.0]))  # the second sample is absent
    report = loss_report(SCHEDULE, losses, torch.tensor([1.0, 2.0, 0.0]), 1, "validation/")
    assert [report[f"validation/loss/scale_{side}"] for side in (1, 2, 3)] == [5, 3, 1]
    assert [report[f"validation/accuracy/scale_{side}"] for side in (1, 2, 3)] == [1, 0.5, 0]
    assert report["validation/loss/total"] == pytest.approx(26 / 14)
    assert report["validation/accuracy/total"] == pytest.approx(3 / 14)


def test_absent_samples_are_not_learned_from(run_config: Callable[..., RunConfig]) -> None:
    config = run_config()
    losses = TokenLosses(config, None, None, None, CPU)
    batch = MicroBatch((0, 1), torch.zeros(2, config.schedule.num_tokens), ("", ""), None, (True, False))
    losses_T = torch.ones(2 * config.schedule.num_tokens, requires_grad=True)
    losses.loss_sum(losses_T, losses.present(batch)).backward()
    assert losses_T.grad.view(2, -1).sum(1).tolist() == [config.schedule.num_tokens, 0]


def test_matrices_decay_and_nothing_else(run_config: Callable[..., RunConfig]) -> None:
    config = run_config(model={"depth": 1, "width": 32, "heads": 2, "positions": "learned"}).star_config()
    model = STAR(config)
    decay, no_decay = parameter_groups(model.named_parameters(), 0.05)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decaying = {names[id(parameter)] for parameter in decay["params"]}
    assert (decay["weight_decay"], no_decay["weight_decay"]) == (0.05, 0.0)
    assert len(decay["params"]) + len(no_decay["params"]) == len(names)
    attention = ("attn.mat_qkv", "attn.proj", "cross_attn.mat_q", "cross_attn.mat_kv", "cross_attn.proj")
    of_block = {f"blocks.0.{name}.weight" for name in (*attention, "ffn.fc1", "ffn.fc2")}
    assert decaying == {"encoder_proj.weight", "word_embed.weight", "head_logits.weight"} | of_block
