"""What the checks of nodes make of what ranks have found."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch.distributed

from star_dist.process import ProcessInfo
from star_dist.train.preflight import Preflight, RankCheck, _check_shared, _problems
from tests.ranks import run_ranks


def check(rank: int, node: str, device: str) -> RankCheck:
    return RankCheck(rank, node, {"device": device, "devices": 2}, 700.0, 10**12)


@pytest.mark.parametrize("odd", range(4))
def test_one_gpu_of_another_kind_is_found_wherever_it_is(odd: int) -> None:
    """Two nodes of two ranks; a fact of one rank is not that of its node."""
    checks = [check(rank, f"n{rank // 2}", "L40S" if rank == odd else "H200") for rank in range(4)]
    problems = _problems(checks)
    assert problems == {f"n{odd // 2}": ["device is 'L40S', elsewhere 'H200'"]}
    assert Preflight(checks, None, problems).exit_code == 1


def test_a_run_folder_that_each_node_has_for_itself(tmp_path: Path) -> None:
    """No checkpoint could be completed in it."""
    for name in ("n0", "n1"):
        (tmp_path / name).mkdir()

    def problems(*folders: str) -> list[str]:
        torch.distributed.init_process_group("gloo")
        rank = int(os.environ["RANK"])
        found = check(rank, f"n{rank}", "L40S")
        _check_shared(tmp_path / folders[rank], ProcessInfo(rank, 0, 2, 1), found)
        return found.problems

    assert run_ranks(problems, 2, "n0", "n0") == [[], []]
    first, (second,) = run_ranks(problems, 2, "n0", "n1")
    assert first == [] and "n1 is not that of rank 0; set it to a folder that all nodes share" in second
    assert run_ranks(problems, 2, "absent", "n1") == [[], []]  # which rank 0 has found itself
    assert not list((tmp_path / "n0").iterdir())
