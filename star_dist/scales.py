"""The schedule of token-map scales and everything that follows from it by arithmetic. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

# Sides of the token maps that the public models draw, by the side of their pictures in pixels.
PUBLIC_SCALES = {
    256: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    512: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
}


@dataclass(frozen=True)
class ScaleSchedule:
    """Side lengths of the square token maps of one picture, coarse to fine (STAR section 3.1, `r_1 … r_K`).

    The sequence of a picture is the concatenation of its flattened maps, so scale k occupies
    `[starts[k], ends[k])` of `num_tokens` positions. A token of scale k attends to every token of scales 1..k.

    kept_lengths: tokens of each scale that training keeps, where it drops some (`star_dist.train.token_dropping`);
    empty for all. Lengths, starts, ends and pairs are then of the kept ones.

    Raises:
        ValueError: the first side is not 1 (the start token predicts it), or the sides do not grow.
    """

    sides: tuple[int, ...]
    kept_lengths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "sides", tuple(self.sides))
        if not self.sides or self.sides[0] != 1:
            raise ValueError(f"scales must start with 1, the map that the start token predicts; got {list(self.sides)}")
        for smaller, larger in zip(self.sides, self.sides[1:]):
            if larger <= smaller:
                raise ValueError(f"scales must grow; got {smaller} followed by {larger} in {list(self.sides)}")

    def __len__(self) -> int:
        return len(self.sides)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each scale."""
        return self.kept_lengths or tuple(side * side for side in self.sides)

    @cached_property
    def ends(self) -> tuple[int, ...]:
        return tuple(accumulate(self.lengths))

    @cached_property
    def starts(self) -> tuple[int, ...]:
        return (0, *self.ends[:-1])

    @property
    def num_tokens(self) -> int:
        """Tokens of one picture over all scales (680 for the 256-pixel schedule)."""
        return self.ends[-1]

    @property
    def latent_side(self) -> int:
        """Side of the finest map, which is the side of the tokenizer's latent."""
        return self.sides[-1]

    @property
    def visible_pairs(self) -> int:
        """Query-key pairs that block-causal attention computes for one picture, of `num_tokens ** 2`."""
        return sum(length * end for length, end in zip(self.lengths, self.ends))

    def keeping(self, share: float, scales: int) -> ScaleSchedule:
        """With so much of the tokens of each of the last `scales` scales, at least one of each."""
        if share == 1:
            return self
        first = len(self) - scales
        kept = (n if k < first else max(1, round(share * n)) for k, n in enumerate(self.lengths))
        return ScaleSchedule(self.sides, tuple(kept))

    def scales_within(self, tokens: int) -> int:
        """How many leading scales end within the first `tokens` tokens."""
        return sum(end <= tokens for end in self.ends)

    def resolution(self, downsampling: int) -> int:
        """Side in pixels of the picture, for a tokenizer that shrinks pictures `downsampling` times."""
        return self.latent_side * downsampling
