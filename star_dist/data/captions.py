"""Which of a picture's named captions a training step takes: a function of seed, step and sample alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

DRAW = 1  # sets this draw apart from that of dropped captions, which is seeded with (seed, step, sample)


def choose_caption(
    available: Collection[str], weights: Mapping[str, float], *, seed: int, step: int, sample_id: int
) -> str:
    """The name of one caption: drawn by weight among those available, or the first where there are no weights.

    `available` is in the data set's order, which decides what a draw means; the order of the weights has no influence.

    Raises:
        KeyError: none of the available captions has a weight (`schema.check_matches` refuses such data sets).
    """
    if not weights:
        return next(iter(available))
    names = [name for name in available if name in weights]
    if not names:
        raise KeyError(f"sample {sample_id} has captions {list(available)}, weights are for {list(weights)}")
    cumulative = np.cumsum([weights[name] for name in names])
    draw = np.random.default_rng([seed, step, sample_id, DRAW]).random() * cumulative[-1]
    return names[min(int(np.searchsorted(cumulative, draw, side="right")), len(names) - 1)]
