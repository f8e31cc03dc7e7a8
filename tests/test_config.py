import json
from pathlib import Path
from typing import get_args

import pytest

from star_dist.config import (
    CaptionConfig,
    ConfigError,
    DataSection,
    PrepConfig,
    RunConfig,
    TokenizerTrainConfig,
    dump_config,
    load_config,
)
from star_dist.config.deepspeed import ZERO_KEYS, accepted_zero_stages

CONFIGS = Path(__file__).parents[1] / "configs"
RUNS = ["d16", "d30", "d30_512", "d30_1024", "demo"]


@pytest.mark.parametrize("name", RUNS)
def test_shipped_runs_load_and_survive_a_round_trip(name: str, tmp_path: Path) -> None:
    config = load_config(RunConfig, CONFIGS / f"{name}.json")
    (tmp_path / "resolved.json").write_text(dump_config(config))
    assert load_config(RunConfig, tmp_path / "resolved.json") == config


def test_other_shipped_configs_load() -> None:
    for name in ("demo", "folder_256", "s3_256_512_1024"):
        assert load_config(PrepConfig, CONFIGS / "prep" / f"{name}.json").all_resolutions
    assert load_config(CaptionConfig, CONFIGS / "prep" / "recaption.json").prompt
    for name in ("tokenizer", "tokenizer_demo"):
        assert load_config(TokenizerTrainConfig, CONFIGS / f"{name}.json").steps


