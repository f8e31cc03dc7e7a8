"""The host queues work for the device and never waits for it, except where a report is due.

The device is PyTorch's `meta`: a value that lives there cannot be read, so reading one is an error here as it would be
a wait on a GPU, and copies that would wait are seen as operations.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizerFast

from star_dist.config import RunConfig
from star_dist.data.dataset import MicroBatch
from star_dist.model.star import STAR
from star_dist.text import TextEncoder
from star_dist.tokenizer import quantizer as quantizer_module
from star_dist.tokenizer.io import load_tokenizer
from star_dist.train.loss_report import by_scale
from star_dist.train.token_losses import TokenLosses
from tests.conftest import CAPTIONS
from tests.ranks import run_ranks
from tests.train.runs import train

META = torch.device("meta")
aten = torch.ops.aten


class BlockingCopies(TorchDispatchMode):
    """Counts copies between the CPU and the device that a GPU's host would wait for: all but those of pinned memory."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.copies = 0
        self._pinned: list[Tensor] = []

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: tuple = (), options: dict | None = None) -> Any:
        options = options or {}
        if operation is aten.is_pinned.default:
            return any(arguments[0] is tensor for tensor in self._pinned)
        if operation is aten._pin_memory.default:
            self._pinned.append(arguments[0].clone())
            return self._pinned[-1]
        if operation in (aten._to_copy.default, aten.copy_.default):
            source = arguments[1] if operation is aten.copy_.default else arguments[0]
            target = arguments[0].device if operation is aten.copy_.default else options.get("device") or source.device
            if torch.device(target).type != source.device.type:
                self.copies += 1
                if not options.get("non_blocking") or not any(source is tensor for tensor in self._pinned):
                    self.found.append(f"{operation} of {tuple(source.shape)} from {source.device} to {target}")
        return operation(*arguments, **options)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default text encoder's kind, tiny."""
    root = tmp_path_factory.mktemp("clip")
    words = ["!", *sorted({f"{word}</w>" for text in CAPTIONS for word in text.split()}), "<|startoftext|>", "<|end|>"]
    (root / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (root / "merges.txt").write_text("#version: 0.2\n")
    special = dict(pad_token="!", unk_token="!", eos_token="<|end|>", bos_token="<|startoftext|>")
    CLIPTokenizerFast(str(root / "vocab.json"), str(root / "merges.txt"), **special).save_pretrained(root)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    last = len(words) - 1
    CLIPTextModel(
        CLIPTextConfig(vocab_size=last + 1, bos_token_id=last - 1, eos_token_id=last, **sizes)
    ).save_pretrained(root)
    return root


@pytest.mark.parametrize("train", [{}, {"token_keep": 0.5, "token_drop_scales": 2, "scale_loss_power": 0.5}])
@pytest.mark.parametrize("text", ["clip", "bert", "stored"])
def test_a_micro_batch_never_waits(
    run_config: Callable[..., RunConfig],
    clip_folder: Path,
    train: dict,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # else nothing would be pinned
    monkeypatch.setattr(quantizer_module, "full_float32", lambda device: nullcontext())  # meta has no autocast
    config = run_config(text={} if text == "bert" else {"encoder": str(clip_folder)}, train=train)

    def two_micro_batches() -> tuple[int, list[str]]:
        encoder = TextEncoder(config.text, META)
        with META:
            model = STAR(config.star_config(), "sdpa", "full")
        quantizer = load_tokenizer(Path(config.tokenizer.path)).to(META).quantize
        losses = TokenLosses(config, model, quantizer, encoder, META)
        stored = TextEncoder(config.text, torch.device("cpu"))(CAPTIONS)
        batch = MicroBatch(
            sample_ids=(0, 1, 2),
            tokens_BL=torch.zeros(3, config.schedule.num_tokens, dtype=torch.int64),
            captions=CAPTIONS,
            features=tuple(stored[i] for i in range(3)) if text == "stored" else None,
            present=(True, False, True),
        )
        for _ in range(2):  # the second finds the tables that the first one made
            with BlockingCopies() as copies:
                losses_T, hits_T = losses(batch, losses.text(batch, 1), 1)
                present_B = losses.present(batch)
                losses.loss_sum(losses_T, present_B).backward()
                by_scale(losses_T.detach(), config.schedule, present_B)
                by_scale(hits_T, config.schedule, present_B)
        return copies.copies, copies.found

    # In a process of its own: a backward pass on another device starts threads, after which no test could fork.
    ((copies, found),) = run_ranks(two_micro_batches, 1)
    assert copies >= 3 and found == []


def test_waits_are_seen() -> None:
    with BlockingCopies() as copies:
        torch.zeros(3).to(META)
        torch.zeros(3).pin_memory().to(META, non_blocking=True)
        torch.zeros(3).pin_memory().to(META)
    assert copies.copies == 3 and len(copies.found) == 2
    with pytest.raises(RuntimeError, match="meta"):
        torch.zeros((), device=META).item()


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_deepspeed_does_not_wait_for_its_timers(run_config: Callable[..., RunConfig], stage: int) -> None:
    """By default it waits twice in every micro-batch, for a throughput that nobody reads."""

    def waits() -> int:
        from deepspeed.accelerator import get_accelerator

        found = []
        accelerator = get_accelerator()
        accelerator.synchronize = lambda *_: found.append(None)
        train(config)
        return len(found)

    config = run_config(train={"steps": 12, "zero_stage": stage})
    assert run_ranks(waits, 1) == [0]
