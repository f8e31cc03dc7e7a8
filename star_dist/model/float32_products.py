"""How precise products and convolutions of float32 numbers are, for a while.

Through PyTorch's `fp32_precision` alone: its older switches (`allow_tf32`, `get_float32_matmul_precision`) refuse to be
read where a process has set what they have no word for. Afterwards they read as before.
https://docs.pytorch.org/docs/stable/notes/cuda.html#tensorfloat-32-tf32-on-ampere-and-later-devices
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def float32_precision(precision: str, *backends: Any) -> Iterator[None]:
    """`fp32_precision` of parts of torch.backends, for the whole process.

    A part without one of its own takes that of what stands above it, as `cudnn.conv` and `cuda.matmul` that of `cudnn`:
    give that first, and such a part is left as it is.
    """
    changed = []
    try:
        for backend in backends:
            before = backend.fp32_precision
            if before != precision:
                backend.fp32_precision = precision
                changed.append((backend, before))
        yield
    finally:
        for backend, before in reversed(changed):
            backend.fp32_precision = "none"  # that of what stands above it, which was read like one of its own
            if backend.fp32_precision != before:
                backend.fp32_precision = before
