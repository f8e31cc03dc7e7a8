"""The precision of float32 products, whatever the process has set before and by which of PyTorch's two ways."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import backends

from star_dist.model.chunked_loss import fast_float32_products
from star_dist.tokenizer.quantizer import full_float32

GPU = torch.device("cuda")
CUDA_PRODUCTS = backends.cuda.matmul
IN_FULL_FLOAT32 = backends.cudnn.conv, CUDA_PRODUCTS, backends.mkldnn.conv, backends.mkldnn.matmul
ABOVE = backends, backends.cudnn
OLDER = {
    "cudnn.allow_tf32": lambda: backends.cudnn.allow_tf32,
    "matmul.allow_tf32": lambda: CUDA_PRODUCTS.allow_tf32,
    "float32_matmul_precision": torch.get_float32_matmul_precision,
}

SETTINGS: dict[str, Callable[[], None]] = {
    "nothing": lambda: None,
    "allow_tf32": lambda: setattr(CUDA_PRODUCTS, "allow_tf32", True),
    "no cudnn.allow_tf32": lambda: setattr(backends.cudnn, "allow_tf32", False),
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "products tf32": lambda: setattr(CUDA_PRODUCTS, "fp32_precision", "tf32"),
    "convolutions ieee": lambda: setattr(backends.cudnn.conv, "fp32_precision", "ieee"),
    "cudnn tf32": lambda: setattr(backends.cudnn, "fp32_precision", "tf32"),
    "all tf32": lambda: setattr(backends, "fp32_precision", "tf32"),
    "all ieee": lambda: setattr(backends, "fp32_precision", "ieee"),
    "all bf16": lambda: setattr(backends, "fp32_precision", "bf16"),
}


@pytest.fixture(params=SETTINGS)
def settings(request: pytest.FixtureRequest) -> Iterator[dict[str, object]]:
    """A process that has set something; what all of it reads."""
    SETTINGS[request.param]()
    yield readings()
    torch.set_float32_matmul_precision("highest")
    for part in (*ABOVE, CUDA_PRODUCTS, backends.mkldnn.conv, backends.mkldnn.matmul):
        part.fp32_precision = "none"
    backends.cudnn.allow_tf32 = True


def readings() -> dict[str, object]:
    """The precision of every part, and what the older switches read, null where they refuse."""
    found: dict[str, object] = {str(i): part.fp32_precision for i, part in enumerate((*ABOVE, *IN_FULL_FLOAT32))}
    for name, read in OLDER.items():
        found[name] = None
        with suppress(RuntimeError):
            found[name] = read()
    return found


def assert_full() -> None:
    assert [part.fp32_precision for part in IN_FULL_FLOAT32] == ["ieee"] * 4


def test_precisions_inside_and_all_settings_afterwards(settings: dict[str, object]) -> None:
    with full_float32(torch.device("cpu")):
        assert_full()
        with fast_float32_products(torch.bfloat16, GPU):
            assert CUDA_PRODUCTS.fp32_precision == "tf32"
            with full_float32(torch.device("cpu")):
                assert_full()
            assert CUDA_PRODUCTS.fp32_precision == "tf32"
        assert_full()
    assert readings() == settings
    with fast_float32_products(torch.bfloat16, GPU):
        assert CUDA_PRODUCTS.fp32_precision == "tf32"
    assert readings() == settings


def test_all_settings_after_an_exception(settings: dict[str, object]) -> None:
    with suppress(KeyError), fast_float32_products(torch.bfloat16, GPU), full_float32(torch.device("cpu")):
        raise KeyError
    assert readings() == settings


def test_what_is_set_for_all_later_still_reaches_every_part() -> None:
    """In processes of their own, because what a part has of its own at the start cannot be set again."""
    code = """
import sys, torch
from star_dist.model.chunked_loss import fast_float32_products
from star_dist.tokenizer.quantizer import full_float32
if sys.argv[1] == "used":
    with full_float32(torch.device("cpu")), fast_float32_products(torch.bfloat16, torch.device("cuda")):
        pass
backends = torch.backends
parts = backends.cudnn, backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul, backends.mkldnn.conv
for precision in ("ieee", "tf32"):
    backends.fp32_precision = precision
    print([part.fp32_precision for part in (*parts, backends.mkldnn.matmul)])
"""
    used, unused = (
        subprocess.run(
            [sys.executable, "-c", code, use],
            cwd=Path(__file__).parents[2], check=True, capture_output=True, text=True,
        ).stdout
        for use in ("used", "unused")
    )  # fmt: skip
    assert used == unused and "ieee" in used and "tf32" in used
