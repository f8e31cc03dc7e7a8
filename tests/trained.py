"""A small run that has really been trained, and its export: once for all tests of the "export" group, in one worker."""

from __future__ import annotations

from pathlib import Path

import pytest

from star_dist.config import RunConfig


@pytest.fixture(scope="session")
def trained(
    tmp_path_factory: pytest.TempPathFactory, dataset_folder: Path, tokenizer_folder: Path, text_encoder_folder: Path
) -> RunConfig:
    """A run of 2 ranks that has learned a little."""
    import tests.conftest
    from tests.train.runs import train_on

    make = tests.conftest.run_config.__wrapped__(
        dataset_folder, tokenizer_folder, text_encoder_folder, tmp_path_factory.mktemp("trained")
    )
    config = make(train={"steps": 80}, checkpoint={"every": 40})
    train_on(config, 2)
    return config


@pytest.fixture(scope="session")
def exported(trained: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its inference folder in fp32."""
    from star_dist.train.export_checkpoint import export_checkpoint

    folder = tmp_path_factory.mktemp("export") / "model"
    assert export_checkpoint(Path(trained.run_dir), folder, None, "fp32") == 80
    return folder
