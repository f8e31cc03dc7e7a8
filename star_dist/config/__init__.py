"""Typed, strict configurations: defaults in code <- JSON file <- dotted command-line overrides. Imports no torch.

A key that no section knows is an error that names the nearest one; a wrong type is an error; sizes that do not fit
together are an error with both values. Nothing is rounded or ignored.
"""

from star_dist.config.base import ConfigError, Section, dump_config, load_config, parse_config
from star_dist.config.prep import PrepConfig
from star_dist.config.run import (
    CheckpointSection,
    DataSection,
    HealthSection,
    OptimizerSection,
    RunConfig,
    TextSection,
)
from star_dist.config.tokenizer import TokenizerTrainConfig

__all__ = [
    "CheckpointSection",
    "ConfigError",
    "DataSection",
    "HealthSection",
    "OptimizerSection",
    "PrepConfig",
    "RunConfig",
    "Section",
    "TextSection",
    "TokenizerTrainConfig",
    "dump_config",
    "load_config",
    "parse_config",
]
