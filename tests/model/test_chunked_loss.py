"""The chunked loss against PyTorch's, in value, gradient and memory."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from star_dist.model import chunked_loss, star
from star_dist.model.chunked_loss import LinearCrossEntropy, fast_float32_products
from star_dist.model.star import Head


@pytest.fixture
def problem() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((11, 6), (9, 6), (9,))
    )
    targets = torch.randint(9, (11,), generator=generator)
    return x, weight, bias, targets


@pytest.mark.parametrize("chunk", [1, 4, 11, 100])
def test_losses_hits_and_gradients_are_those_of_cross_entropy(
    problem: tuple[torch.Tensor, ...], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked_loss, "LOSS_CHUNK_TOKENS", chunk)
    *leaves, targets = problem
    gradient = torch.linspace(-1, 2, 11, dtype=torch.float64)
    found_leaves, wanted_leaves = ([leaf.clone().requires_grad_() for leaf in leaves] for _ in range(2))
    losses, hits = LinearCrossEntropy.apply(*found_leaves, targets)
    logits = F.linear(*wanted_leaves)
    wanted = F.cross_entropy(logits, targets, reduction="none")
    assert torch.allclose(losses, wanted, rtol=1e-12) and torch.equal(hits, logits.argmax(-1) == targets)
    for found, expected in zip(
        torch.autograd.grad(losses, found_leaves, gradient), torch.autograd.grad(wanted, wanted_leaves, gradient)
    ):
        assert torch.allclose(found, expected, rtol=1e-10, atol=1e-14)


def test_bf16_weights_get_bf16_gradients(problem: tuple[torch.Tensor, ...]) -> None:
    x, weight, bias, targets = problem
    leaves = [x.float().requires_grad_(), weight.bfloat16().requires_grad_(), bias.bfloat16().requires_grad_()]
    losses, _ = LinearCrossEntropy.apply(*leaves, targets)
    assert losses.dtype == torch.float32
    losses.sum().backward()
    assert [leaf.grad.dtype for leaf in leaves] == [torch.float32, torch.bfloat16, torch.bfloat16]


def test_no_logits_of_the_whole_batch_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.model.test_attention import CountBytes

    monkeypatch.setattr(chunked_loss, "LOSS_CHUNK_TOKENS", 16)
    x = torch.randn(256, 4, requires_grad=True)
    weight, bias = torch.randn(64, 4, requires_grad=True), torch.randn(64, requires_grad=True)
    with CountBytes() as count:
        losses, _ = LinearCrossEntropy.apply(x, weight, bias, torch.zeros(256, dtype=torch.long))
        losses.sum().backward()
    assert count.largest <= 256 * 4 * 4  # x's own gradient; all logits would be 256 * 64 * 4


def test_all_products_of_the_head_are_of_that_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    products = {"linear": F.linear, "addmm": torch.addmm, "mm": torch.mm}
    seen = []

    def noted(name: str) -> Callable[..., torch.Tensor]:
        def product(*arguments: object, **options: object) -> torch.Tensor:
            seen.append((name, torch.backends.cuda.matmul.fp32_precision))
            return products[name](*arguments, **options)

        return product

    for module, name in ((F, "linear"), (torch, "addmm"), (torch, "mm")):
        monkeypatch.setattr(module, name, noted(name))
    for module in (chunked_loss, star):  # as on a GPU
        on_gpu = lambda stored, _: fast_float32_products(stored, torch.device("cuda"))
        monkeypatch.setattr(module, "fast_float32_products", on_gpu)
    head, x = Head(4, 8).bfloat16(), torch.randn(3, 4, requires_grad=True)
    head(x)
    head(x, torch.zeros(3, dtype=torch.long))[0].sum().backward()
    assert seen == [("linear", "tf32"), ("addmm", "tf32"), ("addmm", "tf32"), ("mm", "tf32")]


def test_float32_products_are_tf32_only_with_bf16_weights_on_a_gpu() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    assert before != "tf32"
    for dtype, device, precision in (
        (torch.bfloat16, cuda, "tf32"),
        (torch.float32, cuda, before),
        (torch.bfloat16, cpu, before),
    ):
        with fast_float32_products(dtype, device):
            assert products.fp32_precision == precision
        assert products.fp32_precision == before
