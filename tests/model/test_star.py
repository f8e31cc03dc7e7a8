"""The transformer against the recorded runs of the public implementation, and the properties that must always hold."""

import dataclasses
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from star_dist.errors import UserError
from star_dist.model import attention
from star_dist.model.config import StarConfig
from star_dist.model.initialization import initialize_weights
from star_dist.model.layout import PackedLayout
from star_dist.model.rope import axis_coordinates, schedule_rotary
from star_dist.model.star import STAR, Head, pack_inputs
from star_dist.public_layout import check_weights
from star_dist.scales import ScaleSchedule
from tests.model.flash_stand_in import StandIn
from tests.ranks import run_ranks

SCHEDULE = ScaleSchedule((1, 2, 3, 4))
TINY = StarConfig(depth=2, width=32, heads=2, scales=SCHEDULE.sides, vocab_size=64, code_dim=8, text_width=16)
CPU_KERNELS = ("sdpa", "reference", "flash")  # flash through its stand-in
PUBLISHED_PARAMETERS = {16: 273_909_248, 30: 1_676_809_096}


@pytest.fixture(params=CPU_KERNELS)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    use_flash_stand_in(monkeypatch)
    yield request.param
    attention.choose_kernel.cache_clear()


def use_flash_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets `flash` run here: the library's functions replaced by their stand-in, everything of ours as on a GPU."""
    attention.choose_kernel.cache_clear()
    stand_in = StandIn(precise=True).kernel(SCHEDULE.ends[1])
    monkeypatch.setattr(attention, "flash_kernel", lambda *_, **__: stand_in)


def golden_model(golden: dict[str, torch.Tensor], kernel: str = "auto") -> STAR:
    config = StarConfig(
        depth=2, width=128, heads=2, scales=(1, 2, 3, 4), vocab_size=64, code_dim=8, text_width=48,
        rope_convention="public",
    )  # fmt: skip
    model = STAR(config, kernel)
    public = {name.removeprefix("weights."): t.float() for name, t in golden.items() if name.startswith("weights.")}
    model.load_state_dict(check_weights(public, model, "golden"))
    return model.eval().requires_grad_(False)


def golden_text(golden: dict[str, torch.Tensor], rows: list[int]) -> tuple[torch.Tensor, torch.Tensor, tuple[int, ...]]:
    lengths = tuple(int(golden["text_mask"][row].sum()) for row in rows)
    hidden = torch.cat([golden["text_hidden"][row, :length] for row, length in zip(rows, lengths)])
    return hidden, golden["text_pooled"][rows], lengths


def test_logits_of_the_public_implementation(golden: dict[str, torch.Tensor], kernel: str) -> None:
    hidden, pooled, lengths = golden_text(golden, [0, 1, 2])
    layout = PackedLayout.uniform(SCHEDULE, 3, lengths)
    inputs = pack_inputs(golden["teacher_forcing_input"])
    logits = golden_model(golden, kernel)(inputs, hidden, pooled, layout=layout).view(3, 30, 64)
    assert (logits - golden["logits"]).abs().max() < 1e-4  # measured: 2.1e-6


def test_rows_alone_give_the_same_logits(golden: dict[str, torch.Tensor], kernel: str) -> None:
    model = golden_model(golden, kernel)
    for row in range(3):
        hidden, pooled, lengths = golden_text(golden, [row])
        inputs = pack_inputs(golden["teacher_forcing_input"][row : row + 1])
        logits = model(inputs, hidden, pooled, layout=PackedLayout.uniform(SCHEDULE, 1, lengths))
        assert (logits - golden["logits"][row]).abs().max() < 1e-4


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="FlexAttention on a CPU needs a C++ compiler")
def test_logits_of_the_public_implementation_through_flex(golden: dict[str, torch.Tensor]) -> None:
    hidden, pooled, lengths = golden_text(golden, [0, 1, 2])
    layout = PackedLayout.uniform(SCHEDULE, 3, lengths)

    def error() -> float:
        with torch.no_grad():
            inputs = pack_inputs(golden["teacher_forcing_input"])
            logits = golden_model(golden, "flex")(inputs, hidden, pooled, layout=layout)
        return (logits.view(3, 30, 64) - golden["logits"]).abs().max().item()

    # In a process of its own: the compiler starts threads, after which no test could fork.
    assert run_ranks(error, 1)[0] < 1e-4


