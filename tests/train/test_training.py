"""Training on gloo ranks under DeepSpeed: equal however it is split, resumable at any moment, and it learns."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from star_dist.config import RunConfig
from star_dist.learning_rate import learning_rate_fraction
from star_dist.model.flops import training_flops
from star_dist.train.facts import read_events, read_reports
from star_dist.train.own_time import slowest_rank
from tests.ranks import RankFailed, run_ranks
from tests.train.runs import metrics, start_training, train, train_on, wait_for_step, weights

MakeConfig = Callable[..., RunConfig]

SPLIT_TOLERANCE = 2e-6  # of the loss; measured worst case 5e-7, float sums in another order
WEIGHT_TOLERANCE = 2e-5  # measured worst case 2e-6 after 4 steps of rate 1e-3


def losses(by_step: dict[int, dict[str, float]]) -> list[float]:
    return [by_step[step]["loss/total"] for step in sorted(by_step)]


def test_loss_falls_and_everything_is_reported(run_config: MakeConfig) -> None:
    config = run_config(
        train={"steps": 30},
        checkpoint={"every": 10, "keep_last": 2},
        validation={"every": 15, "num_samples": 5},
        samples={"every": 15, "prompts": ["red heart", "blue flag"]},
        logging={"every": 5},
    )
    by_step = train_on(config, 2)
    assert by_step[30]["loss/total"] < by_step[5]["loss/total"] - 0.1
    run_dir = Path(config.run_dir)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    training = next(line for line in lines if "loss/total" in line)
    for key in ("loss/scale_4", "accuracy/scale_1", "throughput/mfu", "time/data_wait", "optim/grad_norm"):
        assert training[key] is not None
    assert training["memory/peak_bytes"] > 0
    assert {line["step"] for line in lines if "validation/loss/total" in line} == {15, 30}
    assert sorted(path.name for path in (run_dir / "samples").iterdir()) == ["step_00000015.png", "step_00000030.png"]
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["step_00000020", "step_00000030"]
    environment = json.loads((run_dir / "environment.json").read_text())
    assert environment["world_size"] == 2 and environment["attention_kernel"].startswith("sdpa")
    flops_per_s = training["throughput/images_per_s"] * training_flops(config.star_config(), config.schedule, 4)
    assert training["throughput/images_per_s"] * training["time/step_s"] == pytest.approx(8)
    assert training["throughput/tokens_per_s"] == pytest.approx(30 * training["throughput/images_per_s"])
    rate = 1e-2 * learning_rate_fraction(4, 30, 2, "cosine", 0.1)
    assert training["step"] == 5 and training["optim/learning_rate"] == pytest.approx(rate)  # of the last step
    assert training["throughput/mfu"] == pytest.approx(flops_per_s / (2 * environment["peak_flops"]))


@pytest.mark.parametrize("stage", [3, 0, 1, 2])
def test_step_is_the_same_however_the_global_batch_is_split(run_config: MakeConfig, tmp_path: Path, stage: int) -> None:
    """1 rank x 8, 1 x 2 x 4 micro-batches and 2 ranks x 2 x 2: the same losses and the same weights."""
    splits = [(1, 8), (1, 2), (2, 2)] if stage == 3 else [(2, 2)]
    results = {}
    for world_size, micro_batch in splits:
        config = run_config(
            run_dir=str(tmp_path / f"{world_size}x{micro_batch}"),
            train={"steps": 4, "micro_batch": micro_batch, "zero_stage": stage},
            optimizer={"learning_rate": 1e-3},
        )
        results[world_size, micro_batch] = losses(train_on(config, world_size)), weights(config)
    reference_config = run_config(
        run_dir=str(tmp_path / "reference"),
        train={"steps": 4, "micro_batch": 8},
        optimizer={"learning_rate": 1e-3},
    )
    reference = results.get((1, 8)) or (losses(train_on(reference_config, 1)), weights(reference_config))
    for split_losses, split_weights in results.values():
        assert split_losses == pytest.approx(reference[0], abs=SPLIT_TOLERANCE)
        worst = max((split_weights[name] - tensor).abs().max().item() for name, tensor in reference[1].items())
        assert worst < WEIGHT_TOLERANCE


@pytest.mark.parametrize("power", [0.0, 0.5])
def test_a_plain_torch_step_gives_the_same_weights(run_config: MakeConfig, power: float) -> None:
    """The engine against twenty lines of PyTorch: loss scaling, clipping, groups, rate, dropped captions, order."""
    from star_dist.data.batches import TrainBatches, drop_captions
    from star_dist.data.fetch import fetch_metadata
    from star_dist.model.initialization import initialize_weights
    from star_dist.model.layout import PackedLayout
    from star_dist.model.star import STAR, pack_inputs
    from star_dist.text import TextEncoder
    from star_dist.tokenizer.io import load_tokenizer

    adam = {"betas": (0.8, 0.9), "eps": 1e-4}
    config = run_config(
        train={"steps": 4, "caption_dropout": 0.5, "scale_loss_power": power},
        optimizer=adam | {"learning_rate": 1e-3, "gradient_clipping": 0.1, "final_fraction": 0.3, "weight_decay": 0.5},
    )
    train_on(config, 2)

    def plain() -> dict[str, torch.Tensor]:
        from star_dist.process import prepare_process_environment

        prepare_process_environment()
        model = STAR(config.star_config())
        initialize_weights(model, config.seed)
        decay = [p for name, p in model.named_parameters() if p.ndim == 2 and name != "lvl_embed.weight"]
        others = [p for p in model.parameters() if not any(p is other for other in decay)]
        groups = [{"params": decay, "weight_decay": 0.5}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, **adam)
        encoder = TextEncoder(config.text, torch.device("cpu"))
        quantizer = load_tokenizer(Path(config.tokenizer.path)).quantize
        one_rank = config.model_copy(update={"train": config.train.model_copy(update={"micro_batch": 8})})
        batches = TrainBatches(one_rank, fetch_metadata(config.data), 1).starting_at(0)
        for step, rate in enumerate((0.5, 1.0, 1.0, 0.3 + 0.7 * (1 + math.cos(math.pi / 2)) / 2)):  # 2 of warm-up
            batch = next(batches)
            dropped = drop_captions(batch.sample_ids, seed=config.seed, step=step, rate=0.5)
            text = encoder(["" if drop else caption for caption, drop in zip(batch.captions, dropped)])
            inputs = pack_inputs(quantizer.teacher_forcing_input(batch.tokens_BL, config.schedule))
            layout = PackedLayout.uniform(config.schedule, 8, text.lengths)
            loss, _ = model(inputs, text.hidden_SW, text.pooled_BW, batch.tokens_BL.flatten(), layout=layout)
            weights_L = torch.tensor([n**-power for n in config.schedule.lengths for _ in range(n)])
            (loss.view(8, -1) @ (weights_L / weights_L.mean()) / loss.numel()).sum().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * rate
            optimizer.step()
            optimizer.zero_grad()
        return {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}

    (expected,) = run_ranks(plain, 1)
    for name, tensor in weights(config).items():
        assert (tensor - torch.from_numpy(expected[name])).abs().max() < WEIGHT_TOLERANCE, name


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_activation_checkpointing_changes_no_weight(run_config: MakeConfig, tmp_path: Path, mode: str) -> None:
    """At ZeRO-3, where a block's weights are gathered again for what is computed again."""
    configs = [
        run_config(run_dir=str(tmp_path / each), train={"steps": 3, "activation_checkpointing": each})
        for each in ("none", mode)
    ]
    for config in configs:
        train_on(config, 2)
    whole, again = map(weights, configs)
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


