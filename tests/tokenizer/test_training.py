"""The tokenizer's training: it learns, resumes bit-identically, is the same on 2 ranks, and names every mistake."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo  # optimizers import it when they are built; here once, before ranks are forked
from PIL import Image
from safetensors.torch import load_file

from star_dist.config import ConfigError, TokenizerTrainConfig, load_config
from star_dist.config.tokenizer import least_judged_side
from star_dist.data.pictures import normalize
from star_dist.errors import Unavailable, UserError
from star_dist.process import prepare_process_environment
from star_dist.scales import ScaleSchedule
from star_dist.tokenizer.batches import PicturePaths, ReadablePictures, StepBatches, find_pictures, fingerprint
from star_dist.tokenizer.codebook import codebook_usage
from star_dist.tokenizer.io import load_tokenizer
from star_dist.tokenizer.losses import PatchDiscriminator
from star_dist.tokenizer.quantizer import Phi
from star_dist.tokenizer.reconstructions import draw_reconstructions, psnr
from star_dist.tokenizer.train import TokenizerTraining, train_tokenizer
from star_dist.tokenizer.update import LAST_RESTART_FRACTION
from tests.ranks import RankFailed, run_ranks
from tests.tokenizer.conftest import MakeConfig

LOSS_TOLERANCE = 1e-4  # 2 ranks sum floats in another order; measured worst case 4e-6 after 6 steps
REPOSITORY = Path(__file__).parents[2]
ADVERSARIAL = {
    "loss": {"adversarial": 0.1, "adversarial_start": 2},
    "resolution": 32,  # 16 pixels are too few for the discriminator
    "tokenizer": {"scales": [1, 2, 4, 8]},
    "learning_rate": 3e-4,
}
with_and_without_discriminator = pytest.mark.parametrize("changes", [{}, ADVERSARIAL], ids=["plain", "adversarial"])


def rank_main(config: TokenizerTrainConfig) -> None:
    train_tokenizer(config, prepare_process_environment())


def killed_after(config: TokenizerTrainConfig, step: int) -> None:
    """A rank that is killed, as by `kill -9`, when it has trained `step` steps."""
    train_step = TokenizerTraining._train_step

    def step_or_die(self: TokenizerTraining, number: int, batch: Any) -> Any:
        if number == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return train_step(self, number, batch)

    TokenizerTraining._train_step = step_or_die
    rank_main(config)


def metrics(config: TokenizerTrainConfig) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("throughput/")} for line in lines]


def losses(config: TokenizerTrainConfig) -> list[float]:
    return [line["loss/total"] for line in metrics(config)]


def test_it_learns_and_reports(make_config: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_config(steps=100, global_batch=8, log_every=5, checkpoint_every=20)
    run_ranks(rank_main, 1, config)
    run_dir = Path(config.run_dir)
    lines = metrics(config)
    assert [line["step"] for line in lines] == list(range(5, 101, 5))
    # The median colour alone is 0.53 away. One step's loss swings up to 0.45; of six seeds this mean is 0.09 to 0.39.
    assert np.mean([line["loss/l1"] for line in lines[-5:]]) < 0.47
    for side, cells in ((1, 1), (2, 4), (4, 16)):
        assert 1 <= lines[-1][f"codebook/used_scale_{side}"] <= 32
        assert 1 <= lines[-1][f"codebook/perplexity_scale_{side}"] <= 32
        hits = load_tokenizer(run_dir).quantize.ema_vocab_hit_SV[(1, 2, 4).index(side)].sum().item()
        assert hits == pytest.approx(8 * cells * (1 - 0.98**100), rel=1e-3)
    assert {"optim/learning_rate", "optim/grad_norm", "psnr", "loss/quantization", "data/unreadable"} <= lines[
        -1
    ].keys()
    assert Image.open(run_dir / "reconstructions.png").size == (5 * 16, 2 * 16)
    assert load_tokenizer(run_dir).config == config.tokenizer
    assert not (run_dir / "checkpoint.pt").exists()


@with_and_without_discriminator
def test_a_killed_run_goes_on_bit_identically(make_config: MakeConfig, tmp_path: Path, changes: dict[str, Any]) -> None:
    whole = make_config(run_dir=str(tmp_path / "whole"), **changes)
    killed = make_config(run_dir=str(tmp_path / "killed"), **changes)
    run_ranks(rank_main, 1, whole)
    for step in (5, 3):  # after the checkpoint of step 4; and, gone on from there, never reaching step 3 again
        try:
            run_ranks(killed_after, 1, killed, step)
        except RankFailed:
            assert step == 5
            assert (tmp_path / "killed" / "checkpoint.pt").is_file()
    assert metrics(killed) == metrics(whole)
    whole_weights, weights = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(weights[name], tensor) for name, tensor in whole_weights.items())


def test_a_killed_run_of_two_ranks_goes_on_with_the_same_losses(make_config: MakeConfig, tmp_path: Path) -> None:
    whole = make_config(run_dir=str(tmp_path / "whole"), data={"num_workers": 1})
    killed = make_config(run_dir=str(tmp_path / "killed"))
    run_ranks(rank_main, 2, whole)
    with pytest.raises(RankFailed):
        run_ranks(killed_after, 2, killed, 3)
    run_ranks(rank_main, 2, killed)
    assert metrics(killed) == metrics(whole)


@with_and_without_discriminator
def test_two_ranks_equal_one(make_config: MakeConfig, tmp_path: Path, changes: dict[str, Any]) -> None:
    configs = [make_config(run_dir=str(tmp_path / str(n)), **changes) for n in (1, 2)]
    for world_size, config in enumerate(configs, start=1):
        run_ranks(rank_main, world_size, config)
    one, two = map(metrics, configs)
    for line, other in zip(one, two):
        assert line.keys() == other.keys()
        for key, value in line.items():
            assert other[key] == pytest.approx(value, rel=1e-3, abs=LOSS_TOLERANCE), (line["step"], key)
    assert ("loss/discriminator" in one[-1]) == ("loss" in changes)
    assert sum(line.get("codebook/restarted", 0) for line in one) > 0


def test_unused_codes_move_onto_residuals(make_config: MakeConfig) -> None:
    config = make_config(steps=100)
    trainer = TokenizerTraining(config, prepare_process_environment(), torch.device("cpu"))
    quantizer = trainer.model.quantize
    with torch.no_grad():
        quantizer.embedding.weight[5:] = 100.0  # so far away that nothing is ever nearest to them
    batches = StepBatches(trainer.pictures, config.seed, 4, 0, 1, False)
    values = trainer._train_step(0, batches[0])
    assert "codebook/restarted" not in values
    assert codebook_usage(quantizer, config.schedule)["codebook/used"] <= 5
    values = trainer._train_step(1, batches[1])
    assert values["codebook/restarted"] >= 27
    assert quantizer.embedding.weight.abs().max() < 50
    (adamw, _), _ = trainer.update.optimizers
    assert not adamw.state[quantizer.embedding.weight]["exp_avg_sq"][5:].any()
    for step in range(2, 4):
        trainer._train_step(step, batches[step])
    assert codebook_usage(quantizer, config.schedule)["codebook/used"] > 5
    late = trainer._train_step(int(LAST_RESTART_FRACTION * config.steps) + 1, batches[4])
    assert "codebook/restarted" not in late


def test_the_quantizer_trains_in_full_float32(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under bf16 too, and without the TF32 that convolutions use on a GPU unless it is forbidden, and products if it is
    allowed.
    """
    config = make_config(precision="bf16")
    trainer = TokenizerTraining(config, prepare_process_environment(), torch.device("cpu"))
    seen = set()

    def record(phi: Phi, inputs: tuple[torch.Tensor]) -> None:
        precisions = (part.fp32_precision for part in parts)
        seen.add((*precisions, torch.is_autocast_enabled("cpu"), inputs[0].dtype))

    for phi in trainer.model.quantize.quant_resi.qresi_ls:
        phi.register_forward_pre_hook(record)
    parts = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    for part in parts:
        monkeypatch.setattr(part, "fp32_precision", "tf32")
    batches = StepBatches(trainer.pictures, config.seed, 4, 0, 1, False)
    for step in range(2):
        values = trainer._train_step(step, batches[step])
    assert values["codebook/restarted"] > 0
    assert seen == {("ieee", "ieee", False, torch.float32)}


