"""The training loader: samples per second from local disk and from S3, against plain reads and against WebDataset.

    python benchmarks/loader.py [--quick] [--samples N] [--workers N] [--s3 s3://BUCKET/PREFIX] [--json FILE]

Makes shards of d30's 256-pixel samples (680 tokens and a caption each) with random content. S3 is measured where
--s3 names a prefix to upload to, with credentials and S3_ENDPOINT_URL from the environment. WebDataset reads the same
tokens and captions from tar files of the same size; plain reads are the files' bytes alone.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import at_least, print_table, write_json
from streaming import MDSWriter
from tqdm import tqdm

from star_dist.cli import command_parser, run_command
from star_dist.config import RunConfig, load_config
from star_dist.data.schema import (
    METADATA_FILE,
    SHARD_HASH,
    DatasetMetadata,
    columns,
    content_hash,
    encode_captions,
    encode_tokens,
    token_dtype,
)
from star_dist.errors import UserError
from star_dist.process import prepare_process_environment

WORDS = ("red", "fox", "fresh", "snow", "golden", "portrait", "lighthouse", "cliff", "above", "stormy", "sea")
CAPTION_WORDS = 20
H200_IMAGES_PER_S = 80  # d30 at 256 pixels at an MFU of 0.54, above the 73 measured (docs/performance.md)
SHARD_BYTES = 16 * 2**20


def make_samples(config: RunConfig, count: int) -> Iterator[tuple[str, str, np.ndarray]]:
    """Key, caption and tokens (L,) of random samples."""
    draws = np.random.default_rng(0)
    for i in range(count):
        caption = " ".join(draws.choice(WORDS, CAPTION_WORDS))
        tokens = draws.integers(config.tokenizer.vocab_size, size=config.schedule.num_tokens)
        yield f"{i:09}", caption, tokens


def write_mds(config: RunConfig, count: int, root: Path) -> None:
    """A data set as data_prep.tokenize leaves it."""
    dtype = token_dtype(config.tokenizer.vocab_size)
    out = str(root / "train")
    with MDSWriter(
        out=out, columns=columns(["original"], False), hashes=[SHARD_HASH], size_limit=SHARD_BYTES
    ) as writer:
        for key, caption, tokens_L in tqdm(make_samples(config, count), total=count, desc="write MDS", unit="sample"):
            captions = encode_captions(key, {"original": caption})
            writer.write({"key": key, "tokens": encode_tokens(tokens_L, dtype), **captions})
    metadata = DatasetMetadata(
        tokenizer_hash="0" * 16,
        vocab_size=config.tokenizer.vocab_size,
        code_dim=config.tokenizer.code_dim,
        downsampling=config.tokenizer.downsampling,
        resolution=config.resolution,
        scales=config.scales,
        token_dtype=dtype.str,
        captions={"original": count},
        splits={"train": count},
        content_hash=content_hash({"train": (root / "train" / "index.json").read_bytes()}),
    )
    (root / METADATA_FILE).write_text(metadata.model_dump_json(indent=2))


def write_tars(config: RunConfig, count: int, root: Path) -> list[Path]:
    """The same samples as WebDataset tars."""
    import webdataset as wds

    dtype = token_dtype(config.tokenizer.vocab_size)
    root.mkdir()
    with wds.ShardWriter(str(root / "%05d.tar"), maxsize=SHARD_BYTES, maxcount=count, verbose=0) as writer:
        for key, caption, tokens_L in tqdm(make_samples(config, count), total=count, desc="write tars", unit="sample"):
            writer.write({"__key__": key, "tokens": encode_tokens(tokens_L, dtype), "txt": caption})
    return sorted(root.glob("*.tar"))


def drain(batches: Iterator[Any], size: Callable[[Any], int], wanted: int) -> dict[str, float]:
    """Takes `wanted` samples; seconds to the first batch and to the end."""
    start = time.perf_counter()
    first = None
    taken = 0
    while taken < wanted:
        taken += size(next(batches))
        first = first or time.perf_counter() - start
    return {"first_batch_s": first, "seconds": time.perf_counter() - start, "samples": taken}


def stream(config: RunConfig, wanted: int) -> dict[str, float]:
    """The trainer's own loader on one rank."""
    from star_dist.data.batches import TrainBatches
    from star_dist.data.fetch import fetch_metadata

    start = time.perf_counter()
    batches = TrainBatches(config, fetch_metadata(config.data), 1).starting_at(0)
    found = drain(batches, len, wanted)
    return found | {"first_batch_s": time.perf_counter() - start - found["seconds"] + found["first_batch_s"]}


def webdataset(paths: list[Path], batch: int, workers: int, wanted: int) -> dict[str, float]:
    import webdataset as wds

    def decode(sample: dict[str, bytes]) -> tuple[np.ndarray, str]:
        return np.frombuffer(sample["tokens"], "<u2").astype(np.int64), sample["txt"].decode()

    def collate(samples: list[tuple[np.ndarray, str]]) -> tuple[torch.Tensor, list[str]]:
        tokens, captions = zip(*samples)
        return torch.from_numpy(np.stack(tokens)), list(captions)

    urls = [str(path) for path in paths]
    dataset = wds.WebDataset(urls, shardshuffle=False, seed=0, resampled=True).shuffle(1000).map(decode)
    dataset = dataset.batched(batch, collation_fn=collate)
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None
    )
    return drain(iter(loader), lambda found: len(found[1]), wanted)


