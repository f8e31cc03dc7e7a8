"""Dropped tokens: drawn from seed, step and sample, unbiased in the loss, and never seen."""

import pytest
import torch

from star_dist.model.config import StarConfig
from star_dist.model.initialization import initialize_weights
from star_dist.model.kernels.reference import ReferenceKernel
from star_dist.model.layout import PackedLayout
from star_dist.model.star import STAR, pack_inputs
from star_dist.scales import ScaleSchedule
from star_dist.train.token_dropping import TokenDropping

CPU = torch.device("cpu")
FULL = ScaleSchedule((1, 2, 3, 5))


def test_positions_are_a_function_of_seed_step_and_sample() -> None:
    dropping = TokenDropping(FULL, FULL.keeping(0.4, 2), seed=1, device=CPU)
    assert dropping.schedule.lengths == (1, 4, 4, 10) and dropping.schedule.num_tokens == 19
    found = dropping.positions([7, 8, 7], step=3)
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])
    assert torch.equal(dropping.positions([8], step=3)[0], found[1])
    assert not torch.equal(dropping.positions([7], step=4)[0], found[0])
    assert not torch.equal(TokenDropping(FULL, FULL.keeping(0.4, 2), seed=2, device=CPU).positions([7], 3)[0], found[0])
    for row in found:
        assert torch.equal(row, row.unique()) and row[:5].tolist() == [0, 1, 2, 3, 4]


def test_the_loss_is_unbiased() -> None:
    """The mean over many draws of the weighted sum of kept values is the sum of all of them."""
    dropping = TokenDropping(FULL, FULL.keeping(0.4, 2), seed=0, device=CPU)
    values_L = torch.arange(1.0, FULL.num_tokens + 1)
    positions = dropping.positions(range(4000), step=0)
    restored = dropping.restore(values_L[positions], positions)
    assert restored.shape == (4000, FULL.num_tokens)
    assert restored.mean(0) == pytest.approx(values_L.numpy(), rel=0.12)
    assert restored.sum(1).mean().item() == pytest.approx(values_L.sum().item(), rel=0.01)


def tiny_model(positions: str) -> STAR:
    """Whose logits are large enough for differences to show."""
    config = StarConfig(
        depth=2, width=32, heads=2, scales=FULL.sides, vocab_size=64, code_dim=8, text_width=16, positions=positions
    )
    model = STAR(config)
    initialize_weights(model, seed=1)
    with torch.no_grad():
        model.head_logits.weight.mul_(50)
    return model


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_the_model_sees_kept_tokens_at_their_places_and_no_others(positions: str) -> None:
    model = tiny_model(positions)
    generator = torch.Generator().manual_seed(0)
    inputs = pack_inputs(torch.randn(2, FULL.num_tokens - 1, 8, generator=generator)).unflatten(0, (2, -1))
    text, pooled = torch.randn(7, 16, generator=generator), torch.randn(2, 16, generator=generator)

    def logits(dropping: TokenDropping, inputs: torch.Tensor) -> torch.Tensor:
        kept = dropping.positions([3, 4], step=0)
        rows = torch.arange(2)[:, None]
        layout = PackedLayout.uniform(dropping.schedule, 2, (3, 4))
        flat = kept.flatten()
        return model(inputs[rows, kept].flatten(0, 1), text, pooled, layout=layout, positions_T=flat).unflatten(
            0, (2, -1)
        )

    everything = model(inputs.flatten(0, 1), text, pooled, layout=PackedLayout.uniform(FULL, 2, (3, 4)))
    assert (
        logits(TokenDropping(FULL, FULL.keeping(1.0, 2), 0, device=CPU), inputs).flatten(0, 1) - everything
    ).abs().max() < 1e-5
    dropping = TokenDropping(FULL, FULL.keeping(0.4, 1), 0, device=CPU)
    found = logits(dropping, inputs)
    earlier = FULL.ends[2]
    assert (found[:, :earlier] - everything.unflatten(0, (2, -1))[:, :earlier]).abs().max() < 1e-5
    changed = inputs.clone()
    kept = dropping.positions([3, 4], step=0)
    dropped = torch.ones(2, FULL.num_tokens, dtype=torch.bool).scatter(1, kept, False)
    changed[dropped] = float("nan")
    assert torch.equal(logits(dropping, changed), found)


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_kept_tokens_are_those_of_a_whole_sample_that_does_not_see_the_others(
    positions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(positions)
    generator = torch.Generator().manual_seed(0)
    inputs, text, pooled = (
        torch.randn(shape, generator=generator) for shape in ((2, FULL.num_tokens, 8), (7, 16), (2, 16))
    )
    dropping = TokenDropping(FULL, FULL.keeping(0.4, 2), 0, device=CPU)
    kept, rows = dropping.positions([3, 4], step=0), torch.arange(2)[:, None]
    layout = PackedLayout.uniform(dropping.schedule, 2, (3, 4))
    found = model(inputs[rows, kept].flatten(0, 1), text, pooled, layout=layout, positions_T=kept.flatten())

    class Hiding(ReferenceKernel):
        def prepare_image(self, layout: PackedLayout, device: torch.device) -> list[torch.Tensor]:
            shown = torch.zeros(2, FULL.num_tokens, dtype=torch.bool).scatter(1, kept, True)
            return [visible & row for visible, row in zip(super().prepare_image(layout, device), shown)]

    monkeypatch.setattr("star_dist.model.star.choose_kernel", lambda *_, **__: Hiding())
    whole = model(inputs.flatten(0, 1), text, pooled, layout=PackedLayout.uniform(FULL, 2, (3, 4)))
    assert (found - whole.view(2, FULL.num_tokens, -1)[rows, kept].flatten(0, 1)).abs().max() < 1e-4
