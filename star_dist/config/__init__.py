"""Typed, strict configurations: defaults in code <- JSON file <- dotted command-line overrides. Imports no torch.

A key that no section knows is an error that names the nearest one; a wrong type is an error; sizes that do not fit
together are an error with both values. Nothing is rounded or ignored.
"""

from star_dist.config.base import ConfigError, Section, dump_config, load_config, parse_config
from star_dist.config.prep import CaptionConfig, PrepConfig, ResolutionSection, StorageSection
from star_dist.config.run import (
    CheckpointSection,
    DataSection,
    DataSource,
    HealthSection,
    OptimizerSection,
    RunConfig,
    TextSection,
)
from star_dist.config.tokenizer import TokenizerTrainConfig

__all__ = [
    "CaptionConfig",
    "CheckpointSection",
    "ConfigError",
    "DataSection",
    "DataSource",
    "HealthSection",
    "OptimizerSection",
    "PrepConfig",
    "ResolutionSection",
    "RunConfig",
    "Section",
    "StorageSection",
    "TextSection",
    "TokenizerTrainConfig",
    "dump_config",
    "load_config",
    "parse_config",
]