def plain_reads(paths: list[Path]) -> float:
    """Seconds to read all files."""
    start = time.perf_counter()
    for path in paths:
        path.read_bytes()
    return time.perf_counter() - start


def wait_share(config: RunConfig, images_per_s: float, seconds: float) -> float:
    """Share of a step that waits for data, where steps take a fixed time."""
    from star_dist.data.batches import TrainBatches
    from star_dist.data.fetch import fetch_metadata

    batches = TrainBatches(config, fetch_metadata(config.data), 1).starting_at(0)
    next(batches)
    waited, begun = 0.0, time.perf_counter()
    while time.perf_counter() - begun < seconds:
        start = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - start
        time.sleep(len(batch) / images_per_s)
    return waited / (time.perf_counter() - begun)


def upload(folder: Path, url: str) -> None:
    from star_dist.object_store import open_store

    store = open_store(url)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for path in tqdm(files, desc=f"upload to {url}", unit="file"):
        store.upload(path, path.relative_to(folder).as_posix())


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="2,048 samples")
    parser.add_argument("--samples", type=int, metavar="N", help="in the data set (default 40,000)")
    parser.add_argument("--workers", type=at_least(0), default=2, metavar="N", help="loader processes (default 2)")
    parser.add_argument("--s3", metavar="URL", help="prefix to upload the shards to and measure")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    arguments = parser.parse_args()
    arguments.samples = arguments.samples or (2048 if arguments.quick else 40_000)
    if arguments.samples < 1024:
        raise UserError(f"--samples must be at least 1024, one global batch of d30; got {arguments.samples}")
    prepare_process_environment()
    with tempfile.TemporaryDirectory() as folder:
        rows, facts = run(Path(folder), arguments)
    print_table("Loader, one rank; ratios to WebDataset in the same run", rows)
    for name, value in facts.items():
        print(f"{name}: {value:.4g}")
    write_json(arguments.json, torch.device("cpu"), {"loader": rows, "facts": facts})


def run(folder: Path, arguments: Any) -> tuple[list[dict[str, Any]], dict[str, float]]:
    base = load_config(RunConfig, Path(__file__).parents[1] / "configs" / "d30.json")

    def config(**data: Any) -> RunConfig:
        values = json.loads(base.model_dump_json())
        values["data"] |= {"num_workers": arguments.workers, "remote": None} | data
        return RunConfig.model_validate_json(json.dumps(values))

    write_mds(base, arguments.samples, folder / "mds")
    tars = write_tars(base, arguments.samples, folder / "tars")
    shards = sorted((folder / "mds").rglob("*.mds"))
    size = sum(path.stat().st_size for path in shards)
    per_epoch = arguments.samples // base.train.global_batch * base.train.global_batch
    rows = []

    def add(name: str, found: dict[str, float]) -> None:
        rate = found["samples"] / found["seconds"]
        rows.append({"what": name, "samples_per_s": rate, "mb_per_s": rate * size / arguments.samples / 1e6, **found})

    add("plain reads of the shards", {"samples": arguments.samples, "seconds": plain_reads(shards)})
    add("WebDataset, local tars", webdataset(tars, base.train.micro_batch, arguments.workers, per_epoch))
    local = config(local=str(folder / "mds"))
    add("star-dist, local shards", stream(local, per_epoch))
    facts = {"of_one_h200": rows[-1]["samples_per_s"] / H200_IMAGES_PER_S}
    if arguments.s3 is not None:
        from star_dist.object_store import open_store

        upload(folder / "mds", arguments.s3)
        store = open_store(arguments.s3)
        start = time.perf_counter()
        store.download(f"train/{shards[0].name}", folder / "one.mds")
        facts["one_shard_download_s"] = time.perf_counter() - start
        remote = config(remote=arguments.s3, local=str(folder / "cache"))
        add("star-dist, S3, cold cache", stream(remote, per_epoch))
        facts["first_batch_in_shard_downloads"] = rows[-1]["first_batch_s"] / facts["one_shard_download_s"]
        add("star-dist, S3, warm cache", stream(remote, per_epoch))
        shutil.rmtree(folder / "cache")
    for rate in (H200_IMAGES_PER_S, 10 * H200_IMAGES_PER_S):
        facts[f"data_wait_share_at_{rate}_images_per_s"] = wait_share(local, rate, 10)
    reference = next(row for row in rows if row["what"].startswith("WebDataset"))
    for row in rows:
        row["of_webdataset"] = row["samples_per_s"] / reference["samples_per_s"]
        row.setdefault("first_batch_s", None)
    heads = ("what", "samples_per_s", "mb_per_s", "of_webdataset", "first_batch_s", "seconds")
    return [{head: row[head] for head in heads} for row in rows], facts


if __name__ == "__main__":
    run_command(main)
