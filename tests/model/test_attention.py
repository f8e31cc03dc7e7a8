"""Every attention kernel against the reference, and what each must never do: see later scales, or grow with L^2."""

import dataclasses
import gc
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.text_by_flex import TextByFlex
from star_dist.config import RunConfig
from star_dist.errors import UserError
from star_dist.model import attention
from star_dist.model.attention import PackedAttention, choose_kernel
from star_dist.model.block_functions import PLAIN, BlockFunctions, CompiledBlocks
from star_dist.model.kernels import flash, flex
from star_dist.model.kernels.base import Kernel, KernelUnavailable
from star_dist.model.kernels.reference import ReferenceKernel, block_causal_mask
from star_dist.model.kernels.scale_by_scale import (
    SumPrefixes,
    scale_prefixes,
    sum_prefixes,
    sum_prefixes_for_compiler,
)
from star_dist.model.kernels.sdpa import SdpaKernel
from star_dist.model.layout import PackedLayout
from star_dist.scales import ScaleSchedule
from tests.model.flash_stand_in import StandIn
from tests.ranks import run_ranks

SCHEDULES = {
    256: ScaleSchedule((1, 2, 3, 4, 5, 6, 8, 10, 13, 16)),
    512: ScaleSchedule((1, 2, 3, 4, 6, 9, 13, 18, 24, 32)),
    1024: ScaleSchedule((1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)),
}
SMALL = ScaleSchedule((1, 2, 3, 5))
RAGGED = PackedLayout((SCHEDULES[256], SCHEDULES[256], SMALL, SCHEDULES[512], SMALL, SMALL), (3, 77, 1, 20, 5, 8))
CPU = torch.device("cpu")
ALL = 10**6
BF16_TOLERANCE = 1e-2  # of the largest value; measured worst case 4.0e-3, and bf16 itself rounds to 3.9e-3

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="FlexAttention on a CPU needs a C++ compiler")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")

KERNELS = {
    "sdpa": SdpaKernel,
    "flash, own call per scale": lambda: StandIn(precise=True).kernel(0),
    "flash, leading scales gathered": lambda: StandIn(precise=True).kernel(flash.GATHERED_TOKENS),
    "flash, all gathered": lambda: StandIn(precise=True).kernel(ALL),
}


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> Kernel:
    return KERNELS[request.param]()


def random_inputs(
    tokens: int, heads: int, channels: int, dtype: torch.dtype, device: torch.device = CPU
) -> list[Tensor]:
    """Queries, keys, values and an output gradient; queries and keys of the size that a trained model has."""
    generator = torch.Generator().manual_seed(0)
    query, key, value, gradient = torch.randn(4, tokens, heads, channels, generator=generator)
    key = torch.nn.functional.normalize(key, dim=-1)
    query = 4 * torch.nn.functional.normalize(query, dim=-1)
    return [x.to(device, dtype) for x in (query, key, value, gradient)]


def forward_and_backward(kernel: Kernel, layout: PackedLayout, inputs: list[Tensor]) -> list[Tensor]:
    """Output and the gradients of queries, keys and values."""
    *inputs, gradient = inputs
    leaves = [x.detach().requires_grad_() for x in inputs]
    output = PackedAttention(layout, kernel, gradient.device).attend_image(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, gradient)]


def errors(found: list[Tensor], wanted: list[Tensor]) -> list[float]:
    """Largest difference of each tensor, over the largest value that it should hold."""
    return [((f.double() - w.double()).abs().max() / w.double().abs().max()).item() for f, w in zip(found, wanted)]


# ----------------------------------------------------------------------------------------------------- agreement


@lru_cache
def reference_run(resolution: int) -> tuple[PackedLayout, list[Tensor], list[Tensor]]:
    """Computed once for all kernels: at 1024 pixels it takes seconds and a gigabyte."""
    layout = PackedLayout.uniform(SCHEDULES[resolution], 2 if resolution < 1024 else 1)
    inputs = random_inputs(layout.num_tokens, 1, 8, torch.float32)
    return layout, inputs, forward_and_backward(ReferenceKernel(), layout, inputs)