def test_paper_sizes() -> None:
    d30 = load_config(RunConfig, CONFIGS / "d30.json")
    assert d30.scales == (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    star = d30.star_config()
    assert (star.depth, star.width, star.heads) == (30, 1920, 30)
    assert load_config(RunConfig, CONFIGS / "d30_512.json").scales == (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
    assert load_config(RunConfig, CONFIGS / "d30_1024.json").schedule.num_tokens == 9451


def test_overrides_are_json_or_text() -> None:
    overrides = ["train.steps=3000", "data.remote=s3://bucket/set", 'samples.prompts=["a"]', "data.shuffle=false"]
    config = load_config(RunConfig, CONFIGS / "d16.json", overrides)
    assert config.train.steps == 3000
    assert config.data.remote == "s3://bucket/set"
    assert config.samples.prompts == ("a",)
    assert config.data.shuffle is False


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.stepz=1", r"unknown key train\.stepz; did you mean train\.steps\?"),
        ("optimiser.learning_rate=1", r"unknown key optimiser; did you mean optimizer\?"),
        ('train.steps="many"', r'train\.steps: input should be a valid integer.*got "many"'),
        ("train.steps=1.5", r"train\.steps: .*integer.*got 1\.5"),
        ("train.caption_dropout=2", r"train\.caption_dropout: .*less than or equal to 1.*got 2"),
        ("train.micro_batch=7", r"global_batch \d+ is not a multiple of train\.micro_batch 7"),
        ("resolution=250", r"resolution 250 is not the last of scales \(16\) x tokenizer\.downsampling \(16\) = 256"),
        ("scales=[1,3,2]", r"scales must grow; got 3 followed by 2"),
        ("model.heads=7", r"width 1024 does not divide into heads 7"),
        ("optimizer.warmup_steps=999999999", r"warmup_steps 999999999 is more than train\.steps"),
        ("data.validation_split=null", r"validation\.every is \d+ but data\.validation_split is null"),
        ("samples.prompts=[]", r"samples\.every is 1000 but samples\.prompts is empty"),
        ("samples.guidance=-1", r"samples\.guidance: .*greater than or equal to 0.*got -1"),
        ("optimizer.betas=[1.0,0.9]", r"optimizer\.betas\.0: .*less than 1"),
        (
            'deepspeed={"zero_optimisation":{}}',
            r"unknown key deepspeed\.zero_optimisation; did you mean deepspeed\.zero_opt",
        ),
        ('deepspeed={"train_batch_size":4}', r"train_batch_size is what star-dist sets; use train\.global_batch"),
        ('deepspeed={"zero_optimization":{"stage":1}}', r"stage is what star-dist sets; use train\.zero_stage"),
        (
            'deepspeed={"zero_optimization":{"reduce_buket_size":1}}',
            r"unknown key deepspeed\.zero_optimization\.reduce_buket_size; did you mean .*\.reduce_bucket_size",
        ),
        (
            'deepspeed={"zero_optimization":{"offload_param":{"device":"nvme"}}}',
            r"offload_param\.device is nvme.*use cpu",
        ),
        (
            'deepspeed={"zero_optimization":{"round_robin_gradients":true}}',
            r"zero_optimization\.round_robin_gradients orders .*weights under wrong names; remove it",
        ),
        (
            'deepspeed={"zero_optimization":{"offload_optimizer":{"device":"cpu","ratio":0.5}}}',
            r"offload_optimizer\.ratio is 0\.5, .*remove it",
        ),
        ('deepspeed={"prescale_gradients":true}', r"prescale_gradients is True, .*stage 3 with .*reduce_scatter; set"),
        ('deepspeed={"gradient_predivide_factor":4.0}', r"gradient_predivide_factor is 4\.0, .*set that to false"),
        ('deepspeed={"data_types":{"grad_accum_dtype":"bf16"}}', r"grad_accum_dtype is 'bf16' .*it can be fp32"),
        (
            "train.compile=blocks",
            r"train\.compile is blocks, but at train\.zero_stage 3 .*set train\.zero_stage to 2 or less",
        ),
        ("train.compile=true", r"train\.compile: .*'none', 'functions' or 'blocks'.*got true"),
        ("run_dir=s3://bucket/run", r"run_dir: must be a folder of a file system, got \"s3://bucket/run\""),
        ("run_dir=", r"run_dir: .*at least 1 character.*got \"\""),
        ("data.local=s3://bucket/set", r"data\.local: must be a folder of a file system, got"),
        ("optimizer.learning_rate=Infinity", r"optimizer\.learning_rate: .*finite number.*got Infinity"),
        ("samples.seed=100000000000000000000", r"samples\.seed: .*got 1000"),
        ("data.cache_limit=abc", r"data\.cache_limit: must be a size such as 500gb, got \"abc\""),
        ("data.cache_limit=-5gb", r"data\.cache_limit: must be a size such as 500gb, got \"-5gb\""),
        ("train.steps.more=1", r"train\.steps is a value, not a section"),
        ("nonsense", r"not of the form section\.key=value"),
        (
            "data.s3_endpoint_url=http://me:secret@store:9000",
            r"data\.s3_endpoint_url: the endpoint of store:9000 holds a user name or password; give [^@]*$",
        ),
    ],
)
def test_mistakes_are_named_with_their_values(override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(RunConfig, CONFIGS / "d16.json", [override])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("work=s3://bucket/work", r"work: must be a folder of a file system, got"),
        ("output=", r"output: .*at least 1 character"),
        ('min_scores={"aesthetic":NaN}', r"min_scores\.aesthetic: .*finite number.*got NaN"),
    ],
)
def test_mistakes_in_jobs_are_named_too(override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(PrepConfig, CONFIGS / "prep" / "folder_256.json", [override])


@pytest.mark.parametrize("limit", ["500gb", "1.5TB", "10 gb", "4096", "4096b"])
def test_sizes_of_caches_are_those_that_streaming_reads(limit: str) -> None:
    from streaming.base.util import bytes_to_int

    config = load_config(RunConfig, CONFIGS / "d16.json", [f'data.cache_limit="{limit}"'])
    assert bytes_to_int(config.data.cache_limit) > 0


def test_algorithms_of_shuffling_are_those_of_streaming() -> None:
    from streaming.base.shuffle import algos

    assert set(get_args(DataSection.model_fields["shuffle_algorithm"].annotation)) == set(algos)


def test_an_option_without_effect_needs_no_fitting_value() -> None:
    two_scales = ["scales=[1,16]"]
    assert load_config(RunConfig, CONFIGS / "d16.json", two_scales).train.token_drop_scales == 2
    with pytest.raises(ConfigError, match=r"token_drop_scales 2 is not less than the 2 scales"):
        load_config(RunConfig, CONFIGS / "d16.json", [*two_scales, "train.token_keep=0.5"])


@pytest.mark.parametrize(("key", "first"), [("offload_optimizer", 1), ("offload_param", 3)])
def test_what_a_zero_stage_would_ignore_is_refused(key: str, first: int) -> None:
    section = {"zero_optimization": {key: {"device": "cpu"}}}
    assert accepted_zero_stages(section, range(4), "bf16") == list(range(first, 4))
    with pytest.raises(ConfigError, match=rf"{key}\.device is cpu, .*stage 0; set the stage to {first} or more"):
        load_config(RunConfig, CONFIGS / "d16.json", [f"deepspeed={json.dumps(section)}", "train.zero_stage=0"])


def test_files_that_are_no_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_config(RunConfig, tmp_path / "absent.json")
    (tmp_path / "broken.json").write_text('{"a": ')
    with pytest.raises(ConfigError, match="not JSON: line 1"):
        load_config(RunConfig, tmp_path / "broken.json")
    (tmp_path / "empty.json").write_text("{}")
    with pytest.raises(ConfigError, match="run_dir is missing"):
        load_config(RunConfig, tmp_path / "empty.json")


def test_global_batch_must_divide_over_the_ranks() -> None:
    config = load_config(RunConfig, CONFIGS / "d16.json", ["train.global_batch=96", "train.micro_batch=8"])
    assert config.accumulation_steps(4) == 3
    with pytest.raises(ConfigError, match=r"global_batch 96 .*micro_batch 8 x 5 ranks = 40"):
        config.accumulation_steps(5)


def test_deepspeed_config_adds_knobs_to_what_is_derived() -> None:
    knobs = {"zero_optimization": {"stage3_prefetch_bucket_size": 1000}}
    config = load_config(RunConfig, CONFIGS / "d16.json", [f"deepspeed={json.dumps(knobs)}"])
    derived = config.deepspeed_config(8)
    assert derived["zero_optimization"] == {"stage3_prefetch_bucket_size": 1000, "stage": 3}
    assert derived["bf16"] == {"enabled": True}
    assert (
        derived["train_batch_size"]
        == derived["train_micro_batch_size_per_gpu"] * derived["gradient_accumulation_steps"] * 8
    )


def test_zero_keys_are_deepspeeds() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = {field.alias or name: field for name, field in DeepSpeedZeroConfig.model_fields.items()}
    assert set(ZERO_KEYS) <= fields.keys()
    assert not [key for key in ZERO_KEYS if (fields[key].json_schema_extra or {}).get("deprecated")]
