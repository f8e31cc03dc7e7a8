"""The tokenization job: pictures per second, and where the time goes, for tars and for a folder of the same pictures.

    python benchmarks/tokenization.py [--quick] [--pictures N] [--workers N …] [--tokenizer PATH] [--json FILE]

The pictures are JPEG files of 640 x 480 with the detail of photographs. Without --tokenizer the weights are random in
the architecture of VAR's public tokenizer (a GPU) or a small one (a CPU): speed does not depend on what weights hold.
"preparation alone" is the same job without the tokenizer: what the CPUs can feed.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import at_least, chosen_device, device_name, print_table, write_json
from PIL import Image
from tqdm import tqdm

from data_prep.partition import Partition
from data_prep.preparation import prepare_all
from data_prep.sources import open_source
from data_prep.tokenization import tokenize_partition
from star_dist.cli import command_parser, run_command
from star_dist.config import PrepConfig, parse_config
from star_dist.tokenizer.config import VQVAEConfig
from star_dist.tokenizer.io import save_tokenizer
from star_dist.tokenizer.vqvae import MultiScaleVQVAE

RESOLUTION, SCALES = 256, [1, 2, 3, 4, 5, 6, 8, 10, 13, 16]
SIZE = (640, 480)
PICTURES_PER_TAR = 1000


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="8 pictures, one thread")
    parser.add_argument("--pictures", type=at_least(1), help="how many (default: 5000 on a GPU, 64 on a CPU)")
    parser.add_argument(
        "--workers", type=at_least(1), nargs="+", help="threads that decode (default: 1 and one per CPU)"
    )
    parser.add_argument(
        "--batch", type=at_least(1), default=64, help="pictures that the tokenizer takes at once (default 64)"
    )
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer folder or the public checkpoint file")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    arguments = parser.parse_args()
    device = chosen_device()
    count = arguments.pictures or (8 if arguments.quick else 5000 if device.type == "cuda" else 64)
    workers = arguments.workers or ([1] if arguments.quick else sorted({1, os.cpu_count() or 1}))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="star-dist-benchmark-") as temporary:
        root = Path(temporary)
        num_bytes = write_pictures(root, count)
        tokenizer = arguments.tokenizer or write_tokenizer(root / "tokenizer", device)
        for kind in ("webdataset", "folder"):
            for number in workers:
                values = {
                    "source": {"kind": kind, "path": str(root / kind)},
                    "output": str(root / f"{kind}-{number}"),
                    "tokenizer": str(tokenizer),
                    "resolution": RESOLUTION,
                    "scales": SCALES,
                    "batch": arguments.batch,
                }
                rows += measure(parse_config(PrepConfig, values), number)
    heads = dict.fromkeys(key for row in rows for key in row)
    print_table(
        f"{count} pictures of {SIZE[0]} x {SIZE[1]} ({num_bytes / count / 1e3:.0f} KB) to {RESOLUTION} pixels on "
        f"{device_name(device)}, {os.cpu_count()} CPUs; seconds by stage",
        [{head: row.get(head) for head in heads} for row in rows],
    )
    write_json(arguments.json, device, {"pictures": count, "bytes": num_bytes, "tokenization": rows})


def measure(config: PrepConfig, workers: int) -> list[dict[str, Any]]:
    """One row for preparation alone, one for the whole job."""
    about = {"source": config.source["kind"], "workers": workers}
    source = open_source(config.source)
    items = (item for unit in source.units for item in source.open(unit))
    started = time.perf_counter()
    prepared = list(prepare_all(items, config, source.caption_names, workers))
    alone_s = time.perf_counter() - started
    alone = about | {
        "what": "preparation alone",
        "pictures_per_s": len(prepared) / alone_s,
        "read (all threads)": sum(picture.read_s for picture in prepared),
        "decode and resize (all threads)": sum(picture.decode_s for picture in prepared),
    }
    del prepared
    summary = tokenize_partition(config, Partition(), workers=workers)
    whole = about | {"what": "whole job", "pictures_per_s": summary.pictures_per_s, "whole": summary.seconds}
    return [alone, whole | summary.stages]


def write_pictures(root: Path, count: int) -> int:
    """The same JPEG files as tars and as a folder; returns the bytes of all."""
    draw = np.random.default_rng(0)
    (root / "folder").mkdir()
    (root / "webdataset").mkdir()
    total = 0
    with (root / "folder" / "captions.jsonl").open("w") as listing:
        for start in tqdm(range(0, count, PICTURES_PER_TAR), desc="write pictures", unit="tar"):
            with tarfile.open(root / "webdataset" / f"{start:08}.tar", "w") as tar:
                for i in range(start, min(start + PICTURES_PER_TAR, count)):
                    data, name = photograph(draw), f"{i:08}"
                    total += len(data)
                    (root / "folder" / f"{name}.jpg").write_bytes(data)
                    listing.write(json.dumps({"file": f"{name}.jpg", "caption": f"picture {i}"}) + "\n")
                    for suffix, content in ((".jpg", data), (".txt", f"picture {i}".encode())):
                        member = tarfile.TarInfo(name + suffix)
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
    return total


def photograph(draw: np.random.Generator) -> bytes:
    """A JPEG file: noise of all sizes, the large ones stronger, as in photographs."""
    layers = [
        np.asarray(Image.fromarray(draw.integers(0, 255, (side * 3 // 4, side, 3), np.uint8)).resize(SIZE), np.float32)
        for side in (4, 16, 64, 256)
    ]
    pixels = sum(layer * weight for layer, weight in zip(layers, (0.5, 0.25, 0.15, 0.1)))
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_tokenizer(folder: Path, device: torch.device) -> Path:
    """Random weights: VAR's architecture, or one that a CPU gets through."""
    small = {} if device.type == "cuda" else {"channels": 32, "blocks_per_level": 1}
    torch.manual_seed(0)
    save_tokenizer(MultiScaleVQVAE(VQVAEConfig(**small)), folder)
    return folder


if __name__ == "__main__":
    run_command(main)