@pytest.mark.parametrize("resolution", SCHEDULES)
def test_float32_agrees_with_the_reference(kernel: Kernel, resolution: int) -> None:
    layout, inputs, wanted = reference_run(resolution)
    assert max(errors(forward_and_backward(kernel, layout, inputs), wanted)) < 1e-5


def test_ragged_batches_agree_with_the_reference(kernel: Kernel) -> None:
    inputs = random_inputs(RAGGED.num_tokens, 2, 8, torch.float64)
    wanted = forward_and_backward(ReferenceKernel(), RAGGED, inputs)
    assert max(errors(forward_and_backward(kernel, RAGGED, inputs), wanted)) < 1e-12


@lru_cache
def reference_run_of_bf16_inputs(layout: PackedLayout) -> tuple[list[Tensor], list[Tensor]]:
    inputs = random_inputs(layout.num_tokens, 1, 8, torch.bfloat16)
    return inputs, forward_and_backward(ReferenceKernel(), layout, [x.float() for x in inputs])


@pytest.mark.parametrize("layout", [RAGGED, PackedLayout((SCHEDULES[1024],))], ids=["ragged 256 and 512", "1024"])
def test_bf16_agrees_with_the_reference_in_float32(kernel: Kernel, layout: PackedLayout) -> None:
    inputs, wanted = reference_run_of_bf16_inputs(layout)
    found = errors(forward_and_backward(kernel, layout, inputs), wanted)
    assert max(found) < BF16_TOLERANCE, found


def text_forward_and_backward(kernel: Kernel, layout: PackedLayout) -> list[Tensor]:
    """Of attention to the text: output and the gradients of queries, keys and values."""
    query, _, _, gradient = random_inputs(layout.num_tokens, 2, 8, torch.float64)
    key, value, *_ = random_inputs(sum(layout.text_lengths), 2, 8, torch.float64)
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    output = PackedAttention(layout, kernel, CPU).attend_text(leaves[0], lambda: (leaves[1], leaves[2]))
    return [output.detach(), *torch.autograd.grad(output, leaves, gradient)]


def test_text_attention_agrees_with_the_reference(kernel: Kernel) -> None:
    found, wanted = (text_forward_and_backward(k, RAGGED) for k in (kernel, ReferenceKernel()))
    assert max(errors(found, wanted)) < 1e-12


@pytest.mark.parametrize("longest", [20, 300])
def test_text_attention_by_flex_agrees_with_the_reference(longest: int) -> None:
    """Both passes, operation by operation: compiled, a CPU has no backward pass."""
    layout = PackedLayout(2 * (SCHEDULES[256],) + (ScaleSchedule((1, 2, 3)),), (7, longest, 3))

    def by_flex() -> list[Tensor]:
        flex._compiled = flex.flex_attention
        sys.modules["torch.nn.attention.flex_attention"]._validate_device = lambda *_: None
        return text_forward_and_backward(flex.FlexKernel(None, TextByFlex(None)), layout)

    (found,) = run_ranks(by_flex, 1)
    assert max(errors(found, text_forward_and_backward(ReferenceKernel(), layout))) < 1e-12


@needs_compiler
@pytest.mark.slow
def test_flex_agrees_with_the_reference_forward_and_ignores_later_scales() -> None:
    """In a process of its own: the compiler starts threads, after which no test could fork."""

    def compiled() -> tuple[float, bool]:
        layout = PackedLayout.uniform(SCHEDULES[256], 2)
        query, key, value, _ = random_inputs(layout.num_tokens, 2, 16, torch.float32)
        kernel = choose_kernel("flex", CPU, torch.float32, training=False)
        end = SCHEDULES[256].ends[7]
        with torch.no_grad():
            attend = lambda kernel: PackedAttention(layout, kernel, CPU).attend_image(query, key, value)
            found, wanted = map(attend, (kernel, ReferenceKernel()))
            for x in (key, value):
                x.view(2, -1, 2, 16)[:, end:] += 1
            after = attend(kernel)
        unchanged = torch.equal(*(x.view(2, -1, 2, 16)[:, :end] for x in (after, found)))
        return max(errors([found], [wanted])), unchanged

    ((error, unchanged),) = run_ranks(compiled, 1)
    assert error < 1e-5 and unchanged