def test_token_dropping_is_the_same_on_any_number_of_ranks(run_config: MakeConfig, tmp_path: Path) -> None:
    """Which tokens a sample keeps depends on seed, step and sample alone; the loss stays that of all tokens in size."""
    reports, found = [], []
    for world_size in (1, 2):
        config = run_config(
            run_dir=str(tmp_path / str(world_size)), train={"steps": 3, "token_keep": 0.5, "token_drop_scales": 2}
        )
        reports.append(train_on(config, world_size))
        found.append(weights(config))
    assert reports[0][1]["loss/total"] == pytest.approx(math.log(64), abs=0.2)
    for step, values in reports[0].items():
        assert reports[1][step]["loss/total"] == pytest.approx(values["loss/total"], abs=1e-5)
    assert all((found[1][name] - tensor).abs().max() < WEIGHT_TOLERANCE for name, tensor in found[0].items())
    report = read_reports(Path(config.run_dir))[0]
    kept = 1 + 4 + 4 + 8  # of 1 + 4 + 9 + 16
    assert report["throughput/tokens_per_s"] == pytest.approx(kept * report["throughput/images_per_s"])


def test_initial_weights_are_the_same_partitioned_or_not(run_config: MakeConfig) -> None:
    """Under zero.Init on 2 ranks: bit-identical to an unsharded build, so all statistics are too."""
    from star_dist.model.initialization import initialize_weights
    from star_dist.model.star import STAR

    config = run_config()

    def partitioned() -> dict | None:
        from star_dist.process import prepare_process_environment
        from star_dist.train.engine import Engine

        engine = Engine(config, prepare_process_environment())
        full = engine.full_weights()
        assert max(parameter.numel() for parameter in engine.model.parameters()) == 0  # nothing is whole
        return full and {name: tensor.numpy() for name, tensor in full.items()}

    full, nothing = run_ranks(partitioned, 2)
    assert nothing is None
    model = STAR(config.star_config())
    initialize_weights(model, config.seed)
    for name, parameter in model.named_parameters():
        assert torch.equal(torch.from_numpy(full[name]), parameter.detach()), name


