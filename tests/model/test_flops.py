import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from star_dist.model.config import StarConfig
from star_dist.model.flops import TRAINING_OVER_FORWARD, forward_flops
from star_dist.model.layout import PackedLayout
from star_dist.model.star import STAR
from star_dist.scales import ScaleSchedule


@pytest.mark.parametrize("cross_attention", [True, False])
def test_formula_equals_an_operator_count(cross_attention: bool) -> None:
    schedule = ScaleSchedule((1, 2, 3, 5))
    config = StarConfig(
        depth=2, width=64, heads=2, scales=schedule.sides, vocab_size=128, code_dim=8, text_width=48,
        cross_attention=cross_attention,
    )  # fmt: skip
    batch, text_tokens = 3, 7
    with torch.device("meta"):
        model = STAR(config, "sdpa")
        inputs = torch.empty(batch * schedule.num_tokens, 8)
        text, pooled = torch.empty(batch * text_tokens, 48), torch.empty(batch, 48)
    layout = PackedLayout.uniform(schedule, batch, (text_tokens,) * batch)
    with FlopCounterMode(display=False) as counter:
        model(inputs, text, pooled, layout=layout)
    assert counter.get_total_flops() == batch * sum(forward_flops(config, schedule, text_tokens).values())
    assert TRAINING_OVER_FORWARD == 3
