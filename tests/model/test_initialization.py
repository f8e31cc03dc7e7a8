import math

import torch

from star_dist.model.config import StarConfig
from star_dist.model.initialization import initial_value, initialize_weights
from star_dist.model.star import STAR

CONFIG = StarConfig(depth=3, width=128, heads=2, scales=(1, 2, 3), vocab_size=512, code_dim=8, text_width=64)


def test_statistics_follow_the_table() -> None:
    model = STAR(CONFIG)
    initialize_weights(model, seed=0)
    cut = 0.8796  # standard deviation of a unit normal cut at 2
    std = cut / math.sqrt(3 * 128)
    parameters = dict(model.named_parameters())
    assert abs(parameters["blocks.0.attn.mat_qkv.weight"].std().item() / std - 1) < 0.03
    assert abs(parameters["encoder_proj.weight"].std().item() / std - 1) < 0.03
    assert abs(parameters["blocks.1.ffn.fc2.weight"].std().item() / (std / math.sqrt(9)) - 1) < 0.03
    assert abs(parameters["head_logits.weight"].std().item() / (std * 0.02) - 1) < 0.03
    assert torch.allclose(parameters["blocks.0.cross_attn.scale_mul_1H11"].exp(), torch.tensor(4.0))
    assert not parameters["blocks.2.attn.q_bias"].any()


def test_weights_are_a_function_of_seed_and_name() -> None:
    shape = torch.Size([16, 16])
    same = initial_value("word_embed.weight", shape, CONFIG, seed=3)
    assert torch.equal(same, initial_value("word_embed.weight", shape, CONFIG, seed=3))
    assert not torch.equal(same, initial_value("word_embed.weight", shape, CONFIG, seed=4))
    assert not torch.equal(same, initial_value("encoder_proj.weight", shape, CONFIG, seed=3))
