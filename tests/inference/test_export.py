"""From a training run to pictures: export, verification, reloading, starting another run from it."""

import json
import os
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from star_dist import export
from star_dist.config import RunConfig
from star_dist.errors import UserError
from star_dist.export import initial_weights_from, other_text, read_export_config
from star_dist.inference.options import SamplingOptions
from star_dist.inference.pipeline import StarPipeline
from star_dist.inference.sampler import sample_pictures
from star_dist.train import evaluation
from star_dist.train.evaluation import evaluate
from star_dist.train.export_checkpoint import export_checkpoint
from tests.ranks import run_ranks
from tests.train.runs import train_on, weights

pytestmark = pytest.mark.xdist_group("export")  # one worker, so that the run is trained once

MakeConfig = Callable[..., RunConfig]
GREEDY = SamplingOptions(guidance=2.0, top_k=1)
PROMPTS = ["red heart", "blue flag", "green face"]


def test_fp32_export_holds_the_masters(trained: RunConfig, exported: Path) -> None:
    stored = load_file(exported / "model.safetensors")
    masters = weights(trained)
    assert stored.keys() == masters.keys()
    assert all(torch.equal(stored[name], masters[name]) for name in masters)


def test_bf16_export_is_the_rounded_one_of_the_asked_step(trained: RunConfig, tmp_path: Path) -> None:
    assert export_checkpoint(Path(trained.run_dir), tmp_path / "model", 40, "bf16") == 40
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "model" / "config.json").read_text())["step"] == 40
    assert len(StarPipeline.from_pretrained(tmp_path / "model")(PROMPTS)) == 3


def test_greedy_tokens_equal_those_of_the_training_engine(trained: RunConfig, exported: Path) -> None:
    """The engine's own weights, gathered from its partitions after loading the checkpoint, draw the same tokens."""

    def from_engine() -> np.ndarray | None:
        from star_dist.model.star import STAR
        from star_dist.process import prepare_process_environment
        from star_dist.text import TextEncoder
        from star_dist.tokenizer.io import load_tokenizer
        from star_dist.train.checkpoint import CheckpointFolder
        from star_dist.train.engine import Engine

        engine = Engine(trained, prepare_process_environment())
        engine.state.load(CheckpointFolder(Path(trained.run_dir)).find(None))
        full = engine.full_weights()
        if full is None:
            return None
        model = STAR(trained.star_config())
        model.load_state_dict(full)
        encoder = TextEncoder(trained.text, torch.device("cpu"))
        quantizer = load_tokenizer(Path(trained.tokenizer.path)).quantize
        text, empty = encoder(PROMPTS), encoder([""])
        drawn = sample_pictures(model, quantizer, text, empty, trained.schedule, GREEDY, [0, 0, 0])
        return drawn.tokens_BL.numpy()

    expected, _ = run_ranks(from_engine, 2)
    pipeline = StarPipeline.from_pretrained(exported)
    found = pipeline.sample(PROMPTS, [0, 0, 0], GREEDY).tokens_BL
    assert np.array_equal(found.numpy(), expected)
    assert len({tuple(row) for row in expected.tolist()}) > 1  # the text does matter


def test_pipeline_gives_pictures(exported: Path) -> None:
    pipeline = StarPipeline.from_pretrained(exported)
    pictures = pipeline(PROMPTS, seed=3)
    assert [picture.size for picture in pictures] == [(16, 16)] * 3
    assert pipeline("red heart", seed=3)[0].tobytes() == pictures[0].tobytes()
    assert pipeline("red heart", seed=4)[0].tobytes() != pictures[0].tobytes()


def test_the_export_depends_on_nothing_outside(exported: Path, tmp_path: Path) -> None:
    """The text encoder was a local folder, so it came along; the folder can be moved."""
    moved = tmp_path / "elsewhere"
    shutil.copytree(exported, moved)
    config = json.loads((moved / "config.json").read_text())
    config["text"]["encoder"] = "/gone"
    (moved / "config.json").write_text(json.dumps(config))
    assert StarPipeline.from_pretrained(moved)("red heart")[0].size == (16, 16)