def test_rotations_of_the_public_implementation(golden: dict[str, torch.Tensor]) -> None:
    cosines, sines = schedule_rotary(golden_model(golden).config, SCHEDULE)
    for channel, sign in ((0, -1), (1, 1)):  # of every pair
        assert (cosines[:, channel::2] - golden["rope_cos"]).abs().max() < 1e-6
        assert (sines[:, channel::2] - sign * golden["rope_sin"]).abs().max() < 1e-6


def test_equation_2_of_the_paper() -> None:
    assert axis_coordinates(4, "paper", 64).tolist() == [16, 32, 48, 64]
    assert axis_coordinates(1, "paper", 64).tolist() == [64]
    assert axis_coordinates(5, "public", 64).tolist() == [0, 16, 32, 48, 64]
    assert axis_coordinates(1, "public", 64).tolist() == [0]


@pytest.mark.parametrize("depth", [16, 30])
def test_published_layout(golden_dir: Path, depth: int, caplog: pytest.LogCaptureFixture) -> None:
    layout = json.loads((golden_dir / "star_official_layout.json").read_text())[str(depth)]
    with torch.device("meta"):
        model = STAR(StarConfig(depth=depth, scales=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16)))
        assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED_PARAMETERS[depth]
    public = {name: torch.zeros(()).expand(shape) for name, shape in layout.items()}
    assert set(check_weights(public, model, "public")) == set(dict(model.named_parameters()))
    assert caplog.messages == ["public: ignored class_emb.weight, which STAR never uses"]


def test_weights_that_do_not_fit_are_named() -> None:
    model = STAR(TINY)
    weights = dict(model.state_dict())
    weights["surplus"] = torch.zeros(1)
    del weights["pos_start"]
    weights["head_logits.bias"] = torch.zeros(3)
    with pytest.raises(UserError) as error:
        check_weights(weights, model, "file")
    for said in ("missing pos_start", "unknown surplus", "head_logits.bias has shape (3,), expected (64,)"):
        assert said in str(error.value)
    weights = dict(model.state_dict()) | {"blocks.0.attn.zero_k_bias": torch.ones(32)}
    with pytest.raises(UserError, match="zero_k_bias must be zero"):
        check_weights(weights, model, "file")


@pytest.fixture
def tiny() -> STAR:
    model = STAR(TINY)
    initialize_weights(model, seed=1)
    with torch.no_grad():
        model.head_logits.weight.mul_(50)  # so that differences would show
    return model


def random_batch(lengths: tuple[int, ...], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(len(lengths), SCHEDULE.num_tokens - 1, 8, generator=generator)
    return (
        inputs,
        torch.randn(sum(lengths), 16, generator=generator),
        torch.randn(len(lengths), 16, generator=generator),
    )


@pytest.mark.parametrize("lengths", [(3, 5, 2), (4, 4, 4)])
def test_a_rows_text_conditions_that_row_alone(tiny: STAR, kernel: str, lengths: tuple[int, ...]) -> None:
    tiny.attention = kernel
    layout = PackedLayout.uniform(SCHEDULE, 3, lengths)
    inputs, hidden, pooled = random_batch(lengths)
    before = tiny(pack_inputs(inputs), hidden, pooled, layout=layout).view(3, -1, 64)
    start = lengths[0]
    changed = hidden.clone()
    changed[start : start + lengths[1]] += 1
    after = tiny(pack_inputs(inputs), changed, pooled, layout=layout).view(3, -1, 64)
    assert torch.equal(before[0], after[0]) and torch.equal(before[2], after[2])
    assert (before[1] - after[1]).abs().max() > 1e-3


def test_later_scales_never_reach_earlier_logits(tiny: STAR, kernel: str) -> None:
    tiny.attention = kernel
    lengths = (3, 5)
    layout = PackedLayout.uniform(SCHEDULE, 2, lengths)
    inputs, hidden, pooled = random_batch(lengths)
    before = tiny(pack_inputs(inputs), hidden, pooled, layout=layout).view(2, -1, 64)
    for scale in range(1, len(SCHEDULE)):
        start, end = SCHEDULE.starts[scale], SCHEDULE.ends[scale]
        changed = inputs.clone()
        changed[:, start - 1 : end - 1] += 1
        after = tiny(pack_inputs(changed), hidden, pooled, layout=layout).view(2, -1, 64)
        assert torch.equal(before[:, :start], after[:, :start])
        assert (before[:, start:end] - after[:, start:end]).abs().max() > 1e-3


def test_samples_of_several_resolutions_pack_without_touching_each_other(kernel: str) -> None:
    model = STAR(TINY, kernel)
    initialize_weights(model, seed=1)
    schedules = (ScaleSchedule((1, 2, 3, 4)), ScaleSchedule((1, 2)), ScaleSchedule((1, 3, 6)), ScaleSchedule((1, 3, 6)))
    lengths = (3, 1, 4, 2)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(schedule.num_tokens, 8, generator=generator) for schedule in schedules]
    texts = [torch.randn(length, 16, generator=generator) for length in lengths]
    pooled = torch.randn(4, 16, generator=generator)
    packed = model(torch.cat(inputs), torch.cat(texts), pooled, layout=PackedLayout(schedules, lengths))
    alone = [
        model(inputs[i], texts[i], pooled[i : i + 1], layout=PackedLayout((schedules[i],), (lengths[i],)))
        for i in range(4)
    ]
    assert (packed - torch.cat(alone)).abs().max() < 1e-5


