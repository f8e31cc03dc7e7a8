"""The training loop. Read `Trainer.run` first; everything else is what it calls."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from star_dist.config import RunConfig
from star_dist.data.batches import HeldOutBatches, TrainBatches
from star_dist.data.dataset import MicroBatch
from star_dist.data.schema import DatasetMetadata
from star_dist.errors import RunEnded, UserError
from star_dist.files import training_goes_on
from star_dist.inference.grid import GridSection, draw_grid
from star_dist.inference.pipeline import StarPipeline
from star_dist.model.flops import training_flops
from star_dist.model.layout import copy_to_device
from star_dist.model.star import STAR
from star_dist.text import TextEncoder, TextFeatures
from star_dist.tokenizer.vqvae import MultiScaleVQVAE
from star_dist.train.checkpoint import Checkpoint, CheckpointFolder, RunInputs
from star_dist.train.engine import Engine
from star_dist.train.facts import FactsLog, read_reports
from star_dist.train.loss_report import by_scale, loss_report
from star_dist.train.metrics import MetricsLog, peak_flops, peak_memory_bytes
from star_dist.train.optim import learning_rate
from star_dist.train.own_time import OwnTime, slowest_rank
from star_dist.train.precision import frozen_dtype
from star_dist.train.signals import RequestListener
from star_dist.train.supervisor import Supervisor
from star_dist.train.token_losses import TokenLosses


@dataclass
class Totals:
    """Sums since the last report. losses_K, correct_K: over the tokens of each of K scales, on the device."""

    losses_K: Tensor
    correct_K: Tensor
    samples: int = 0
    skipped_samples: int = 0
    steps: int = 0
    text_tokens: int = 0
    data_wait_s: float = 0.0
    own_time: OwnTime = field(kw_only=True)
    started_s: float = field(default_factory=time.perf_counter)


class Trainer:
    """Trains a run from its newest checkpoint, or from the start, to `train.steps`."""

    def __init__(
        self,
        config: RunConfig,
        engine: Engine,
        tokenizer: MultiScaleVQVAE,
        metadata: list[DatasetMetadata],
        checkpoints: CheckpointFolder,
        checkpoint: Checkpoint | None,
        requests: RequestListener,
        facts: FactsLog,
    ) -> None:
        self.config = config
        self.engine = engine
        self.rank, self.world_size = engine.process.rank, engine.process.world_size
        self.device = engine.device
        self.schedule = config.schedule
        self.run_dir = Path(config.run_dir)
        self.metadata = metadata
        self.tokenizer = tokenizer.to(self.device)
        self.text_encoder = None
        if config.needs_text_encoder:
            self.text_encoder = TextEncoder(config.text, self.device, frozen_dtype(config, self.device))
        if config.samples.every:
            self.text_encoder.check_fit(config.samples.prompts)
        self.token_losses = TokenLosses(config, engine, self.tokenizer.quantize, self.text_encoder, self.device)
        self.train_batches = TrainBatches(config, metadata, self.world_size)
        self.held_out = None
        if config.validation.every:
            self.held_out = HeldOutBatches(config, metadata, self.rank, self.world_size)
        self.first_step = 0
        if checkpoint is not None:
            engine.state.load(checkpoint)
            self.first_step = checkpoint.step
        self.peak_flops, self.peak_source = peak_flops(config, self.device)
        self.log = MetricsLog(config, self.run_dir, self.first_step, enabled=self.rank == 0)
        inputs = RunInputs(metadata[0].tokenizer_hash, tuple(source.content_hash for source in metadata))
        self.supervisor = Supervisor(config, engine, checkpoints, inputs, checkpoint, requests, facts, self.log)

    def run(self) -> None:
        """Trains to the last step.

        Raises:
            RunEnded: it was asked to end before; it has saved.
            UserError: the last checkpoint cannot be written, or spikes come too often.
        """
        gc.collect()
        gc.freeze()  # collections go through what the loop makes, not through a million objects of libraries
        gc.disable()  # a collection on one rank keeps all others waiting; _report collects on all at once
        asked_to_end = None
        try:
            with self.supervisor.watching(self.first_step):
                step = self.first_step
                self._examine_what_was_saved()
                while step < self.config.train.steps:
                    step = self._train_from(step)
        except RunEnded as ended:
            asked_to_end = ended
        finally:
            self.log.close_bar()
        # Not after another error: DeepSpeed's engine waits for the GPU when it is collected, and that for other ranks.
        gc.enable()
        gc.unfreeze()
        if asked_to_end is not None:
            raise asked_to_end
        self.log.finish()

    def _train_from(self, first_step: int) -> int:
        """Trains from a step on; returns the last step, or after a spike the earlier one to go on from."""
        config = self.config
        batches = self._batches(first_step)
        totals = self._new_totals()
        for step in range(first_step, config.train.steps):
            for _ in range(self.train_batches.micro_batches_per_step):
                batch = self._next_batch(batches, totals)
                losses_T, correct_T = self.token_losses(batch, self._text(batch, step, totals), step)
                present_B = self.token_losses.present(batch)
                self.engine.backward(self.token_losses.loss_sum(losses_T, present_B))
                self.engine.step(learning_rate(config.optimizer, step, config.train.steps))
                self._add(totals, losses_T, correct_T, batch, present_B)
            done = step + 1
            totals.steps += 1
            self.log.advance()
            request, spike = self.supervisor.end_step(step)
            if spike is not None and (earlier_step := self.supervisor.go_back_before(spike, done)) is not None:
                return earlier_step
            saves = request is not None or self._due(config.checkpoint.every, done)
            # A report before every checkpoint keeps the lines of a resumed run equal to those of an undisturbed one.
            if self._due(config.logging.every, done) or saves:
                self._report(done, totals)
                totals = self._new_totals()
            trained_s = time.perf_counter()
            if saves:
                self.supervisor.save(done, request)
            if self._due(config.validation.every, done):
                self._validate(done)
            if self._due(config.samples.every, done):
                self._draw_samples(done)
            totals.started_s += time.perf_counter() - trained_s  # what was no training counts as no time of it
        return config.train.steps

    # ------------------------------------------------------------------------------------------- one micro-batch

    def _batches(self, first_step: int) -> Iterator[MicroBatch]:
        """This rank's micro-batches from a step on, without the data that spikes have put aside."""
        data_step = self.supervisor.skipped_data.data_step(first_step)
        stream = self.train_batches.starting_at(data_step)
        while True:
            for _ in range(self.train_batches.micro_batches_per_step):
                batch = next(stream)
                if data_step not in self.supervisor.skipped_data.steps:
                    yield batch
            data_step += 1

    def _next_batch(self, batches: Iterator[MicroBatch], totals: Totals) -> MicroBatch:
        start = time.perf_counter()
        batch = next(batches)
        waited_s = time.perf_counter() - start
        totals.data_wait_s += waited_s
        totals.own_time.add(waited_s)
        return batch

    def _text(self, batch: MicroBatch, step: int, totals: Totals) -> TextFeatures:
        with totals.own_time.measured():
            text = self.token_losses.text(batch, step)
        totals.text_tokens += sum(text.lengths)
        return text

    # ----------------------------------------------------------------------------------------------- reports

    def _new_totals(self) -> Totals:
        zeros = torch.zeros(len(self.schedule), device=self.device)
        return Totals(zeros, zeros.clone(), own_time=OwnTime(self.device))

    def _add(
        self, totals: Totals, losses_T: Tensor, correct_T: Tensor, batch: MicroBatch, present_B: Tensor | None
    ) -> None:
        losses_K = by_scale(losses_T, self.schedule, present_B)
        self.supervisor.step_losses.add(losses_K.sum(), sum(batch.present), batch.sample_ids)
        totals.losses_K += losses_K
        totals.correct_K += by_scale(correct_T, self.schedule, present_B)
        totals.samples += sum(batch.present)
        totals.skipped_samples += len(batch) - sum(batch.present)

    def _due(self, every: int, done: int) -> bool:
        return bool(every) and (done % every == 0 or done == self.config.train.steps)

    def _over_ranks(self, totals: Totals) -> tuple[Tensor, Tensor, int, int]:
        """Losses, hits, samples and skipped samples, summed over all ranks."""
        counts = torch.tensor([totals.samples, totals.skipped_samples], dtype=torch.float32, device=self.device)
        sums = self.engine.all_reduce(torch.cat([totals.losses_K, totals.correct_K, counts]))
        losses_K, correct_K, counts = sums.split([len(self.schedule), len(self.schedule), 2])
        samples, skipped = (round(count) for count in counts.tolist())
        return losses_K, correct_K, samples, skipped

    def _report(self, done: int, totals: Totals) -> None:
        """Sums of all ranks since the last report; here the host waits for the device.

        Raises:
            UserError: not one sample was there to learn from.
        """
        losses_K, correct_K, samples, skipped = self._over_ranks(totals)
        if samples == 0:
            raise UserError(f"all {skipped} samples since the last report are in corrupt shards; repair the data set")
        report = loss_report(self.schedule, losses_K, correct_K, samples)
        elapsed_s = time.perf_counter() - totals.started_s
        images_per_s = samples / elapsed_s
        text_tokens = round(totals.text_tokens / max(totals.samples + totals.skipped_samples, 1))
        flops_per_image = training_flops(self.engine.model.config, self.token_losses.schedule, text_tokens)
        report |= {
            "optim/learning_rate": learning_rate(self.config.optimizer, done - 1, self.config.train.steps),
            "optim/grad_norm": self.engine.gradient_norm(),
            "optim/skipped_steps": self.engine.skipped_steps,
            "data/skipped_samples": skipped,
            "throughput/images_per_s": images_per_s,
            "throughput/tokens_per_s": images_per_s * self.token_losses.schedule.num_tokens,
            "throughput/mfu": images_per_s * flops_per_image / (self.peak_flops * self.world_size),
            "time/step_s": elapsed_s / totals.steps,
            "time/data_wait": totals.data_wait_s / elapsed_s,
            "memory/peak_bytes": peak_memory_bytes(self.device),
        }
        report |= slowest_rank(self.supervisor.control.gather(totals.own_time.total_s()), totals.steps)
        self.log.report(done, report)
        gc.collect()

    def _examine_what_was_saved(self) -> None:
        """Validates and draws what an end right after saving has left out."""
        step = self.first_step
        if step == 0:
            return
        reports = read_reports(self.run_dir)
        validated = any(line["step"] == step and "validation/loss/total" in line for line in reports)
        missing = (not validated, not self._picture_path(step).exists())
        not_validated, not_drawn = self.supervisor.control.gather(missing)[0]  # as rank 0 sees the files
        if not_validated and self._due(self.config.validation.every, step):
            self._validate(step)
        if not_drawn and self._due(self.config.samples.every, step):
            self._draw_samples(step)

    def _validate(self, done: int) -> None:
        totals = self._new_totals()
        self.engine.train(False)
        with self.supervisor.pause("validation"), torch.no_grad():
            for batch, weights_B in self.held_out:
                losses_T, correct_T = self.token_losses(batch, self.token_losses.text(batch, None), None)
                totals.samples += int(weights_B.sum())
                weights_B = copy_to_device(weights_B, self.device)
                totals.losses_K += by_scale(losses_T, self.schedule, weights_B)
                totals.correct_K += by_scale(correct_T, self.schedule, weights_B)
        self.engine.train()
        losses_K, correct_K, samples, _ = self._over_ranks(totals)
        if samples < self.held_out.num_samples:
            absent = self.held_out.num_samples - samples
            self.log.say(f"warning: {absent} of {self.held_out.num_samples} validation samples are in corrupt shards")
        if samples:
            self.log.report(done, loss_report(self.schedule, losses_K, correct_K, samples, "validation/"))

    def _draw_samples(self, done: int) -> None:
        """Draws the configured prompts on rank 0 with a whole copy of the weights; the other ranks wait.

        Only after a save under way is complete: drawing may take more memory than there is.
        """
        self.supervisor.saver.finish()
        with self.supervisor.pause("drawing samples"):
            self._draw_samples_on_rank_0(done)

    def _picture_path(self, step: int) -> Path:
        return self.run_dir / "samples" / f"step_{step:08d}.png"

    def _draw_samples_on_rank_0(self, done: int) -> None:
        weights = self.engine.full_weights()
        if self.rank == 0:
            samples = self.config.samples
            dtype = frozen_dtype(self.config, self.device)
            with torch.device("meta"):
                model = STAR(self.engine.model.config, self.config.model.attention)
            model.load_state_dict({k: v.to(self.device, dtype) for k, v in weights.items()}, assign=True)
            pipeline = StarPipeline(model.eval(), self.tokenizer, self.text_encoder)
            pictures = pipeline(samples.prompts, samples.seed, samples.sampling_options())
            path = self._picture_path(done)
            cells = [([picture], prompt) for picture, prompt in zip(pictures, samples.prompts)]
            grid = draw_grid([GridSection(f"{self.config.name}, step {done}", cells)], columns=8)
            with training_goes_on(path):
                path.parent.mkdir(exist_ok=True)
                grid.save(path)
                self.log.report_picture(done, "samples", path)
        self.engine.barrier()
