"""Small real parts for all tests: a tokenizer, a text encoder, a data set and a run that trains in seconds."""

from __future__ import annotations

import copy
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # ranks are forked from this process, which must not own OpenMP threads
os.environ.setdefault("WANDB_MODE", "offline")
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from tqdm import tqdm

from star_dist.config import RunConfig, parse_config

torch.set_num_threads(1)
# tqdm's own lock is shared with forked processes: one that a test kills while it draws would hold it for ever.
tqdm.set_lock(threading.RLock())
tqdm.monitor_interval = 0  # its thread could hold the lock while a rank is forked

pytest_plugins = ["tests.s3", "tests.fault_proxy", "tests.trained"]

SCALES = (1, 2, 3, 4)
RESOLUTION = 16
CAPTIONS = ("red heart", "green face", "blue flag")
COLOURS = ("red", "green", "blue")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests first, so that no worker begins one when the others have nothing left."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """The recorded runs of the public implementations."""
    return Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden(golden_dir: Path) -> dict[str, torch.Tensor]:
    """Weights, inputs and outputs of the transformer."""
    with safe_open(golden_dir / "star_a.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny VQ-VAE with random weights: 16 pixels to 4x4 tokens."""
    from star_dist.tokenizer.config import VQVAEConfig
    from star_dist.tokenizer.io import save_tokenizer
    from star_dist.tokenizer.vqvae import MultiScaleVQVAE

    torch.manual_seed(0)
    config = VQVAEConfig(
        vocab_size=64,
        code_dim=8,
        channels=8,
        channel_multipliers=(1, 2, 2),
        norm_groups=4,
        blocks_per_level=1,
        scales=SCALES,
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(MultiScaleVQVAE(config), folder)
    return folder


@pytest.fixture(scope="session")
def text_encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with a vocabulary of a few words."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("text_encoder")
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *sorted({word for text in CAPTIONS for word in text.split()}),
    ]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab_file=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pictures_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 captioned pictures whose colour follows the caption."""
    import json

    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    lines = []
    for i in range(60):
        pixels = random.integers(0, 60, (24, 20, 3))
        pixels[..., i % 3] += 180
        name = f"{i:03}.png"
        Image.fromarray(pixels.astype(np.uint8)).save(folder / name)
        lines.append(json.dumps({"file": name, "caption": CAPTIONS[i % 3]}))
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def prep_values(pictures_folder: Path, tokenizer_folder: Path) -> dict[str, Any]:
    """A tokenization job without its output."""
    return {
        "source": {"kind": "folder", "path": str(pictures_folder)},
        "tokenizer": str(tokenizer_folder),
        "resolution": RESOLUTION,
        "scales": list(SCALES),
        "validation_fraction": 0.15,
        "batch": 16,
    }


@pytest.fixture(scope="session")
def dataset_folder(prep_values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pictures as MDS shards."""
    from data_prep.tokenization import tokenize
    from star_dist.config import PrepConfig

    output = tmp_path_factory.mktemp("data") / "set"
    tokenize(parse_config(PrepConfig, prep_values | {"output": str(output)}))
    return output


@pytest.fixture(scope="session")
def inference_folder(
    tokenizer_folder: Path, text_encoder_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An inference folder with random weights, which takes no training."""
    from star_dist.config import TextSection
    from star_dist.inference.pipeline import StarPipeline
    from star_dist.model.config import StarConfig
    from star_dist.model.initialization import initialize_weights
    from star_dist.model.star import STAR
    from star_dist.text import TextEncoder
    from star_dist.tokenizer.io import load_tokenizer

    model = STAR(StarConfig(depth=2, width=32, heads=2, scales=SCALES, vocab_size=64, code_dim=8, text_width=16))
    initialize_weights(model, seed=1)
    with torch.no_grad():
        model.head_logits.weight.mul_(300)  # so that the text and the smaller scales decide what is drawn
    text = TextSection(
        encoder=str(text_encoder_folder), encoder_subfolder="", tokenizer_subfolder="", width=16, max_tokens=8
    )
    folder = tmp_path_factory.mktemp("inference") / "model"
    encoder = TextEncoder(text, torch.device("cpu"))
    StarPipeline(model.eval(), load_tokenizer(tokenizer_folder), encoder).save_pretrained(folder)
    return folder


@pytest.fixture
def run_config(
    dataset_folder: Path, tokenizer_folder: Path, text_encoder_folder: Path, tmp_path: Path
) -> Callable[..., RunConfig]:
    """Makes configs of a run that trains in seconds; keyword arguments are sections to change."""
    values = {
        "run_dir": str(tmp_path / "run"),
        "resolution": RESOLUTION,
        "scales": list(SCALES),
        "model": {"depth": 2, "width": 32, "heads": 2},
        "tokenizer": {"path": str(tokenizer_folder), "vocab_size": 64, "code_dim": 8, "downsampling": 4},
        "text": {
            "encoder": str(text_encoder_folder),
            "encoder_subfolder": "",
            "tokenizer_subfolder": "",
            "width": 16,
            "max_tokens": 8,
        },
        "data": {"local": str(dataset_folder), "num_workers": 0, "num_canonical_nodes": 2},
        "train": {"steps": 8, "global_batch": 8, "micro_batch": 2, "precision": "fp32", "omp_threads": 1},
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 2},
        "checkpoint": {"every": 3},
        "validation": {"every": 0},
        "samples": {"every": 0},
        "logging": {"every": 1},
        "health": {"hang_timeout_s": 120},
        "deepspeed": {},
    }

    def make(**sections: Any) -> RunConfig:
        changed = copy.deepcopy(values)
        for name, section in sections.items():
            changed[name] = changed[name] | section if isinstance(section, dict) else section
        return parse_config(RunConfig, changed)

    return make


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 32 KB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "none", disk], capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)
