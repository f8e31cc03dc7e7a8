import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from star_dist.model.config import StarConfig
from star_dist.model.flops import forward_flops, training_flops
from star_dist.model.initialization import initialize_weights
from star_dist.model.layout import PackedLayout
from star_dist.model.star import STAR
from star_dist.scales import ScaleSchedule

SCHEDULE = ScaleSchedule((1, 2, 3, 5))
TEXT_TOKENS = 7


def tiny(cross_attention: bool) -> StarConfig:
    return StarConfig(
        depth=2, width=64, heads=2, scales=SCHEDULE.sides, vocab_size=128, code_dim=8, text_width=48,
        cross_attention=cross_attention,
    )  # fmt: skip


@pytest.mark.parametrize("cross_attention", [True, False])
def test_formula_equals_an_operator_count(cross_attention: bool) -> None:
    config, batch = tiny(cross_attention), 3
    with torch.device("meta"):
        model = STAR(config, "sdpa")
        inputs = torch.empty(batch * SCHEDULE.num_tokens, 8)
        text, pooled = torch.empty(batch * TEXT_TOKENS, 48), torch.empty(batch, 48)
    layout = PackedLayout.uniform(SCHEDULE, batch, (TEXT_TOKENS,) * batch)
    with FlopCounterMode(display=False) as counter:
        model(inputs, text, pooled, layout=layout)
    assert counter.get_total_flops() == batch * sum(forward_flops(config, SCHEDULE, TEXT_TOKENS).values())


@pytest.mark.parametrize("cross_attention", [True, False])
def test_training_equals_an_operator_count_of_both_passes(cross_attention: bool) -> None:
    """Of the kernel that computes all pairs, whose products are all seen, less those of the masked pairs."""
    config, tokens = tiny(cross_attention), SCHEDULE.num_tokens
    model = STAR(config, "reference")
    initialize_weights(model, seed=0)
    layout = PackedLayout.uniform(SCHEDULE, 1, (TEXT_TOKENS,))
    inputs = torch.randn(tokens, 8), torch.randn(TEXT_TOKENS, 48), torch.randn(1, 48)
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(model(*inputs, layout=layout), torch.zeros(tokens, dtype=torch.long)).backward()
    masked = 3 * config.depth * 4 * config.width * (tokens**2 - SCHEDULE.visible_pairs)
    assert counter.get_total_flops() - masked == training_flops(config, SCHEDULE, TEXT_TOKENS)