def test_damaged_exports_are_refused(exported: Path, tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(exported, tmp_path / name))

    cut = copy("cut")
    (cut / "model.safetensors").write_bytes((exported / "model.safetensors").read_bytes()[:-9])
    missing = copy("missing")
    stored = load_file(missing / "model.safetensors")
    del stored["pos_start"]
    save_file(stored, missing / "model.safetensors")
    other_tokenizer = copy("other_tokenizer")
    tokenizer = load_file(other_tokenizer / "tokenizer" / "model.safetensors")
    tokenizer["quantize.embedding.weight"] += 1
    save_file(tokenizer, other_tokenizer / "tokenizer" / "model.safetensors")
    shrinking = copy("shrinking")
    config = json.loads((shrinking / "config.json").read_text())
    config["model"]["scales"] = [1, 3, 2, 4]
    (shrinking / "config.json").write_text(json.dumps(config))
    for folder, said in [
        (shrinking, r"config\.json is damaged: model: .*scales must grow; got 3 followed by 2"),
        (cut, r"model\.safetensors is no file of tensors, or a damaged one"),
        (missing, r"does not fit: missing pos_start"),
        (other_tokenizer, r"the tokenizer has hash \w+, the transformer was trained with \w+"),
        (tmp_path, r"is no inference folder .* it has no config\.json"),
        (exported / "model.safetensors", r"is no inference folder .* it has no config\.json"),
        (exported / "tokenizer", r"is no inference folder .*config\.json has format 'star-dist tokenizer"),
    ]:
        with pytest.raises(UserError, match=said):
            StarPipeline.from_pretrained(folder)