def test_batches_depend_on_seed_and_step_alone(pictures_folder: Path) -> None:
    pictures = ReadablePictures(find_pictures(pictures_folder), 16, keep_in_memory=False)
    whole = StepBatches(pictures, 1, 8, 0, 1, True)
    halves = [StepBatches(pictures, 1, 8, rank, 2, True) for rank in range(2)]
    for step in (0, 3, 100):
        split = torch.cat([half[step].pictures for half in halves])
        assert torch.equal(whole[step].pictures, split)
    resumed = next(StepBatches(pictures, 1, 8, 0, 1, True).from_step(3, 4, 0))
    assert torch.equal(resumed.pictures, whole[3].pictures)
    assert not torch.equal(whole[3].pictures, StepBatches(pictures, 2, 8, 0, 1, True)[3].pictures)
    epoch = torch.cat([StepBatches(pictures, 1, 60, 0, 1, False)[0].pictures])
    assert len(torch.unique(epoch.flatten(1), dim=0)) == 60  # every picture once


def test_every_epoch_has_an_order_and_mirrored_pictures_of_its_own(pictures_folder: Path) -> None:
    pictures = ReadablePictures(find_pictures(pictures_folder), 16, keep_in_memory=True)
    originals = normalize(torch.stack([pictures.read(i, {}) for i in range(60)]))
    batches = StepBatches(pictures, 1, 40, 0, 1, True)
    shown = torch.cat([batches[step].pictures for step in range(3)])[:, None]  # two epochs of 60
    plain, mirrored = ((shown == each).flatten(2).all(-1) for each in (originals, originals.flip(3)))
    assert (plain ^ mirrored).sum(1).tolist() == [1] * 120
    first, second = (plain | mirrored).nonzero()[:, 1].view(2, 60).tolist()
    assert first != second and sorted(first) == sorted(second) == list(range(60))
    assert 40 < mirrored.sum() < 80
    assert mirrored[:60].any(1).tolist() != mirrored[60:].any(1).tolist()


