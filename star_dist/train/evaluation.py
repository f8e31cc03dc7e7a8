"""Loss and accuracy of trained weights on the validation split, on one device and without the training engine."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from tqdm import tqdm

from star_dist.config import RunConfig
from star_dist.data.batches import HeldOutBatches
from star_dist.data.fetch import fetch_matching_metadata
from star_dist.device import find_device
from star_dist.errors import UserError
from star_dist.export import check_architecture, load_export_tokenizer, load_model, other_text
from star_dist.model.star import STAR
from star_dist.run_folder import is_export
from star_dist.text import TextEncoder
from star_dist.tokenizer.io import load_tokenizer, tokenizer_hash
from star_dist.tokenizer.vqvae import MultiScaleVQVAE
from star_dist.train.checkpoint import CheckpointFolder, check_same_tokenizer
from star_dist.train.export_checkpoint import checkpoint_weights
from star_dist.train.loss_report import by_scale, loss_report
from star_dist.train.precision import attention_kernel, frozen_dtype, run_dtype
from star_dist.train.token_losses import TokenLosses

logger = logging.getLogger(__name__)


@torch.no_grad()
def evaluate(folder: Path, config: RunConfig, step: int | None) -> dict[str, float | int | str]:
    """What training reports as validation/…, for a run folder's checkpoint or an export.

    Texts other than those that an export has learned from are named in a warning.

    Raises:
        UserError: neither of the two, an attention kernel that cannot run here, a model that does not fit the config,
            or data that cannot be read. Unavailable: see `find_device`.
    """
    if config.data.validation_split is None:
        raise UserError("data.validation_split is null; name the split to evaluate on")
    device = find_device(None)
    attention_kernel(config, device, training=False)
    model, tokenizer, trained_steps = _load(folder, config, step)
    check_architecture(folder, model.config, config.star_config(), "give --config the config of its own data")
    # As training does it: weights in bf16, and in float32 only what asks for it, as the head and the loss do.
    model, tokenizer = model.to(device, run_dtype(config)).eval(), tokenizer.to(device)
    metadata = fetch_matching_metadata(config, tokenizer_hash(tokenizer))
    held_out = HeldOutBatches(config, metadata, rank=0, world_size=1)
    encoder = None if config.data.text_features else TextEncoder(config.text, device, frozen_dtype(config, device))
    schedule = config.schedule
    losses_K, correct_K = torch.zeros(2, len(schedule), device=device)
    samples = 0
    batches = -(-held_out.num_samples // config.train.micro_batch)
    token_losses = TokenLosses(config, model, tokenizer.quantize, encoder, device)
    for batch, weights_B in tqdm(held_out, total=batches, unit="batch"):
        losses_T, correct_T = token_losses(batch, token_losses.text(batch, None), None)
        samples += int(weights_B.sum())
        losses_K += by_scale(losses_T, schedule, weights_B.to(device))
        correct_K += by_scale(correct_T, schedule, weights_B.to(device))
    if samples == 0:
        raise UserError(f"all {held_out.num_samples} validation samples are in corrupt shards; repair the data set")
    report = loss_report(schedule, losses_K, correct_K, samples, "validation/")
    absent = held_out.num_samples - samples
    return {"model": str(folder), "step": trained_steps, "num_samples": samples, "skipped_samples": absent, **report}


def _load(folder: Path, config: RunConfig, step: int | None) -> tuple[STAR, MultiScaleVQVAE, int]:
    """Model in fp32, tokenizer, and optimizer steps done."""
    if is_export(folder):
        if step is not None:
            raise UserError(f"--step chooses among a run's checkpoints, but {folder} is an export")
        export, model = load_model(folder, torch.float32, config.model.attention)
        for difference in other_text(folder, config):
            logger.warning("warning: %s", difference)
        return model, load_export_tokenizer(folder, export), export.step
    checkpoint = CheckpointFolder(folder, config.checkpoint).find(step)
    if checkpoint is None:
        raise UserError(f"{folder} has no complete checkpoint yet")
    tokenizer = load_tokenizer(Path(config.tokenizer.path))
    check_same_tokenizer(checkpoint, tokenizer_hash(tokenizer))
    with torch.device("meta"):
        model = STAR(config.star_config(), config.model.attention)
    model.load_state_dict(checkpoint_weights(checkpoint, config), assign=True)
    return model, tokenizer, checkpoint.step