@pytest.mark.parametrize("resolution", [256, 512])
def test_flex_masks_what_the_scales_mask(resolution: int) -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    from star_dist.model.kernels.flex import BLOCK, scale_block_mask

    schedule = SCHEDULES[resolution]
    length = schedule.num_tokens
    ids = torch.repeat_interleave(torch.tensor(schedule.lengths))
    found = scale_block_mask(schedule, CPU)
    wanted = create_block_mask(lambda b, h, q, k: ids[q] >= ids[k], None, None, length, length, CPU, BLOCK)
    assert torch.equal(found.to_dense(), wanted.to_dense())
    # Full blocks skip the mask. PyTorch counts none in a last block that is cut short, where ours may.
    assert torch.equal(found.full_kv_num_blocks[..., :-1], wanted.full_kv_num_blocks[..., :-1])
    positions = torch.arange(length)
    assert torch.equal(found.mask_mod(0, 0, positions[:, None], positions), block_causal_mask(schedule, CPU))


# ------------------------------------------------------------------------------------------------- later scales


def test_later_scales_change_nothing_bit_for_bit(kernel: Kernel) -> None:
    """Their keys and values are not even read: NaN there harms neither outputs nor gradients of earlier queries (those
    of earlier keys take from later queries, too)."""
    schedule = SCHEDULES[256]
    layout = PackedLayout((SMALL, schedule, schedule))
    query, key, value, gradient = random_inputs(layout.num_tokens, 2, 8, torch.float32)
    before, query_gradient, *_ = forward_and_backward(kernel, layout, [query, key, value, gradient])
    for scale in (0, 4, 8):
        end = schedule.ends[scale]
        key_changed, value_changed = key.clone(), value.clone()
        rectangle = slice(SMALL.num_tokens, None)
        seen = torch.zeros(layout.num_tokens, dtype=torch.bool)
        seen[: SMALL.num_tokens] = True
        seen[rectangle].view(2, -1)[:, :end] = True
        key_changed[~seen] = value_changed[~seen] = float("nan")
        after, gradient_after, *_ = forward_and_backward(kernel, layout, [query, key_changed, value_changed, gradient])
        assert torch.equal(after[seen], before[seen]) and torch.equal(gradient_after[seen], query_gradient[seen])


def test_gradients_of_earlier_scales_ignore_later_keys(kernel: Kernel) -> None:
    layout = PackedLayout.uniform(SMALL, 2)
    query, key, value, gradient = random_inputs(layout.num_tokens, 2, 8, torch.float32)
    end = SMALL.ends[2]
    gradient.view(2, -1, 2, 8)[:, end:] = 0
    before = forward_and_backward(kernel, layout, [query, key, value, gradient])
    for x in (key, value):
        x.view(2, -1, 2, 8)[:, end:] += 1
    after = forward_and_backward(kernel, layout, [query, key, value, gradient])
    for found, wanted in zip(after, before):
        assert torch.equal(found.view(2, -1, 2, 8)[:, :end], wanted.view(2, -1, 2, 8)[:, :end])


# ------------------------------------------------------------------------------------------- gradients and memory


both_sums = pytest.mark.parametrize("sum_prefixes", [sum_prefixes, sum_prefixes_for_compiler])


@both_sums
def test_gradients_of_the_custom_function_are_exact(sum_prefixes: SumPrefixes) -> None:
    x = torch.randn(2, SMALL.num_tokens, 1, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: scale_prefixes(x, SMALL, sum_prefixes), x)


