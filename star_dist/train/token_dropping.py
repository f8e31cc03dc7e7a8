"""Training on a part of the finest scales' tokens: an option for sequences that would not fit or take too long.

Which tokens a sample keeps is a function of (seed, step, sample), so runs resume and split as without it. Kept tokens
weigh (tokens of the scale) / (kept of them), so that the expected loss is that of all tokens. Tokens that are dropped
are neither predicted nor attended to.

B samples of a micro-batch, L tokens of a sample, M of them kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from star_dist.scales import ScaleSchedule

DRAW = 2  # sets this draw apart from those of captions, which share (seed, step, sample)


class TokenDropping:
    """schedule: `full` with the lengths that are kept; all samples keep as many. device: of what `restore` takes."""

    def __init__(self, full: ScaleSchedule, schedule: ScaleSchedule, seed: int, device: torch.device) -> None:
        self.full, self.schedule, self.seed = full, schedule, seed
        lengths = zip(full.lengths, schedule.lengths)
        self.weights_M = torch.tensor([n / m for n, m in lengths for _ in range(m)], device=device)

    def positions(self, sample_ids: Sequence[int], step: int) -> Tensor:
        """Positions of the kept tokens of each sample, ascending; (B, M) int64."""
        return torch.from_numpy(np.stack([self._of_sample(sample_id, step) for sample_id in sample_ids]))

    def _of_sample(self, sample_id: int, step: int) -> np.ndarray:
        draws = np.random.default_rng([self.seed, step, sample_id, DRAW])
        scales = zip(self.full.starts, self.full.lengths, self.schedule.lengths)
        return np.concatenate(
            [start + (np.arange(n) if kept == n else np.sort(draws.permutation(n)[:kept])) for start, n, kept in scales]
        )

    def restore(self, values_BM: Tensor, positions_BM: Tensor) -> Tensor:
        """Values of kept tokens, weighted, at their places among all; 0 elsewhere; (B, L) float32."""
        full_BL = values_BM.new_zeros(len(values_BM), self.full.num_tokens)
        return full_BL.scatter(1, positions_BM, values_BM * self.weights_M)