@pytest.mark.parametrize(("world_size", "precision", "num_workers"), [(1, "fp32", 0), (2, "fp32", 2), (2, "bf16", 0)])
def test_killed_and_resumed_is_bit_identical(
    run_config: MakeConfig, tmp_path: Path, world_size: int, precision: str, num_workers: int
) -> None:
    """SIGKILL of all ranks at arbitrary moments; the same start again; every report and the final weights are equal."""
    sections = {
        "train": {"steps": 14, "precision": precision},
        "checkpoint": {"every": 3},
        "data": {"num_workers": num_workers},
        "logging": {"every": 2},
    }
    undisturbed = run_config(run_dir=str(tmp_path / "undisturbed"), **sections)
    expected = train_on(undisturbed, world_size)
    config = run_config(run_dir=str(tmp_path / "killed"), **sections)
    for kill_after_step in (2, 9):
        ranks = start_training(config, world_size)
        wait_for_step(config, kill_after_step)
        ranks.kill()
    found = train_on(config, world_size)
    assert found == expected
    assert sorted(found) == [2, 3, 4, 6, 8, 9, 10, 12, 14]  # every second step, and every checkpoint
    resumed, whole = weights(config), weights(undisturbed)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_a_finished_run_started_again_does_nothing(run_config: MakeConfig) -> None:
    config = run_config(train={"steps": 3})
    before = train_on(config, 1)
    assert train_on(config, 1) == before
    with pytest.raises(RankFailed, match=r"checkpoint of step 3, beyond train\.steps 2"):
        train_on(run_config(train={"steps": 2}), 1)


def test_weights_and_biases_offline(run_config: MakeConfig) -> None:
    config = run_config(train={"steps": 2}, logging={"wandb": "offline", "every": 1})
    train_on(config, 1)
    (recorded,) = (Path(config.run_dir) / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"loss/scale_4" in recorded.read_bytes()


@pytest.mark.parametrize(("stage", "precision"), [(3, "fp32"), (0, "fp32"), (0, "bf16")])
def test_a_step_that_is_not_finite_is_skipped_and_counted(run_config: MakeConfig, stage: int, precision: str) -> None:
    config = run_config(train={"steps": 4, "zero_stage": stage, "precision": precision})

    def poisoned() -> tuple[int, bool]:
        from star_dist.model.layout import PackedLayout
        from star_dist.process import prepare_process_environment
        from star_dist.train.engine import Engine

        engine = Engine(config, prepare_process_environment())
        before = engine.full_weights()
        layout = PackedLayout.uniform(config.schedule, 2, (3, 3))
        num_tokens = 2 * config.schedule.num_tokens
        for _ in range(config.accumulation_steps(2)):
            inputs, text = torch.full((num_tokens, 8), float("nan")), torch.zeros(6, 16)
            targets = torch.zeros(num_tokens, dtype=torch.long)
            loss, _ = engine(inputs, text, torch.zeros(2, 16), targets, layout=layout)
            engine.backward(loss.sum())
            engine.step(1e-3)
        after = engine.full_weights()
        return engine.skipped_steps, before is None or all(torch.equal(before[name], after[name]) for name in before)

    assert run_ranks(poisoned, 2) == [(1, True), (1, True)]


def test_stage_0_in_bf16_goes_on_from_its_masters(run_config: MakeConfig, tmp_path: Path) -> None:
    """Every rank keeps fp32 masters beside its bf16 weights; a resumed run has the same ones."""
    results = []
    for name, ends in (("undisturbed", [8]), ("resumed", [4, 8])):
        for steps in ends:
            config = run_config(
                run_dir=str(tmp_path / name),
                train={"steps": steps, "zero_stage": 0, "precision": "bf16"},
                optimizer={"schedule": "constant"},
            )
            found = train_on(config, 2)
        results.append((found, weights(config)))
    (expected, whole), (found, resumed) = results
    assert found == expected and sorted(found)[-1] == 8
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in whole.values())


