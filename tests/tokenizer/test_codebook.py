"""Which codes count as used, and what those that do not are moved onto."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from star_dist.scales import ScaleSchedule
from star_dist.tokenizer.codebook import codebook_usage, move_codes, residual_cells, unused_codes
from star_dist.tokenizer.config import VQVAEConfig
from star_dist.tokenizer.quantizer import MultiScaleQuantizer

SCHEDULE = ScaleSchedule((1, 2, 4))


@pytest.fixture
def quantizer() -> MultiScaleQuantizer:
    torch.manual_seed(0)
    return MultiScaleQuantizer(VQVAEConfig(vocab_size=8, code_dim=4, scales=SCHEDULE.sides))


def test_usage_counts_recent_hits_and_perplexity_is_the_exponential_of_entropy(quantizer: MultiScaleQuantizer) -> None:
    single_hit = 0.02  # in an average that decays by 0.98 a step
    quantizer.ema_vocab_hit_SV[0, 0] = 1.0
    quantizer.ema_vocab_hit_SV[1, :2] = torch.tensor([3.0, 1.0])
    quantizer.ema_vocab_hit_SV[2, 2:] = single_hit * 0.98**34
    quantizer.ema_vocab_hit_SV[2, 5:] *= 0.98
    assert codebook_usage(quantizer, SCHEDULE) == pytest.approx(
        {
            "codebook/used": 5,
            "codebook/used_scale_1": 1,
            "codebook/used_scale_2": 2,
            "codebook/used_scale_4": 3,
            "codebook/perplexity_scale_1": 1,
            "codebook/perplexity_scale_2": 0.75**-0.75 * 0.25**-0.25,
            "codebook/perplexity_scale_4": pytest.approx(6, rel=1e-3),
        }
    )
    assert unused_codes(quantizer).tolist() == [5, 6, 7]


def test_residual_cells_are_what_the_tokens_stand_for(quantizer: MultiScaleQuantizer) -> None:
    latent = torch.randn(2, 4, 4, 4)
    cells = residual_cells(quantizer, latent, SCHEDULE)
    nearest = torch.cdist(cells, quantizer.embedding.weight).argmin(1)
    assert torch.equal(nearest, quantizer.encode(latent, SCHEDULE).flatten())


def test_moved_codes_lie_on_cells_and_forget_their_optimizer_state() -> None:
    codebook = nn.Parameter(torch.zeros(4, 2))
    optimizer = torch.optim.AdamW([codebook])
    codebook.grad = torch.ones(4, 2)
    optimizer.step()
    stays = codebook[0].tolist()
    cells = torch.randn(10, 2)
    move_codes(codebook, torch.tensor([1, 3]), cells, np.random.default_rng(0), [optimizer])
    assert all(code in cells.tolist() for code in codebook[[1, 3]].tolist())
    assert codebook[[0, 2]].tolist() == [stays, stays]
    for name in ("exp_avg", "exp_avg_sq"):
        assert optimizer.state[codebook][name].bool().tolist() == [[True] * 2, [False] * 2] * 2