def test_kernels_agree_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    use_flash_stand_in(monkeypatch)
    gradients = {}
    lengths = (3, 5, 2)
    inputs, hidden, pooled = random_batch(lengths)
    targets = torch.randint(64, (3 * SCHEDULE.num_tokens,), generator=torch.Generator().manual_seed(0))
    for kernel in CPU_KERNELS:
        model = STAR(TINY, kernel)
        initialize_weights(model, seed=1)
        layout = PackedLayout.uniform(SCHEDULE, 3, lengths)
        losses, _ = model(pack_inputs(inputs), hidden, pooled, targets, layout=layout)
        losses.mean().backward()
        gradients[kernel] = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, reference in gradients["reference"].items():
        for kernel in ("sdpa", "flash"):
            assert (gradients[kernel][name] - reference).abs().max() < 1e-6
    attention.choose_kernel.cache_clear()


def test_every_parameter_gets_a_gradient(tiny: STAR) -> None:
    lengths = (3, 5)
    inputs, hidden, pooled = random_batch(lengths)
    targets = torch.zeros(2 * SCHEDULE.num_tokens, dtype=torch.long)
    tiny(pack_inputs(inputs), hidden, pooled, targets, layout=PackedLayout.uniform(SCHEDULE, 2, lengths))[
        0
    ].sum().backward()
    without = [
        name for name, parameter in tiny.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]
    assert without == []


@pytest.mark.parametrize("switch", [{"positions": "learned"}, {"cross_attention": False}])
def test_the_papers_ablations(switch: dict) -> None:
    config = StarConfig(**{**TINY.__dict__, **switch})
    model = STAR(config)
    initialize_weights(model, seed=1)
    names = set(dict(model.named_parameters()))
    assert ("pos_embed.weight" in names) == ("positions" in switch)
    assert any("cross_attn" in name for name in names) == ("cross_attention" not in switch)
    lengths = (3, 5)
    inputs, hidden, pooled = random_batch(lengths)
    logits = model(pack_inputs(inputs), hidden, pooled, layout=PackedLayout.uniform(SCHEDULE, 2, lengths))
    assert logits.isfinite().all()


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_heads_that_flash_attention_does_not_take_are_refused(positions: str) -> None:
    with pytest.raises(ValueError, match=r"width 48 / heads 4 gives 12 channels a head, .* a multiple of 8; change"):
        StarConfig(depth=2, width=48, heads=4, scales=SCHEDULE.sides, positions=positions)
    assert StarConfig(depth=2, width=48, heads=6, scales=SCHEDULE.sides, positions=positions).head_dim == 8