def test_exporting_what_is_not_there(trained: RunConfig, exported: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run folder"):
        export_checkpoint(tmp_path, tmp_path / "out", None, "fp32")
    with pytest.raises(UserError, match=r"has no complete checkpoint of step 7, only of steps \[40, 80\]"):
        export_checkpoint(Path(trained.run_dir), tmp_path / "out", 7, "fp32")
    with pytest.raises(UserError, match=r"is an export already; name the folder of a run$"):
        export_checkpoint(exported, tmp_path / "out", None, "fp32")
    assert not (tmp_path / "out").exists()


def test_an_export_deletes_nothing_but_an_earlier_export(trained: RunConfig, tmp_path: Path) -> None:
    run_dir = Path(trained.run_dir)
    (tmp_path / "file").write_text("mine")
    for out in (run_dir, tmp_path, tmp_path / "file", Path(".")):
        with pytest.raises(UserError, match="choose another --out|has no name of its own"):
            export_checkpoint(run_dir, out, None, "bf16")
    assert (tmp_path / "file").read_text() == "mine"
    out = tmp_path / "model"
    out.mkdir()
    (tmp_path / "link").symlink_to(out)
    for link in (tmp_path / "link", out):  # an export may be replaced
        assert export_checkpoint(run_dir, link, None, "bf16") == 80
    assert (tmp_path / "link").is_symlink() and (out / "config.json").is_file()
    (out / "heart.png").write_text("mine")
    with pytest.raises(UserError, match=r"model would be replaced, but holds heart\.png, which no export wrote"):
        export_checkpoint(run_dir, out, None, "bf16")
    assert (out / "heart.png").read_text() == "mine"


def test_folders_beside_an_export_are_left_alone(exported: Path, tmp_path: Path) -> None:
    pipeline = StarPipeline.from_pretrained(exported)
    for name in ("model.partial", "model.earlier"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis").write_text("mine")
    for _ in range(2):
        pipeline.save_pretrained(tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.earlier", "model.partial"]
    assert all((tmp_path / name / "thesis").read_text() == "mine" for name in ("model.partial", "model.earlier"))
    assert (tmp_path / "model").stat().st_mode == (tmp_path / "model.partial").stat().st_mode  # as of any new folder


def test_an_interrupted_export_leaves_the_earlier_one(
    trained: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, out = Path(trained.run_dir), tmp_path / "model"
    export_checkpoint(run_dir, out, 40, "fp32")

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    def interrupted_between_moves(source: Path, target: Path, replace: Callable = os.replace) -> None:
        if Path(source).name == "new":
            raise KeyboardInterrupt
        replace(source, target)

    for module, name, instead in (
        (export, "save_text_encoder", interrupted),
        (export.os, "replace", interrupted_between_moves),
    ):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(module, name, instead)
            export_checkpoint(run_dir, out, 80, "fp32")
        assert StarPipeline.from_pretrained(out).origin.step == 40
        assert [path.name for path in tmp_path.iterdir()] == ["model"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(export.shutil, "rmtree", interrupted)
        export_checkpoint(run_dir, out, 80, "fp32")
    assert StarPipeline.from_pretrained(out).origin.step == 80
    assert export_checkpoint(run_dir, out, 80, "bf16") == 80
    (left,) = (path for path in tmp_path.iterdir() if path != out)  # as a kill leaves it, and later exports, too
    assert left.name.startswith("model.export-") and StarPipeline.from_pretrained(left / "earlier").origin.step == 40


def test_weights_that_are_not_finite_are_not_exported(exported: Path, tmp_path: Path) -> None:
    pipeline = StarPipeline.from_pretrained(exported)
    pipeline.model.blocks[1].ffn.fc1.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"blocks\.1\.ffn\.fc1\.weight holds values that are not finite"):
        pipeline.save_pretrained(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_run_starts_from_an_export(run_config: MakeConfig, exported: Path, trained: RunConfig) -> None:
    """Its first loss is about what the other run ended with, not that of random weights."""
    config = run_config(train={"steps": 2, "init_from": str(exported)}, optimizer={"learning_rate": 1e-9})
    first = train_on(config, 2)[1]["loss/total"]
    fresh = train_on(run_config(run_dir=config.run_dir + "-fresh", train={"steps": 2}), 2)[1]["loss/total"]
    assert first < fresh - 0.05


def test_levels_of_another_schedule_take_the_nearest_relative_position(
    run_config: MakeConfig, exported: Path, tmp_path: Path
) -> None:
    stored = load_file(exported / "model.safetensors")["lvl_embed.weight"]
    tokenizer = read_export_config(exported).tokenizer_hash
    same = initial_weights_from(exported, run_config(), tokenizer)
    assert torch.equal(same["lvl_embed.weight"], stored)
    more = run_config(scales=[1, 2, 3, 4, 5, 6, 8], resolution=32)
    extended = initial_weights_from(exported, more, tokenizer)
    assert torch.equal(extended.pop("lvl_embed.weight"), stored[[0, 0, 1, 2, 2, 2, 3]])  # halves round to even levels
    assert all(torch.equal(tensor, same[name]) for name, tensor in extended.items())
    for changed, said in [
        (
            dict(model={"rope_convention": "public"}),
            r"was trained with model\.rope_convention paper, the config has public",
        ),
        (dict(model={"width": 64}), r"was trained with model\.width 32, the config has 64"),
    ]:
        with pytest.raises(UserError, match=said):
            initial_weights_from(exported, run_config(**changed), tokenizer)
    with pytest.raises(UserError, match=rf"tokens of tokenizer {tokenizer}, the run's tokenizer.path has 0123"):
        initial_weights_from(exported, run_config(), "0123")
    assert other_text(exported, run_config()) == []
    assert other_text(exported, run_config(text={"max_tokens": 7, "pooling": "mean"})) == [
        f"{exported} was trained with text.pooling auto, the run has mean",
        f"{exported} was trained with text.max_tokens 8, the run has 7",
    ]


def test_an_export_is_not_measured_with_other_texts_unnoticed(
    trained: RunConfig, exported: Path, caplog: pytest.LogCaptureFixture
) -> None:
    measured = evaluate(exported, trained, None)
    assert measured == evaluate(Path(trained.run_dir), trained, None) | {"model": str(exported)} and not caplog.messages
    other = trained.model_copy(update={"text": trained.text.model_copy(update={"pooling": "pooler"})})
    with pytest.raises(
        UserError, match=r"trained with model\.depth 2, the config has 3; give --config the config of its"
    ):
        evaluate(exported, trained.model_copy(update={"model": trained.model.model_copy(update={"depth": 3})}), None)
    assert evaluate(exported, other, None)["validation/loss/total"] != measured["validation/loss/total"]
    assert caplog.messages == [f"warning: {exported} was trained with text.pooling auto, the run has pooler"]


@pytest.mark.parametrize(("out", "said"), [("metrics.jsonl/out.json", "metrics.jsonl: "), ("", " is a folder; name a")])
def test_an_out_that_cannot_be_is_found_before_anything_is_measured(
    out: str, said: str, trained: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("something was measured")

    run = Path(trained.run_dir)
    monkeypatch.setattr(evaluation, "evaluate", never)
    monkeypatch.delenv("RANK", raising=False)  # with it errors of files keep their traceback
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(run), "--out", str(run / out)])
    with pytest.raises(SystemExit):
        runpy.run_path(str(Path(__file__).parents[2] / "launcher" / "evaluate.py"), run_name="__main__")
    assert said in capsys.readouterr().err