def test_an_unreadable_picture_gives_way_to_the_next(pictures_folder: Path, tmp_path: Path) -> None:
    """Round the end too: a run that goes on in newer code must see the same pictures."""
    for i in range(4):
        picture = (pictures_folder / f"{i:03}.png").read_bytes()
        (tmp_path / f"{i}.png").write_bytes(b"" if i in (1, 3) else picture)
    pictures = ReadablePictures(find_pictures(tmp_path), 16, keep_in_memory=False)
    found = [pictures.read(i, {}) for i in range(4)]
    assert torch.equal(found[1], found[2]) and torch.equal(found[3], found[0])
    assert not torch.equal(found[0], found[2])


def test_unreadable_pictures_are_skipped_counted_and_listed(
    make_config: MakeConfig, pictures_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "some_damaged"
    folder.mkdir()
    for path in sorted(pictures_folder.glob("*.png"))[:6]:
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "000.png").write_bytes(b"")
    (folder / "003.png").write_bytes((folder / "003.png").read_bytes()[:300])
    config = make_config(data={"pictures": str(folder)})
    run_ranks(rank_main, 2, config)
    assert metrics(config)[-1]["data/unreadable"] == 2
    listed = [json.loads(line) for line in (Path(config.run_dir) / "unreadable.jsonl").read_text().splitlines()]
    assert listed == [
        {"file": str(folder / "000.png"), "reason": "empty file"},
        {"file": str(folder / "003.png"), "reason": "truncated picture"},
    ]


