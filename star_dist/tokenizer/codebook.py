"""Which codes a tokenizer in training uses, and what becomes of those that it does not.

B pictures, C code dimension, V codebook size, S scales, H latent side, L tokens of a picture.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from star_dist.scales import ScaleSchedule
from star_dist.tokenizer.quantizer import MultiScaleQuantizer, full_float32, shrink

HITS_DECAY = 0.98
# A code counts as used while the average of its hits per step is above this: for 34 steps after a single hit.
USED_HITS = 0.01


def unused_codes(quantizer: MultiScaleQuantizer) -> Tensor:
    """Indices of codes that no recent step used; (N,) int64."""
    return (quantizer.ema_vocab_hit_SV.sum(0) < USED_HITS).nonzero().flatten()


def codebook_usage(quantizer: MultiScaleQuantizer, schedule: ScaleSchedule) -> dict[str, float]:
    """Codes in use over all scales and at each, and each scale's perplexity: the codes it would use were all alike."""
    hits_SV = quantizer.ema_vocab_hit_SV
    usage = {"codebook/used": (hits_SV.sum(0) >= USED_HITS).sum().item()}
    for side, hits_V in zip(schedule.sides, hits_SV):
        share_V = hits_V / hits_V.sum().clamp_min(1e-12)
        usage[f"codebook/used_scale_{side}"] = (hits_V >= USED_HITS).sum().item()
        usage[f"codebook/perplexity_scale_{side}"] = torch.special.entr(share_V).sum().exp().item()
    return usage


@torch.no_grad()
def residual_cells(quantizer: MultiScaleQuantizer, latent_BCHH: Tensor, schedule: ScaleSchedule) -> Tensor:
    """What the codes of all scales have to describe: residual cells picture by picture, (B * L, C)."""
    residual_BCHH = latent_BCHH.float()
    cells = []
    with full_float32(latent_BCHH.device):
        for side, (_, contribution_BCHH) in zip(schedule.sides, quantizer.residual_steps(residual_BCHH, schedule)):
            cells.append(shrink(residual_BCHH, side).flatten(2).transpose(1, 2))
            residual_BCHH = residual_BCHH - contribution_BCHH
    return torch.cat(cells, dim=1).flatten(0, 1)


@torch.no_grad()
def move_codes(
    codebook_VC: torch.nn.Parameter,
    unused: Tensor,
    cells_NC: Tensor,
    draws: np.random.Generator,
    optimizers: Iterable[torch.optim.Optimizer],
) -> None:
    """Sets the codes with indices `unused` onto drawn residual cells and forgets their optimizer state."""
    chosen = draws.integers(len(cells_NC), size=len(unused))
    codebook_VC[unused] = cells_NC[torch.from_numpy(chosen).to(cells_NC.device)]
    for optimizer in optimizers:
        for name in ("exp_avg", "exp_avg_sq"):
            if name in optimizer.state.get(codebook_VC, {}):
                optimizer.state[codebook_VC][name][unused] = 0