@pytest.mark.parametrize(
    ("stage", "knobs"),
    [
        (2, {"data_types": {"grad_accum_dtype": "fp32"}}),
        (3, {"zero_optimization": {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}}),
    ],
)
def test_knobs_of_deepspeed_train_and_resume(run_config: MakeConfig, tmp_path: Path, stage: int, knobs: dict) -> None:
    def run(name: str, steps: int, deepspeed: dict) -> list[float]:
        train = {"steps": steps, "zero_stage": stage, "precision": "bf16"}
        sections = dict(train=train, optimizer={"schedule": "constant"}, deepspeed=deepspeed)
        return losses(train_on(run_config(run_dir=str(tmp_path / name), **sections), 2))

    undisturbed = run("undisturbed", 4, knobs)
    run("resumed", 2, knobs)
    assert run("resumed", 4, knobs) == undisturbed
    assert undisturbed == pytest.approx(run("without", 4, {}), rel=1e-3)


def test_validation_counts_every_held_out_sample_once(run_config: MakeConfig, tmp_path: Path) -> None:
    """However many ranks: 7 samples over 2 ranks x 2 leave a short last round. Whole, whatever training drops."""
    results = []
    drops = {"caption_dropout": 1.0, "token_keep": 0.5}
    for world_size, micro_batch, dropped in ((1, 1, {}), (1, 2, drops), (2, 2, {})):
        config = run_config(
            run_dir=str(tmp_path / f"{world_size}x{micro_batch}"),
            train={"steps": 2, "micro_batch": micro_batch} | dropped,
            optimizer={"learning_rate": 1e-9},
            validation={"every": 2, "num_samples": 7},
        )
        reported = train_on(config, world_size)[2]
        results.append({name: value for name, value in reported.items() if name.startswith("validation/")})
    assert len(results[0]) == 10
    for other in results[1:]:
        assert other == pytest.approx(results[0], abs=SPLIT_TOLERANCE)


def test_what_fails_after_a_save_comes_with_the_next_start(run_config: MakeConfig, tmp_path: Path) -> None:
    """Drawing takes memory that training does not: out of it, the checkpoint is complete, and no report is missing."""
    sections = {
        "train": {"steps": 8},
        "checkpoint": {"every": 4},
        "validation": {"every": 4, "num_samples": 3},
        "samples": {"every": 4, "prompts": ["red heart"]},
    }
    undisturbed = train_on(run_config(run_dir=str(tmp_path / "undisturbed"), **sections), 2)
    config = run_config(**sections)

    def run() -> None:
        from star_dist.train import trainer

        def pipeline(*_: object) -> None:
            raise torch.OutOfMemoryError("while drawing")

        trainer.StarPipeline = pipeline
        train(config)

    with pytest.raises(RankFailed, match="while drawing"):
        run_ranks(run, 2)
    pictures = Path(config.run_dir) / "samples"
    assert [checkpoint.name for checkpoint in (Path(config.run_dir) / "checkpoints").iterdir()] == ["step_00000004"]
    assert not pictures.exists()
    assert train_on(config, 2) == undisturbed
    assert sorted(path.name for path in pictures.iterdir()) == ["step_00000004.png", "step_00000008.png"]


def test_corrupt_validation_shards_end_no_training(run_config: MakeConfig, capfd: pytest.CaptureFixture[str]) -> None:
    """With data.corrupt_shards skip: 2 of 4 held-out samples at first, then all, are in corrupt shards."""
    config = run_config(train={"steps": 4}, validation={"every": 2, "num_samples": 4}, data={"corrupt_shards": "skip"})

    def run() -> None:
        from star_dist.data.batches import HeldOutBatches
        from star_dist.data.dataset import MicroBatch

        plain, rounds = HeldOutBatches.__iter__, iter(range(2))

        def some_absent(held_out: HeldOutBatches) -> Iterator[tuple[MicroBatch, torch.Tensor]]:
            first_present = (2, 4)[next(rounds)]
            for i, (batch, weights_B) in enumerate(plain(held_out)):
                yield batch, weights_B * (i * held_out.micro_batch >= first_present)

        HeldOutBatches.__iter__ = some_absent
        train(config)

    run_ranks(run, 1)
    by_step = metrics(config)
    assert 0 < by_step[2]["validation/loss/total"] < 10 and "validation/loss/total" not in by_step[4]
    said = capfd.readouterr().err
    assert "warning: 2 of 4 validation samples are in corrupt shards" in said and "warning: 4 of 4" in said


