"""What a request may say, and how it becomes something to draw. Imports no torch."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from star_dist.errors import UserError
from star_dist.inference.arguments import MAX_SEED
from star_dist.inference.options import SamplingOptions
from star_dist.serve.limits import Limits


class DrawRequest(BaseModel):
    """Body of `POST /api/jobs`: pictures to draw together.

    prompts: one each, or one for `count` pictures. seed: of the first picture, counting up, or one per picture; null
    takes a random one. The other fields are those of `SamplingOptions`; lists have one value per scale.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    prompts: list[str]
    count: int = 1
    seed: int | list[int] | None = None
    guidance: float = 4.0
    guidance_by_scale: list[float] | None = None
    top_k: int | list[int] = 0
    top_p: float | list[float] = 0.0
    temperature: float | list[float] = 1.0
    smoothing: float | list[float] = 0.0


@dataclass(frozen=True)
class Drawing:
    """A request that was checked: one prompt and one seed per picture."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    options: SamplingOptions


def check_request(request: DrawRequest, limits: Limits, num_scales: int) -> Drawing:
    """What a request asks to be drawn.

    Raises:
        UserError: it is beyond a limit or an option is out of range; the message names both values.
    """
    if not request.prompts:
        raise UserError("there is no prompt; give at least one")
    if request.count < 1:
        raise UserError(f"the number of pictures must be at least 1, got {request.count}")
    total = len(request.prompts) * request.count
    if total > limits.pictures:
        raise UserError(f"{total} pictures were asked for, the limit is {limits.pictures}; ask for fewer at a time")
    for prompt in request.prompts:
        if not prompt.strip():
            raise UserError("the prompt is empty; describe a picture")
        if len(prompt) > limits.prompt_letters:
            raise UserError(f"a prompt has {len(prompt)} letters, the limit is {limits.prompt_letters}; shorten it")
    seeds = _seeds(request.seed, total)
    fields = request.model_dump(exclude={"prompts", "count", "seed"})
    by_scale = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    options = SamplingOptions(**by_scale)
    options.by_scale(num_scales)
    prompts = tuple(prompt.strip() for prompt in request.prompts for _ in range(request.count))
    return Drawing(prompts, seeds, options)


def _seeds(seed: int | list[int] | None, total: int) -> tuple[int, ...]:
    if seed is None:
        seed = secrets.randbelow(2**31)
    seeds = tuple(seed) if isinstance(seed, list) else tuple(seed + i for i in range(total))
    if len(seeds) != total:
        raise UserError(f"{total} pictures were asked for with {len(seeds)} seeds; give one seed, or one per picture")
    for value in seeds:
        if not 0 <= value <= MAX_SEED:
            raise UserError(f"a seed must lie in 0..{MAX_SEED}, got {value}")
    return seeds
