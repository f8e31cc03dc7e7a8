"""`train.compile`: functions or whole blocks, compiled, under ZeRO and activation checkpointing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from star_dist.config import RunConfig
from tests.ranks import RankFailed, run_ranks
from tests.train.runs import metrics, train, train_on, weights

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler")


def train_compiled(config: RunConfig) -> tuple[int, int]:
    """What a rank runs, in a process of its own: the compiler starts threads. Returns graphs and breaks in them."""
    import torch._dynamo

    torch._dynamo.config.fail_on_recompile_limit_hit = True  # from there on it would not be compiled, silently
    train(config)
    counters = torch._dynamo.utils.counters
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compile", "stage", "checkpointing", "precision", "attention", "tolerance"),
    [
        ("functions", 3, "selective", "bf16", "sdpa", 1e-3),
        ("functions", 1, "full", "fp32", "sdpa", 1e-5),
        ("blocks", 2, "none", "fp32", "sdpa", 1e-5),
        ("blocks", 0, "full", "bf16", "sdpa", 1e-3),
        ("blocks", 1, "selective", "fp32", "reference", 1e-5),
    ],
)
def test_a_compiled_run_learns_the_same_and_resumes(
    run_config: Callable[..., RunConfig],
    tmp_path: Path,
    compile: str,
    stage: int,
    checkpointing: str,
    precision: str,
    attention: str,
    tolerance: float,
) -> None:
    options = {"steps": 4, "zero_stage": stage, "activation_checkpointing": checkpointing, "precision": precision}
    # Validation: batches of other shapes, without gradients.
    same = {"validation": {"every": 2}, "model": {"attention": attention}}
    expected = train_on(run_config(run_dir=str(tmp_path / "plain"), train=options, **same), 1)
    sections = {"train": options | {"compile": compile}, "checkpoint": {"every": 2}, **same}
    config = run_config(**sections)
    ((graphs, breaks),) = run_ranks(train_compiled, 1, config)
    found = metrics(config)
    for step, values in expected.items():
        assert found[step]["loss/total"] == pytest.approx(values["loss/total"], rel=tolerance)
    if compile == "functions":
        assert graphs >= 8 and breaks == 0
    elif attention == "reference":  # shapes of training and of validation, of which batches differ
        assert graphs >= 2 and breaks == 0
    else:  # this attention runs as it is between what is compiled
        assert graphs >= 3 and breaks > 0
    whole = weights(config)
    sections["checkpoint"]["resume_step"] = 2
    resumed, resumed_weights = train_on(run_config(**sections), 1), weights(config)
    if attention == "sdpa":
        assert resumed == found
        assert all(torch.equal(tensor, whole[name]) for name, tensor in resumed_weights.items())
    else:  # compiled for the lengths of another batch first, its sums may be of another order
        assert resumed.keys() == found.keys()
        assert all(values == pytest.approx(found[step], rel=1e-6, abs=1e-6) for step, values in resumed.items())
        assert all(torch.allclose(tensor, whole[name], 1e-6, 1e-6) for name, tensor in resumed_weights.items())


def test_a_compiler_that_does_not_work_is_a_mistake(run_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    def without_a_compiler() -> None:
        from torch._inductor import config

        config.cpp.cxx = ("/absent/g++",)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path)
        train(run_config(train={"compile": "functions"}))

    with pytest.raises(
        RankFailed, match="UserError: train.compile is functions, but PyTorch's compiler does not work here"
    ):
        run_ranks(without_a_compiler, 1)