def test_knobs_of_deepspeed_may_change_on_the_way(run_config: MakeConfig) -> None:
    for steps, stage, knobs in ((2, 2, {"data_types": {"grad_accum_dtype": "fp32"}}), (4, 1, {})):
        config = run_config(train={"steps": steps, "zero_stage": stage, "precision": "bf16"}, deepspeed=knobs)
        assert max(train_on(config, 1)) == steps


def mistakes() -> list[tuple[dict, str]]:
    return [
        ({"train": {"global_batch": 6, "micro_batch": 6}}, r"global_batch 6 .*micro_batch 6 x 2 ranks = 12"),
        ({"data": {"local": "/absent"}}, r"no data set at /absent"),
        ({"data": {"train_split": "other"}}, r"no samples in split 'other'"),
        ({"tokenizer": {"path": "/absent"}}, r"no tokenizer at /absent"),
        ({"text": {"encoder": "/absent"}}, r"text encoder '/absent' could not be loaded"),
        ({"text": {"width": 32}}, r"has width 16, text\.width is 32"),
        ({"train": {"global_batch": 128, "micro_batch": 2}}, r"fewer than one global batch"),
        (
            {"data": {"num_canonical_nodes": 64}},
            r"split 'train' has 50 samples, fewer than data.num_canonical_nodes 64",
        ),
        ({"checkpoint": {"resume_step": 5}}, r"has no complete checkpoint of step 5, only of steps \[\]"),
        ({"train": {"init_from": "/absent"}}, r"/absent is no inference folder"),
    ]


@pytest.mark.parametrize(("sections", "said"), mistakes())
def test_mistakes_end_in_one_message(run_config: MakeConfig, sections: dict, said: str) -> None:
    with pytest.raises(RankFailed, match=rf"(?s)star_dist\.(errors\.UserError|config\.base\.ConfigError): .*{said}"):
        train_on(run_config(**sections), 2)


def test_training_on_stored_text_features(
    run_config: MakeConfig, prep_values: dict, text_encoder_folder: Path, tmp_path: Path
) -> None:
    """The same losses as with the encoder in the trainer, up to the features' float16."""
    from data_prep.tokenization import tokenize
    from star_dist.config import PrepConfig, parse_config

    encoded = run_config(
        run_dir=str(tmp_path / "encoder"),
        train={"steps": 4, "caption_dropout": 0.5},
        validation={"every": 4, "num_samples": 5},
    )
    text = json.loads(encoded.text.model_dump_json())
    tokenize(parse_config(PrepConfig, prep_values | {"output": str(tmp_path / "set"), "text_features": text}))
    for data in ({"local": str(tmp_path / "set")}, {"remote": str(tmp_path / "set"), "local": str(tmp_path / "cache")}):
        stored = run_config(
            run_dir=str(tmp_path / f"stored{len(data)}"),
            train={"steps": 4, "caption_dropout": 0.5},
            validation={"every": 4, "num_samples": 5},
            data=data | {"text_features": True},
        )
        found, expected = train_on(stored, 2), train_on(encoded, 2)
        assert losses(found) == pytest.approx(losses(expected), abs=1e-3)
        assert found[4]["validation/loss/total"] == pytest.approx(expected[4]["validation/loss/total"], abs=1e-3)


def test_going_back_sets_later_checkpoints_aside(run_config: MakeConfig) -> None:
    config = run_config(train={"steps": 9}, checkpoint={"every": 3, "keep_last": 3})
    expected = train_on(config, 1)
    again = run_config(train={"steps": 9}, checkpoint={"every": 3, "keep_last": 3, "resume_step": 3})
    assert train_on(again, 1) == expected
    names = sorted(path.name for path in (Path(config.run_dir) / "checkpoints").iterdir())
    assert names[-3:] == ["step_00000003", "step_00000006", "step_00000009"]
    assert [name.rsplit("_", 1)[0] for name in names[:-3]] == ["abandoned_step_00000006", "abandoned_step_00000009"]


