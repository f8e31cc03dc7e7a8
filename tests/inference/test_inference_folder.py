"""The inference folder as others meet it: on the hub, in another precision, written from a pipeline."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import huggingface_hub.errors
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from star_dist.config import RunConfig, dump_config
from star_dist.errors import Unavailable, UserError
from star_dist.export import ExportConfig, fetch_inference_folder, read_export_config
from star_dist.inference.editing import inpaint
from star_dist.inference.options import SamplingOptions
from star_dist.inference.pipeline import ScalePreview, StarPipeline
from star_dist.model_card import ModelFacts, model_card
from star_dist.text import TextEncoder
from star_dist.train.export_checkpoint import run_facts

GREEDY = SamplingOptions(2.0, top_k=1)


def test_layout_of_the_folder(inference_folder: Path) -> None:
    names = {path.name for path in inference_folder.iterdir()}
    assert names == {"README.md", "config.json", "model.safetensors", "tokenizer", "text_encoder"}
    suffixes = {path.suffix for path in inference_folder.rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".safetensors", ".txt", ".md"}  # nothing that could hold a pickle


def test_a_hub_id_is_its_snapshot(inference_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's cache as a download leaves it; without a network (HF_HUB_OFFLINE) that is where ids come from."""
    repository = tmp_path / "models--someone--star"
    shutil.copytree(inference_folder, repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    local = StarPipeline.from_pretrained(inference_folder)
    fetched = StarPipeline.from_pretrained("someone/star")
    assert fetched("red heart")[0].tobytes() == local("red heart")[0].tobytes()
    with pytest.raises(UserError, match="no folder someone/other, and no Hugging Face model of that id"):
        StarPipeline.from_pretrained("someone/other")
    with pytest.raises(UserError, match="revision 'v1' is of a Hugging Face id"):
        StarPipeline.from_pretrained(inference_folder, revision="v1")


def test_a_hub_that_does_not_answer_is_no_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    """`train.init_from` may name an id, and the network may be back at a job's next attempt."""

    def ask(*_: object, **__: object) -> None:
        raise huggingface_hub.errors.LocalEntryNotFoundError("check your internet connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", ask)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(Unavailable, match="internet connection"):
        fetch_inference_folder("someone/star")


def test_saving_what_was_loaded(inference_folder: Path, tmp_path: Path) -> None:
    pipeline = StarPipeline.from_pretrained(inference_folder)
    pipeline.save_pretrained(tmp_path / "again")
    before, after = read_export_config(inference_folder), read_export_config(tmp_path / "again")
    assert before == after
    assert "/" not in after.text.encoder  # of a path only the name: an export is for other machines
    again = StarPipeline.from_pretrained(tmp_path / "again")
    assert again("blue flag", 3)[0].tobytes() == pipeline("blue flag", 3)[0].tobytes()
    pipeline.save_pretrained(tmp_path / "again", dtype="bf16")
    assert read_export_config(tmp_path / "again").dtype == "bf16"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    with pytest.raises(UserError, match="exists and is no inference folder"):
        pipeline.save_pretrained(tmp_path / "mine")


def test_the_text_encoder_keeps_its_name(inference_folder: Path, text_encoder_folder: Path, tmp_path: Path) -> None:
    """In every export of an export, which hold copies under one name."""
    config = read_export_config(inference_folder)
    pipeline = StarPipeline.from_pretrained(inference_folder)
    named = shutil.copytree(text_encoder_folder, tmp_path / "our_encoder")
    pipeline.text_encoder = TextEncoder(config.text.model_copy(update={"encoder": str(named)}), pipeline.device)
    pipeline.save_pretrained(tmp_path / "first")
    shutil.rmtree(named)
    StarPipeline.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    assert read_export_config(tmp_path / "second").text.encoder == "our_encoder"
    again = StarPipeline.from_pretrained(tmp_path / "second")
    assert again("blue flag", 3)[0].tobytes() == pipeline("blue flag", 3)[0].tobytes()
    assert "our_encoder" in (tmp_path / "second" / "README.md").read_text()


def test_precision_of_the_transformer_alone(inference_folder: Path) -> None:
    pipeline = StarPipeline.from_pretrained(inference_folder).to("cpu", torch.bfloat16)
    assert {parameter.dtype for parameter in pipeline.model.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in pipeline.tokenizer.parameters()} == {torch.float32}
    assert pipeline("red heart")[0].size == (16, 16)
    with pytest.raises(UserError, match=r"runs in torch\.bfloat16 or torch\.float32, got torch\.int8"):
        pipeline.to(dtype=torch.int8)
    with pytest.raises(UserError, match=r"runs in torch\.bfloat16 or torch\.float32, got torch\.float16"):
        StarPipeline.from_pretrained(inference_folder, dtype=torch.float16)


@pytest.mark.parametrize("seeds", [np.int64(7), np.arange(7, 9), torch.arange(7, 9), [np.int32(7), 8]], ids=str)
def test_seeds_are_whole_numbers_of_any_kind(inference_folder: Path, seeds: Any) -> None:
    pipeline = StarPipeline.from_pretrained(inference_folder)
    prompts = ["red heart", "blue flag"]
    assert torch.equal(pipeline.sample(prompts, seeds).tokens_BL, pipeline.sample(prompts, 7).tokens_BL)


def test_no_prompt_is_refused(inference_folder: Path) -> None:
    pipeline, picture = StarPipeline.from_pretrained(inference_folder), Image.new("RGB", (16, 16))
    for draw in (pipeline, lambda prompts: inpaint(pipeline, prompts, picture, picture)):
        with pytest.raises(UserError, match="there is no prompt; give at least one"):
            draw([])


def test_previews_of_every_scale(inference_folder: Path) -> None:
    pipeline = StarPipeline.from_pretrained(inference_folder)
    previews: list[tuple[int, int, bytes]] = []

    def keep(preview: ScalePreview) -> None:
        previews.append((preview.scale, preview.num_scales, preview.pictures()[1].tobytes()))

    pictures = pipeline(["red heart", "blue flag"], 1, on_scale=keep)
    assert [(scale, count) for scale, count, _ in previews] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert previews[-1][2] == pictures[1].tobytes() and len({picture for *_, picture in previews}) == 4


def test_alone_or_in_a_batch_of_seven(inference_folder: Path) -> None:
    pipeline = StarPipeline.from_pretrained(inference_folder)
    prompts = ["red heart", "blue flag", "green face", "heart", "flag", "red", ""]
    options = SamplingOptions(3.0, top_k=(1, 5, 9, 0), temperature=0.9)
    together = pipeline.sample(prompts, 10, options).tokens_BL
    for i, prompt in enumerate(prompts):
        assert torch.equal(pipeline.sample(prompt, 10 + i, options).tokens_BL[0], together[i])


def test_an_older_folder_without_facts_still_loads(inference_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(inference_folder, tmp_path / "older"))
    config = json.loads((folder / "config.json").read_text())
    del config["facts"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "README.md").unlink()
    assert StarPipeline.from_pretrained(folder)("red heart")[0].size == (16, 16)


def test_model_card_says_what_the_run_knows(
    run_config: Callable[..., RunConfig], inference_folder: Path, tmp_path: Path
) -> None:
    config = run_config(train={"steps": 12})
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(dump_config(config))
    reports = [{"step": 4, "loss/total": 3.0}, {"step": 8, "loss/total": 2.5, "validation/loss/total": 2.75}]
    lines = [json.dumps(report) for report in [*reports, {"step": 12, "loss/total": 1.0}]]
    (run / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 13, "lo')
    (run / "environment.json").write_text(
        json.dumps({"packages": {"torch": "2.15.0"}, "git_commit": "abc", "host": "h"})
    )
    facts = run_facts(run, config, 8, "cc-by-sa-4.0")
    assert facts.metrics == {"loss/total": 2.5, "validation/loss/total": 2.75}
    exported: ExportConfig = read_export_config(inference_folder).model_copy(update={"facts": facts, "step": 8})
    text = model_card(exported.model_dump(mode="json"))
    card = ModelCard(text)  # the hub's own reader
    assert card.data.license == "cc-by-sa-4.0" and card.data.pipeline_tag == "text-to-image"
    rows = {"step": "8", "pictures seen": "64", "optimizer.learning_rate": "0.01", "torch": "2.15.0"}
    for name, value in rows.items():
        assert f"| {name} | {value} |" in card.text
    assert "| validation/loss/total | 2.75 |" in card.text and "| pictures, train | " in card.text
    unknown = model_card(exported.model_copy(update={"facts": ModelFacts()}).model_dump(mode="json"))
    assert "| licence | not stated |" in unknown and "license" not in unknown
    assert "| host |" not in text and str(tmp_path) not in text


def test_model_card_names_the_data_on_any_machine(
    run_config: Callable[..., RunConfig],
    inference_folder: Path,
    dataset_folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The cache of the data is on another node; the run began with an earlier model."""
    remote = tmp_path / "tokens" / "16"
    shutil.copytree(dataset_folder, remote)
    metadata = json.loads((remote / "dataset.json").read_text())
    (remote / "dataset.json").write_text(json.dumps(metadata | {"attribution": "Pictures by Jane Doe\n\nCC BY-SA 4.0"}))
    earlier = tmp_path / "earlier"
    shutil.copytree(inference_folder, earlier)
    exported = json.loads((earlier / "config.json").read_text())
    exported["facts"]["attribution"] = "Pictures by John Roe\n\nCC BY-SA 4.0"
    (earlier / "config.json").write_text(json.dumps(exported))
    place = {"remote": str(remote), "local": str(tmp_path / "cache")}
    config = run_config(data=place, train={"init_from": str(earlier)})
    facts = run_facts(tmp_path, config, 8, None)
    assert facts.attribution == "Pictures by John Roe\n\nCC BY-SA 4.0\n\nPictures by Jane Doe"
    assert facts.samples == metadata["splits"] and facts.dataset == "16" and not caplog.messages
    assert not (tmp_path / "cache").exists()
    shutil.rmtree(tmp_path / "tokens")
    shutil.rmtree(earlier)
    facts = run_facts(tmp_path, config, 8, None)
    assert facts.attribution == "" and facts.samples == {}
    assert "attribution of a data set: no data set at" in caplog.text and "what train.init_from was" in caplog.text