@pytest.mark.parametrize("gathered_tokens", [0, SMALL.ends[1], ALL])
def test_gradients_of_the_whole_attention_are_exact(gathered_tokens: int) -> None:
    layout = PackedLayout((SMALL, SMALL, ScaleSchedule((1, 2))))
    stand_in = StandIn(precise=True)
    inputs = [torch.randn(layout.num_tokens, 1, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    attend = lambda q, k, v: stand_in.kernel(gathered_tokens).block_causal(q, k, v, layout)
    assert torch.autograd.gradcheck(attend, inputs, fast_mode=True)


@both_sums
def test_gradients_of_keys_are_added_in_float32(sum_prefixes: SumPrefixes) -> None:
    """Ten scales' gradients added in bf16 would round ten times."""
    schedule = SCHEDULES[256]
    x = torch.zeros(1, schedule.num_tokens, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    prefixes = scale_prefixes(x, schedule, sum_prefixes)
    parts = [torch.rand(prefix.shape).bfloat16() for prefix in prefixes]
    (found,) = torch.autograd.grad(prefixes, x, parts)
    exact = sum(torch.nn.functional.pad(p.float(), (0, 0, 0, 0, 0, schedule.num_tokens - p.shape[1])) for p in parts)
    assert torch.equal(found, exact.bfloat16())


class CountBytes(TorchDispatchMode):
    """Bytes of all tensors that operators make; views count nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.total = self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        given = {
            x.untyped_storage().data_ptr()
            for x in torch.utils._pytree.tree_leaves((args, kwargs))
            if isinstance(x, Tensor)
        }
        for result in torch.utils._pytree.tree_leaves(results):
            if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in given:
                size = result.numel() * result.element_size()
                self.total, self.largest = self.total + size, max(self.largest, size)
        return results


def test_memory_grows_with_l_not_with_its_square() -> None:
    counts = {}
    for resolution, schedule in SCHEDULES.items():
        layout = PackedLayout.uniform(schedule, 1)
        inputs = random_inputs(layout.num_tokens, 2, 8, torch.float32)
        with CountBytes() as counts[resolution]:
            forward_and_backward(SdpaKernel(), layout, inputs)
    per_token = {r: (count.total / SCHEDULES[r].num_tokens, count.largest) for r, count in counts.items()}
    token_bytes = 2 * 8 * 4
    for resolution, (total, largest) in per_token.items():
        assert largest <= 2 * SCHEDULES[resolution].num_tokens * token_bytes
        assert total < 1.15 * per_token[256][0]  # L^2 would be 3.3 and 13.9 times as much


def test_gathered_copies_are_not_kept_for_the_backward_pass() -> None:
    stand_in = StandIn(precise=True)
    layout = PackedLayout.uniform(SCHEDULES[256], 2)
    *inputs, gradient = random_inputs(layout.num_tokens, 1, 8, torch.float32)
    leaves = [x.requires_grad_() for x in inputs]
    gc.disable()
    try:
        output = stand_in.kernel(ALL).block_causal(*leaves, layout)
        (gathered,) = stand_in.keys
        assert stand_in.calls == [("varlen", (1360, 1, 8), (2 * sum(SCHEDULES[256].ends), 1, 8))]
        assert gathered() is None
        output.backward(gradient)
        del output
    finally:
        gc.enable()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)


def test_leading_scales_share_one_call() -> None:
    stand_in = StandIn()
    layout = PackedLayout((SCHEDULES[256], SCHEDULES[256], SMALL))
    *inputs, _ = random_inputs(layout.num_tokens, 2, 8, torch.bfloat16)
    stand_in.kernel(flash.GATHERED_TOKENS).block_causal(*inputs, layout)
    small, large = SMALL.num_tokens, SCHEDULES[256]
    assert stand_in.calls == [
        *(("dense", (2, large.lengths[k], 2, 8), (2, large.ends[k], 2, 8)) for k in range(6, 10)),
        ("varlen", (2 * large.ends[5] + small, 2, 8), (2 * sum(large.ends[:6]) + sum(SMALL.ends), 2, 8)),
    ]


# ----------------------------------------------------------------------------------------------------- the choice


@pytest.fixture
def fresh_choice() -> Iterator[None]:
    for cached in (choose_kernel, flash.flash_library):
        cached.cache_clear()
    yield
    for cached in (choose_kernel, flash.flash_library):
        cached.cache_clear()


def test_auto_takes_sdpa_where_flash_cannot_run() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert choose_kernel("auto", CPU, dtype, training=True).description.startswith("sdpa (PyTorch")


def test_auto_takes_flash_on_a_gpu(monkeypatch: pytest.MonkeyPatch, fresh_choice: None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(flash, "LIBRARIES", (lambda generation: StandIn().library(),))
    cuda = torch.device("cuda")
    assert choose_kernel("auto", cuda, torch.bfloat16, training=True).description == "flash (stand-in)"
    assert choose_kernel("auto", cuda, torch.float32, training=True).description.startswith("sdpa")
    with pytest.raises(KernelUnavailable, match="not torch.float32; set train.precision to bf16"):
        choose_kernel("flash", cuda, torch.float32, training=True)


def test_auto_takes_flex_where_flash_attention_4_runs_it(monkeypatch: pytest.MonkeyPatch, fresh_choice: None) -> None:
    """Text attention then goes through PyTorch's variable-length attention."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(attention, "_has_flash_attn", lambda: True)
    monkeypatch.setattr(flex, "flash_attn_4", lambda generation: StandIn().library())
    cuda = torch.device("cuda")
    kernel = choose_kernel("auto", cuda, torch.bfloat16, training=True)
    assert kernel.description.startswith("flex (FlashAttention-4, PyTorch") and kernel.backend == "FLASH"
    assert kernel.text.library.name.startswith("PyTorch")
    assert choose_kernel("auto", cuda, torch.float32, training=True).description.startswith("sdpa")
    monkeypatch.setattr(flex, "flash_attn_4", flash.flash_attn_4)  # absent here
    assert choose_kernel("flex", cuda, torch.bfloat16, training=True).backend == "TRITON"


def test_libraries_are_tried_in_order(fresh_choice: None) -> None:
    with pytest.raises(KernelUnavailable) as error:
        flash.flash_library(7)
    said = (
        "flash-attn 3 runs on compute capability 9 alone",
        "flash-attn 4 is taken from compute capability 9 on",
        "varlen attention runs from compute capability 8 on",
        "flash-attn 2 runs from compute capability 8 on",
    )
    places = [str(error.value).index(reason) for reason in said]
    assert places == sorted(places)
    assert flash.flash_library(9).name.startswith(("flash-attn", "PyTorch"))


def test_selective_checkpointing_takes_what_it_sees(monkeypatch: pytest.MonkeyPatch, fresh_choice: None) -> None:
    """Else attention would be computed twice, without a word."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(attention, "_has_flash_attn", lambda: True)
    monkeypatch.setattr(flex, "flash_attn_4", lambda generation: StandIn().library())
    unseen = dataclasses.replace(StandIn().library(), name="flash-attn 4", of_operations=False)
    monkeypatch.setattr(flash, "LIBRARIES", (lambda generation: unseen, flash.torch_varlen))

    def choose(
        name: str,
        functions: BlockFunctions,
        checkpointing: str = "selective",
        device: str = "cuda",
        dtype: torch.dtype = torch.bfloat16,
    ) -> str:
        options = {"training": True, "functions": functions, "checkpointing": checkpointing}
        return choose_kernel(name, torch.device(device), dtype, **options).description

    whole = CompiledBlocks()
    assert choose("auto", PLAIN, "full").startswith("flex") and choose("flash", PLAIN, "full") == "flash (flash-attn 4)"
    assert choose("auto", PLAIN).startswith("flash (PyTorch") and choose("flash", PLAIN).startswith("flash (PyTorch")
    assert choose("auto", whole).startswith("flex")
    with pytest.raises(KernelUnavailable, match="selective and model.attention flex, which is compiled as one"):
        choose("flex", PLAIN)
    with pytest.raises(KernelUnavailable, match="but attention to text in torch.float32 runs as it is; .* in bf16"):
        choose("auto", whole, dtype=torch.float32)
    for name, device in (("flash", "cuda"), ("auto", "cpu")):
        with pytest.raises(KernelUnavailable, match="compile is blocks and .* selective, .* has to see attention"):
            choose(name, whole, device=device)
    monkeypatch.setattr(flash, "LIBRARIES", (lambda generation: unseen,))
    flash.flash_library.cache_clear(), choose_kernel.cache_clear()
    assert choose("auto", PLAIN).startswith("sdpa")
    with pytest.raises(KernelUnavailable, match="flash-attn 4 is not seen by train.activation_checkpointing selective"):
        choose("flash", PLAIN)


def test_a_named_kernel_that_cannot_run_is_an_error(run_config: Callable[..., RunConfig]) -> None:
    from star_dist.train.precision import attention_kernel

    assert attention_kernel(run_config(), CPU, training=True).endswith(", chosen by auto")
    for name, said in (("flash", "flash needs a GPU"), ("flex", "flex cannot train on a CPU")):
        config = run_config(model={"attention": name})
        with pytest.raises(UserError, match=said):
            attention_kernel(config, CPU, training=True)
    with pytest.raises(ValueError, match="'fastest' is not one of auto, flash, flex, sdpa, reference"):
        attention.check_kernel_name("fastest")


# ----------------------------------------------------------------------------------------------------------- GPU


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("name", ["flash", "flex", "sdpa"])
@pytest.mark.parametrize("resolution", SCHEDULES)
def test_kernels_agree_on_a_gpu(name: str, resolution: int) -> None:
    device = torch.device("cuda")
    layout = PackedLayout.uniform(SCHEDULES[resolution], 2)
    inputs = random_inputs(layout.num_tokens, 2, 64, torch.bfloat16, device)
    wanted = forward_and_backward(ReferenceKernel(), layout, [x.float() for x in inputs])
    kernel = choose_kernel(name, device, torch.bfloat16, training=True)
    assert max(errors(forward_and_backward(kernel, layout, inputs), wanted)) < 2e-2


@needs_gpu
@pytest.mark.gpu
def test_flash_never_reads_later_scales_on_a_gpu() -> None:
    device = torch.device("cuda")
    layout = PackedLayout.uniform(SCHEDULES[256], 1)
    query, key, value, _ = random_inputs(layout.num_tokens, 2, 64, torch.bfloat16, device)
    kernel = choose_kernel("flash", device, torch.bfloat16, training=False)
    before = kernel.block_causal(query, key, value, layout)
    end = SCHEDULES[256].ends[7]
    key[end:] = value[end:] = float("nan")
    assert torch.equal(kernel.block_causal(query, key, value, layout)[:end], before[:end])


@needs_gpu
@pytest.mark.gpu
def test_attention_never_makes_the_host_wait() -> None:
    device = torch.device("cuda")
    layout = PackedLayout.uniform(SCHEDULES[256], 2, (3, 5))
    inputs = random_inputs(layout.num_tokens, 2, 64, torch.bfloat16, device)
    kernel = choose_kernel("flash", device, torch.bfloat16, training=True)
    forward_and_backward(kernel, layout, inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = forward_and_backward(kernel, layout, inputs)
        text = PackedAttention(layout, kernel, device).attend_text(inputs[0], lambda: (inputs[1][:8], inputs[2][:8]))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(x.isfinite().all() for x in (*results, text))