def test_every_stage_starts_alike_in_bf16(run_config: MakeConfig, tmp_path: Path) -> None:
    """Also stage 0, whose optimizer DeepSpeed has taken a step with before: losses differ by bf16's rounding."""
    by_stage = []
    for stage in (0, 1, 3):
        config = run_config(
            run_dir=str(tmp_path / f"stage {stage}"),
            train={"steps": 4, "zero_stage": stage, "precision": "bf16"},
            optimizer={"learning_rate": 1e-2},
        )
        by_stage.append(losses(train_on(config, 2)))
    for others in by_stage[1:]:
        assert by_stage[0] == pytest.approx(others, abs=5e-3)


def test_a_job_that_comes_back_by_itself_goes_back_once(
    run_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its config still says resume_step, and the checkpoint may be gone by then."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for restarts, steps, resume_step, first in [(0, 6, None, 0), (0, 9, 3, 3), (1, 12, 3, 9), (0, 15, 3, 3)]:
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
        options = {"every": 3, "keep_last": 9, "resume_step": resume_step}
        config = run_config(train={"steps": steps}, checkpoint=options, optimizer={"schedule": "constant"})
        train_on(config, 1)
        starts = [event for event in read_events(Path(config.run_dir)) if event["event"] == "start"]
        assert (starts[-1]["step"], starts[-1]["job"]) == (first, "7")


def test_what_is_no_training_counts_as_no_time_of_it(run_config: MakeConfig) -> None:
    config = run_config(train={"steps": 8}, validation={"every": 4, "num_samples": 1}, logging={"every": 2})

    def run() -> None:
        from star_dist.train.trainer import Trainer

        validate = Trainer._validate

        def slow(trainer: Trainer, done: int) -> None:
            time.sleep(4)
            validate(trainer, done)

        Trainer._validate = slow
        train(config)

    run_ranks(run, 1)
    lines = [json.loads(line) for line in (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()]
    assert all(line["time/step_s"] < 1 for line in lines if "time/step_s" in line)


def test_the_slowest_rank_is_told_by_its_time_per_step() -> None:
    expected = {"time/slowest_rank": 1, "time/slowest_rank_own_s": 2.0, "time/mean_rank_own_s": 1.0}
    assert slowest_rank([1.0, 6.0, 2.0], steps=3) == expected


def test_another_tokenizers_checkpoint_is_refused(run_config: MakeConfig, tmp_path: Path) -> None:
    """Also when the run is finished, and also for an export: new tokens mean nothing to old weights."""
    from star_dist.errors import UserError
    from star_dist.tokenizer.io import load_tokenizer, save_tokenizer
    from star_dist.train.export_checkpoint import export_checkpoint

    config = run_config(train={"steps": 3})
    tokenizer = load_tokenizer(Path(config.tokenizer.path))
    copy = tmp_path / "tokenizer"
    save_tokenizer(tokenizer, copy)
    train_on(run_config(train={"steps": 3}, tokenizer={"path": str(copy)}), 1)
    tokenizer.quantize.embedding.weight.add_(1)
    save_tokenizer(tokenizer, copy)
    for steps in (3, 6):
        with pytest.raises(RankFailed, match=r"was trained with tokenizer \w+, tokenizer\.path now holds \w+"):
            train_on(run_config(train={"steps": steps}, tokenizer={"path": str(copy)}), 1)
    with pytest.raises(UserError, match=r"was trained with tokenizer \w+"):
        export_checkpoint(Path(config.run_dir), tmp_path / "out", None, "fp32")


def test_another_runs_checkpoint_is_refused(run_config: MakeConfig) -> None:
    train_on(run_config(train={"steps": 3}), 1)
    for sections, said in [
        ({"model": {"depth": 3}}, r"model\.depth = 2, the run has 3"),
        ({"optimizer": {"learning_rate": 0.5}}, r"optimizer\.learning_rate = 0\.01, the run has 0\.5"),
        ({"checkpoint": {"resume_step": 2}}, r"has no complete checkpoint of step 2, only of steps \[3\]"),
    ]:
        with pytest.raises(RankFailed, match=said):
            train_on(run_config(train={"steps": 6}, **sections), 1)
    assert max(train_on(run_config(train={"steps": 6}), 1)) == 6


def test_two_trainings_never_share_a_run_folder(run_config: MakeConfig) -> None:
    config = run_config(train={"steps": 2000})
    running = start_training(config, 1)
    wait_for_step(config, 1)
    try:
        with pytest.raises(RankFailed, match="another training is running"):
            train_on(config, 1)
    finally:
        running.kill()
