"""Several captions per picture, from a tokenization job that wrote to S3 to the captions that training is given."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_prep.tokenization import tokenize
from star_dist.config import PrepConfig, RunConfig, parse_config
from star_dist.data.captions import choose_caption
from tests.ranks import run_ranks
from tests.s3 import S3Bucket


def streamed(config: RunConfig, first_step: int, steps: int, world_size: int) -> dict[tuple[int, int], str]:
    """The caption of each (step, sample), over all ranks."""

    def one_rank() -> dict[tuple[int, int], str]:
        import torch.distributed

        from star_dist.data.batches import TrainBatches
        from star_dist.data.fetch import fetch_metadata
        from star_dist.process import prepare_process_environment

        process = prepare_process_environment()
        torch.distributed.init_process_group("gloo")
        batches = TrainBatches(config, fetch_metadata(config.data), process.world_size)
        stream = batches.starting_at(first_step)
        found = {}
        for step in range(first_step, first_step + steps):
            for _ in range(batches.micro_batches_per_step):
                batch = next(stream)
                found |= {(step, sample): caption for sample, caption in zip(batch.sample_ids, batch.captions)}
        return found

    return {key: caption for rank in run_ranks(one_rank, world_size) for key, caption in rank.items()}


def test_captions_are_drawn_by_weight_and_the_same_after_a_resume_on_other_ranks(
    pictures_folder: Path,
    prep_values: dict[str, Any],
    run_config: Callable[..., RunConfig],
    s3: S3Bucket,
    tmp_path: Path,
) -> None:
    captions = {}
    for i, line in enumerate((pictures_folder / "captions.jsonl").read_text().splitlines()):
        fields = json.loads(line)
        detailed = {"detailed": f"a detailed {fields['caption']}"} if i % 4 else {}  # every fourth has none
        captions[fields["file"]] = fields | detailed
        s3.write(f"pictures/{fields['file']}", (pictures_folder / fields["file"]).read_bytes())
    s3.write("pictures/captions.jsonl", "\n".join(map(json.dumps, captions.values())).encode())
    source = {
        "kind": "folder",
        "path": f"{s3.url}/pictures",
        "captions": {"original": "caption", "detailed": "detailed"},
    }
    values = prep_values | {"source": source, "output": f"{s3.url}/set", "work": str(tmp_path / "work")}
    (metadata,) = tokenize(parse_config(PrepConfig, values)).values()
    assert metadata.captions == {"original": 60, "detailed": 45}

    def config(cache: str, **data: Any) -> RunConfig:
        return run_config(seed=3, data={"remote": f"{s3.url}/set", "local": str(tmp_path / cache)} | data)

    weights = {"caption_weights": {"original": 1.0, "detailed": 3.0}}
    found = streamed(config("a", **weights), 0, 18, 1)
    share = sum(caption.startswith("a detailed") for caption in found.values()) / len(found)
    assert abs(share - 0.75 * 0.75) < 0.12
    kinds: dict[int, set[bool]] = {}
    for (_, sample), caption in found.items():
        kinds.setdefault(sample, set()).add(caption.startswith("a detailed"))
    assert sum(len(of_sample) == 2 for of_sample in kinds.values()) > 10  # another draw every time a picture comes
    for (step, sample), caption in found.items():
        if len(kinds[sample]) == 2:
            drawn = choose_caption(metadata.captions, weights["caption_weights"], seed=3, step=step, sample_id=sample)
            assert caption.startswith("a detailed") == (drawn == "detailed"), (step, sample)  # in later epochs, too
    resumed = streamed(config("b", **weights), 7, 11, 2)
    assert resumed == {key: caption for key, caption in found.items() if key[0] >= 7}
    assert not any(caption.startswith("a detailed") for caption in streamed(config("c"), 0, 3, 1).values())