def test_loss_starts_at_the_uniform_one() -> None:
    model = STAR(TINY)
    initialize_weights(model, seed=1)
    lengths = (3, 5)
    inputs, hidden, pooled = random_batch(lengths)
    targets = torch.randint(64, (2 * SCHEDULE.num_tokens,))
    losses, _ = model(pack_inputs(inputs), hidden, pooled, targets, layout=PackedLayout.uniform(SCHEDULE, 2, lengths))
    assert losses.mean().item() == pytest.approx(math.log(64), abs=0.02)


def test_head_and_loss_are_float32_in_bf16() -> None:
    model = STAR(TINY).bfloat16()
    initialize_weights(model, seed=1)
    inputs, hidden, pooled = random_batch((3, 5))
    layout = PackedLayout.uniform(SCHEDULE, 2, (3, 5))
    logits = model(pack_inputs(inputs), hidden, pooled, layout=layout)
    assert logits.dtype == torch.float32
    exact = STAR(TINY)
    initialize_weights(exact, seed=1)
    assert (logits - exact(pack_inputs(inputs), hidden, pooled, layout=layout)).abs().max() < 2e-3  # logits of 0.05


@pytest.mark.parametrize("targets", [None, torch.arange(6)])
def test_the_heads_norm_is_float32_in_bf16(targets: torch.Tensor | None) -> None:
    """Bit for bit what the same rows give in float32: a norm in bf16 would round them before the projection."""
    head = Head(16, 64).bfloat16()
    rows = torch.randn(6, 16).add(3).bfloat16()
    torch.testing.assert_close(head(rows, targets), head(rows.float(), targets), rtol=0, atol=0)


def test_a_training_step_never_waits_for_the_device(tiny: STAR) -> None:
    """Reading a value on the host is `_local_scalar_dense`; forward and backward pass have none."""

    class CountReads(TorchDispatchMode):
        reads = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.reads += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
            return function(*args, **(kwargs or {}))

    layout = PackedLayout.uniform(SCHEDULE, 2, (3, 5))
    inputs, hidden, pooled = random_batch((3, 5))
    targets = torch.zeros(2 * SCHEDULE.num_tokens, dtype=torch.long)
    with CountReads() as count:
        losses, _ = tiny(pack_inputs(inputs), hidden, pooled, targets, layout=layout)
        losses.sum().backward()
        assert count.reads == 0
        losses.sum().item()
        assert count.reads == 1  # so the counter counts


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_tokens_of_one_scale_are_told_apart_by_their_places(positions: str) -> None:
    model = STAR(StarConfig(**{**TINY.__dict__, "positions": positions}))
    initialize_weights(model, seed=1)
    inputs, hidden, pooled = random_batch((3,))
    with torch.no_grad():
        model.head_logits.weight.mul_(50)
        inputs[:, :4], inputs[:, 4:] = 1, 2
        logits = model(pack_inputs(inputs), hidden, pooled, layout=PackedLayout.uniform(SCHEDULE, 1, (3,)))
    for start, end in zip(SCHEDULE.starts, SCHEDULE.ends):
        distances = torch.cdist(logits[start:end], logits[start:end]).fill_diagonal_(1)
        assert distances.min() > 1e-3


def test_queries_are_scaled_up_to_a_hundred(tiny: STAR) -> None:
    attention = tiny.blocks[0].attn
    with torch.no_grad():
        attention.scale_mul_1H11.copy_(torch.tensor([0.5, 9.0]).view(1, 2, 1, 1))
    assert attention.query_factor_H1().flatten().tolist() == pytest.approx([math.exp(0.5), 100.0])


def test_the_models_rotations_follow_the_papers_coordinates() -> None:
    """Channel 0 turns by the column, the first one of the second half by the row, both at frequency 1."""
    cosines, sines = schedule_rotary(TINY, ScaleSchedule((1, 2)))
    angles = torch.tensor([[64, 64], [32, 32], [64, 32], [32, 64], [64, 64]]).float()  # column and row of each token
    assert torch.allclose(cosines[:, [0, 8]], angles.cos()) and torch.allclose(sines[:, [1, 9]], angles.sin())
    half = schedule_rotary(dataclasses.replace(TINY, rope_extent=32.0), ScaleSchedule((1, 2)))[0]
    assert torch.allclose(half[:, [0, 8]], (angles / 2).cos())