def test_a_storage_that_fails_is_no_reason_to_drop_a_picture(
    pictures_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_bytes, faults = Path.read_bytes, []

    def read_or_fail(path: Path) -> bytes:
        if faults:
            number = faults.pop()
            raise OSError(number, os.strerror(number), str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", read_or_fail)
    monkeypatch.setattr("star_dist.data.pictures.FIRST_PAUSE_S", 0)
    paths = find_pictures(pictures_folder)
    pictures = ReadablePictures(paths, 16, keep_in_memory=False)
    faults += [errno.ESTALE] * 4
    pictures.read(0, {})
    faults += [errno.EACCES]
    pictures.read(1, {})
    assert pictures.unreadable == {1: "unreadable file: Permission denied"}
    faults += [errno.ESTALE] * 5
    said = rf"^cannot read {paths[2]}: Stale file handle, 5 times; try again when the storage answers$"
    with pytest.raises(Unavailable, match=said):
        pictures.read(2, {})
    faults += [errno.ESTALE] * 5
    with pytest.raises(Unavailable, match=r"^cannot read .*: Stale file handle, 5 times; try again when .*answers$"):
        next(StepBatches(pictures, 1, 8, 0, 1, False).from_step(0, 2, 1))  # from a worker, without its traceback


def test_linked_folders_and_names_that_are_no_unicode(pictures_folder: Path, tmp_path: Path) -> None:
    picture = (pictures_folder / "000.png").read_bytes()
    for name in ("folder/a.png", os.fsdecode(b"folder/\xe9.png"), "elsewhere/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(picture)
    folder = tmp_path / "folder"
    before = fingerprint(find_pictures(folder))
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    paths = find_pictures(folder)
    assert list(paths) == [folder / "a.png", folder / "link" / "b.png", folder / os.fsdecode(b"\xe9.png")]
    assert fingerprint(paths) != before


def test_pictures_come_in_the_order_of_paths(tmp_path: Path) -> None:
    """Which checkpoints of older code know their pictures by."""
    names = ["a/b.png", "a-b.PNG", "a.png", "a/b/c.jpg", "a/b-c.webp", "B.png", os.fsdecode(b"a/\xe9.png"), "a b/é.png"]
    for name in [*names, "a/no picture.txt"]:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    paths = find_pictures(tmp_path)
    assert list(paths) == sorted(tmp_path / name for name in names) and paths[-1] == list(paths)[-1]
    written = "\n".join(path.relative_to(tmp_path).as_posix() for path in paths).encode(errors="surrogatepass")
    assert fingerprint(paths) == hashlib.sha256(written).hexdigest()[:16]


def test_a_million_pictures_take_little_memory() -> None:
    """In every rank and, as Python counts references in what it reads, in every loader worker once more."""
    number, folder = 20_000, Path("/data/pictures")
    names = [f"{i % 100:03}/{i:016x}.jpg" for i in range(number)]
    tracemalloc.start()
    try:
        pictures = ReadablePictures(PicturePaths(folder, names), 16, keep_in_memory=False)
        fingerprint(pictures.paths)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held / number < 50
    assert pictures.paths[number - 1] == folder / names[-1] and len(pictures) == number


def test_folders_without_a_good_picture_are_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    process = prepare_process_environment()
    with pytest.raises(UserError, match=r"no folder of pictures at .*nowhere; change data\.pictures"):
        train_tokenizer(make_config(data={"pictures": str(tmp_path / "nowhere")}), process)
    folder = tmp_path / "bad"
    folder.mkdir()
    with pytest.raises(UserError, match="holds no pictures"):
        train_tokenizer(make_config(data={"pictures": str(folder)}), process)
    (folder / "a.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="none of the 1 pictures can be read"):
        train_tokenizer(make_config(data={"pictures": str(folder)}), process)


def test_a_finished_run_is_left_alone_and_another_configuration_is_refused(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(steps=2)
    run_ranks(rank_main, 1, config)
    before = {path: path.stat().st_mtime_ns for path in Path(config.run_dir).iterdir()}
    rank_main(make_config(steps=2, log_every=2, data={"num_workers": 1}))
    assert "holds this tokenizer already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in Path(config.run_dir).iterdir()} == before
    with pytest.raises(UserError, match=r"begun with learning_rate 0\.003, this configuration has 0\.001"):
        rank_main(make_config(steps=2, learning_rate=1e-3))
    with pytest.raises(UserError, match="begun with steps 2, this configuration has 6"):
        rank_main(make_config())


def test_checkpoints_that_cannot_be_used_are_refused(
    make_config: MakeConfig, pictures_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "changing"
    folder.mkdir()
    for path in sorted(pictures_folder.glob("*.png"))[:8]:
        (folder / path.name).write_bytes(path.read_bytes())
    config = make_config(data={"pictures": str(folder)})
    with pytest.raises(RankFailed):
        run_ranks(killed_after, 1, config, 3)
    (folder / "007.png").rename(folder / "008.png")
    with pytest.raises(UserError, match="does not hold the same pictures"):
        rank_main(config)
    checkpoint = Path(config.run_dir) / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"checkpoint\.pt is damaged .*; remove it to start anew"):
        rank_main(config)


def test_folders_that_nodes_do_not_share_are_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config()

    def own_run_dir(last_step: int | None) -> None:
        own = config.model_copy(update={"run_dir": f"{config.run_dir}/{os.environ['RANK']}"})
        rank_main(own) if last_step is None else killed_after(own, last_step)

    def own_pictures() -> None:
        folder = tmp_path / os.environ["RANK"]
        folder.mkdir()
        name = f"{folder.name}.png"
        (folder / name).write_bytes((Path(config.data.pictures) / "000.png").read_bytes())
        rank_main(config.model_copy(update={"data": config.data.model_copy(update={"pictures": str(folder)})}))

    with pytest.raises(RankFailed):
        run_ranks(own_run_dir, 2, 3)
    with pytest.raises(RankFailed, match=r"run_dir .* is at step 2 on rank 0 and at step 0 on rank 1; give a folder"):
        run_ranks(own_run_dir, 2, None)
    with pytest.raises(RankFailed, match=r"fingerprint \w{16} on rank 0 and \w{16} on rank 1; give a folder"):
        run_ranks(own_pictures, 2)


def test_a_loss_that_is_not_finite_stops_before_the_update(make_config: MakeConfig) -> None:
    config = make_config()
    trainer = TokenizerTraining(config, prepare_process_environment(), torch.device("cpu"))
    batch = StepBatches(trainer.pictures, 0, 4, 0, 1, False)[0]
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    batch.pictures[0] = np.nan
    with pytest.raises(
        UserError, match=r"step 8: the loss \(nan\) or its gradient \(norm nan\) is not finite; the same command"
    ):
        trainer._train_step(7, batch)
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.model.state_dict().items())


def test_batches_that_ranks_cannot_share_are_refused(make_config: MakeConfig) -> None:
    with pytest.raises(RankFailed, match="global_batch 5 is not a multiple of 2 ranks"):
        run_ranks(rank_main, 2, make_config(global_batch=5))


def test_perceptual_loss_wants_its_weights(make_config: MakeConfig, tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    with pytest.raises(ConfigError, match=r"loss\.perceptual is 1\.0 but loss\.vgg16_weights is null"):
        make_config(loss={"perceptual": 1.0})
    missing = str(tmp_path / "vgg16.pth")
    with pytest.raises(UserError, match=r"vgg16\.pth does not exist"):
        rank_main(make_config(loss={"perceptual": 1.0, "vgg16_weights": missing}))
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, missing)
    with pytest.raises(UserError, match=r"vgg16\.pth as torchvision's VGG-16.*missing features\.0\.bias"):
        rank_main(make_config(loss={"perceptual": 1.0, "vgg16_weights": missing}))


def test_pictures_that_the_discriminator_cannot_judge_are_refused(make_config: MakeConfig) -> None:
    least = least_judged_side()
    discriminator = PatchDiscriminator(channels=8)
    assert discriminator(torch.zeros(1, 3, least, least)).shape == (1, 1, 1, 1)
    with pytest.raises(RuntimeError, match="size"):
        discriminator(torch.zeros(1, 3, least - 1, least - 1))
    with pytest.raises(
        ConfigError, match=rf"loss\.adversarial is 0\.1, .* pictures of {least} pixels .* resolution is 16"
    ):
        make_config(loss={"adversarial": 0.1})
    make_config(loss={"adversarial": 0.1}, resolution=least, tokenizer={"scales": [1, 2, least // 4]})


def test_many_pictures_are_reconstructed_a_few_at_a_time(
    tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that no number of `sample_pictures` ends a training at its first checkpoint."""
    model = load_tokenizer(tokenizer_folder)
    schedule = ScaleSchedule(model.config.scales)
    originals = torch.rand(20, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    error = (model.decode(model.encode(originals, schedule), schedule) - originals).square().mean().item()
    encode, sizes = type(model).encode, []

    def counted(self: torch.nn.Module, pictures: torch.Tensor, schedule: ScaleSchedule) -> torch.Tensor:
        sizes.append(len(pictures))
        return encode(self, pictures, schedule)

    monkeypatch.setattr(type(model), "encode", counted)
    sheet, quality = draw_reconstructions(model, originals, schedule)
    assert sizes == [16, 4] and sheet.size == (16 * 16, 4 * 16)
    assert quality == pytest.approx(psnr(error), rel=1e-4)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_demo.json"])
def test_configs_are_valid(name: str) -> None:
    config = load_config(TokenizerTrainConfig, REPOSITORY / "configs" / name)
    if name == "tokenizer.json":
        assert config.tokenizer == type(config.tokenizer)()  # the public architecture


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": {"norm_groups": 0}}, "norm_groups 0 must be 1 or more"),
        ({"tokenizer": {"channels": -8}}, "channels -8 must be 1 or more"),
        ({"tokenizer": {"vocab_size": 0}}, "vocab_size 0 must be 1 or more"),
        ({"tokenizer": {"code_dim": 0}}, "code_dim 0 must be 1 or more"),
        ({"tokenizer": {"blocks_per_level": 0}}, "blocks_per_level 0 must be 1 or more"),
        ({"tokenizer": {"num_phi": 0}}, "num_phi 0 must be 1 or more"),
        ({"tokenizer": {"channel_multipliers": [1, 0, 2]}}, r"channel_multipliers \[1, 0, 2\] must be 1 or more"),
        ({"tokenizer": {"channel_multipliers": []}}, r"channel_multipliers \[\] must be 1 or more"),
        ({"betas": [0.9, 1.0]}, r"betas\.1: input should be less than 1, got 1\.0"),
        ({"gradient_clipping": float("inf")}, "gradient_clipping: input should be a finite number, got Infinity"),
        ({"run_dir": ""}, "run_dir: string should have at least 1 character"),
        ({"data": {"pictures": "s3://bucket/pictures"}}, r"data\.pictures: must be a folder of a file system, got "),
        ({"loss": {"l1": float("inf")}}, r"loss\.l1: input should be a finite number, got Infinity"),
    ],
    ids=str,
)
def test_options_that_cannot_be_are_refused(make_config: MakeConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(**changes)
