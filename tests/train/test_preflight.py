"""What the checks of nodes make of what ranks have found."""

from __future__ import annotations

import pytest

from star_dist.train.preflight import Preflight, RankCheck, _problems


def check(rank: int, node: str, device: str) -> RankCheck:
    return RankCheck(rank, node, {"device": device, "devices": 2}, 700.0, 10**12)


@pytest.mark.parametrize("odd", range(4))
def test_one_gpu_of_another_kind_is_found_wherever_it_is(odd: int) -> None:
    """Two nodes of two ranks; a fact of one rank is not that of its node."""
    checks = [check(rank, f"n{rank // 2}", "L40S" if rank == odd else "H200") for rank in range(4)]
    problems = _problems(checks)
    assert problems == {f"n{odd // 2}": ["device is 'L40S', elsewhere 'H200'"]}
    assert Preflight(checks, None, problems).exit_code == 1
