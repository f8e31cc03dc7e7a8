"""Training of the multi-scale VQ-VAE: `launcher/train_tokenizer.py`.

Every draw is a function of (seed, step, sample), so a run that was killed goes on from its last checkpoint as if
nothing had happened. The run folder becomes the tokenizer's folder (`run_files.py`).
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from star_dist.config import TokenizerTrainConfig, dump_config
from star_dist.data.pictures import normalize
from star_dist.device import rank_device
from star_dist.errors import RunEnded, Unavailable, UserError
from star_dist.files import append_json_line, training_goes_on, write_text_atomically
from star_dist.process import ProcessInfo
from star_dist.run_folder import METRICS_FILE, claim_run_folder, keep_metrics_up_to
from star_dist.tokenizer.batches import Batch, ReadablePictures, StepBatches, find_pictures, fingerprint
from star_dist.tokenizer.codebook import codebook_usage
from star_dist.tokenizer.io import CONFIG_FILE, save_tokenizer
from star_dist.tokenizer.ranks import Ranks
from star_dist.tokenizer.reconstructions import draw_reconstructions, psnr
from star_dist.tokenizer.run_files import (
    CHECKPOINT_FILE,
    PICTURE_FILE,
    TRAINING_FILE,
    UNREADABLE_FILE,
    check_same_run,
    read_checkpoint,
    write_checkpoint,
)
from star_dist.tokenizer.update import TokenizerUpdate
from star_dist.train.signals import Request, RequestListener


def train_tokenizer(config: TokenizerTrainConfig, process: ProcessInfo) -> None:
    """Trains a tokenizer to its last step, from the checkpoint of its run folder if there is one, and writes it there.

    A run folder that holds the finished tokenizer of the same configuration is left as it is.

    Raises:
        UserError: the run folder holds a run of another configuration or of other pictures, a picture folder or
            weights file that cannot be used, ranks that find different files there, a batch that the ranks cannot
            share, or a loss that is not finite. Unavailable: see `rank_device`; or as `TokenizerTraining.run`.
        RunEnded: it was asked to end before the last step (`star_dist.train.signals`); it has saved.
    """
    run_dir = Path(config.run_dir)
    lock = claim_run_folder(run_dir) if process.rank == 0 else None
    check_same_run(run_dir, config)
    if (run_dir / CONFIG_FILE).is_file():
        if process.rank == 0:
            print(f"{run_dir} holds this tokenizer already, trained for {config.steps} steps; nothing to do")
            (run_dir / CHECKPOINT_FILE).unlink(missing_ok=True)  # of a run that was killed as it ended
        return
    if config.global_batch % process.world_size:
        raise UserError(
            f"global_batch {config.global_batch} is not a multiple of {process.world_size} ranks; change one of them"
        )
    device = rank_device(process)
    if process.world_size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    asked_to_end = None
    try:
        TokenizerTraining(config, process, device).run()
    except RunEnded as ended:
        asked_to_end = ended
    # Not after another error: NCCL would wait for the ranks that go on, and the message would never be seen.
    if dist.is_initialized():
        dist.destroy_process_group()
    del lock
    if asked_to_end is not None:
        raise asked_to_end


class TokenizerTraining:
    """Everything of one run; see `train_tokenizer`."""

    def __init__(self, config: TokenizerTrainConfig, process: ProcessInfo, device: torch.device) -> None:
        self.config = config
        self.process = process
        self.device = device
        self.run_dir = Path(config.run_dir)
        self.ranks = Ranks(process.world_size, self.device)
        paths = find_pictures(Path(config.data.pictures))
        self.fingerprint = fingerprint(paths)
        self.pictures = ReadablePictures(paths, config.resolution, keep_in_memory=config.data.keep_in_memory)
        self.pictures.read(0, {})  # refuses a folder without a single good picture before anything is built
        self.unreadable: dict[str, str] = {}  # reason by file, of all ranks as far as they have told one another
        self.skipped: dict[str, str] = {}  # what this rank has not told yet
        self.requests = RequestListener(self.run_dir, process.rank)
        self.request: Request | None = None  # what all ranks are asked to do after the step

        self.update = TokenizerUpdate(config, self.ranks)
        self.model = self.update.model
        self.first_step = self._load_checkpoint()
        self._check_ranks_agree()

    def run(self) -> None:
        """Trains to the last step and writes the tokenizer.

        Raises:
            RunEnded: it was asked to end before; it has saved.
            Unavailable: it was asked to end, and could not save.
            UserError: as `TokenizerUpdate`, and as `StepBatches.from_step`.
        """
        with self.requests.listening():
            self._run()

    def _run(self) -> None:
        config, rank = self.config, self.process.rank
        batches = StepBatches(
            self.pictures, config.seed, config.global_batch, rank, self.process.world_size, config.data.horizontal_flip
        ).from_step(self.first_step, config.steps, config.data.num_workers)
        if rank == 0:
            self._start_files()
        bar = tqdm(
            total=config.steps,
            initial=self.first_step,
            desc="train tokenizer",
            unit="step",
            disable=rank != 0,
            mininterval=0.5 if sys.stderr.isatty() else 15,
        )
        reported_at, reported_step = time.perf_counter(), self.first_step
        for step, batch in enumerate(batches, start=self.first_step):
            values = self._train_step(step, batch)
            bar.update()
            done = step + 1
            if done % config.log_every == 0 or done == config.steps:
                now = time.perf_counter()
                values["throughput/images_per_s"] = (done - reported_step) * config.global_batch / (now - reported_at)
                reported_at, reported_step = now, done
                self._report(done, values, bar)
            if done < config.steps and (done % config.checkpoint_every == 0 or self.request is not None):
                self._tell_unreadable()
                saved = self._save_checkpoint(done) if rank == 0 else None
                if self.request is not None and self.request.exit_code is not None:
                    bar.close()
                    batches.close()  # left to the garbage collector, its workers take 5 s to end
                    self._end(done, self.request, self.ranks.gather_objects(saved)[0])
                if rank == 0:
                    self._draw_reconstructions()
        bar.close()
        if rank == 0:
            self._finish()
        if dist.is_initialized():
            dist.barrier()  # no rank leaves before the tokenizer is written: launchers end the others at once

    def _train_step(self, step: int, batch: Batch) -> dict[str, Tensor | float]:
        """One update; returns what there is to report, as `TokenizerUpdate`, and finds out what all ranks are asked."""
        self.skipped.update(batch.unreadable)
        values, asked = self.update(step, batch.pictures, self.requests.noted())
        self.request = RequestListener.agreed(asked)
        return values

    # ------------------------------------------------------------------------------------------------ records

    def _report(self, step: int, values: dict[str, Tensor | float], bar: tqdm) -> None:
        """Writes one line of metrics, averaged over ranks."""
        names = [name for name, value in values.items() if isinstance(value, Tensor)]
        means = self.ranks.mean(torch.stack([values[name].detach().float() for name in names])).tolist()
        line: dict[str, float] = {**values, **dict(zip(names, means))}
        self._tell_unreadable()
        if self.process.rank != 0:
            return
        line["psnr"] = psnr(line["loss/l2"])
        line["data/unreadable"] = len(self.unreadable)
        line.update(codebook_usage(self.model.quantize, self.config.schedule))
        append_json_line(self.run_dir / METRICS_FILE, {"step": step, **line})
        bar.set_postfix(loss=f"{line['loss/total']:.3f}", psnr=f"{line['psnr']:.1f}", refresh=False)

    def _start_files(self) -> None:
        write_text_atomically(self.run_dir / TRAINING_FILE, dump_config(self.config) + "\n")
        keep_metrics_up_to(self.first_step, self.run_dir)
        self._list_unreadable()

    def _tell_unreadable(self) -> None:
        """All ranks learn of pictures that one has skipped since the last call; each is told once."""
        told = {name: reason for name, reason in self.skipped.items() if name not in self.unreadable}
        self.skipped = {}
        parts = self.ranks.gather_objects(told)
        for part in parts:
            self.unreadable.update(part)
        if self.process.rank == 0 and any(parts):
            self._list_unreadable()

    def _list_unreadable(self) -> None:
        path = self.run_dir / UNREADABLE_FILE
        with training_goes_on(path), path.open("w") as file:
            file.writelines(
                json.dumps({"file": name, "reason": reason}) + "\n" for name, reason in sorted(self.unreadable.items())
            )

    def _draw_reconstructions(self) -> float | None:
        """Draws pictures over their reconstructions; returns their PSNR, or None where the configuration wants none."""
        count = min(self.config.sample_pictures, len(self.pictures))
        if not count:
            return None
        chosen = [self.pictures.read(i * len(self.pictures) // count, {}) for i in range(count)]
        originals = normalize(torch.stack(chosen)).to(self.device)
        sheet, quality = draw_reconstructions(self.model, originals, self.config.schedule)
        path = self.run_dir / PICTURE_FILE
        with training_goes_on(path):
            sheet.save(path)
        return quality

    def _finish(self) -> None:
        save_tokenizer(self.model, self.run_dir)
        (self.run_dir / CHECKPOINT_FILE).unlink(missing_ok=True)
        quality = self._draw_reconstructions()
        usage = codebook_usage(self.model.quantize, self.config.schedule)
        codes = f"{usage['codebook/used']} of {self.model.quantize.vocab_size} codes used"
        summary = f"tokenizer written to {self.run_dir}: {codes}"
        if quality is not None:
            summary += f", PSNR {quality:.2f} dB over {min(self.config.sample_pictures, len(self.pictures))} pictures"
        if self.unreadable:
            summary += f"; {len(self.unreadable)} unreadable pictures skipped, listed in {UNREADABLE_FILE}"
        print(summary)

    # -------------------------------------------------------------------------------------------- checkpoints

    def _end(self, step: int, request: Request, saved: bool) -> None:
        """Ends the run as it was asked to.

        Raises:
            RunEnded: always, unless Unavailable: the step could not be saved.
        """
        if not saved:  # a failure, or the job would come back for ever
            raise Unavailable(
                f"{request.name}: the checkpoint of step {step} cannot be written to {self.run_dir}; the training goes "
                f"on from the one before it when started again"
            )
        raise RunEnded(f"{request.name}: the training goes on from step {step} when started again", request.exit_code)

    def _save_checkpoint(self, step: int) -> bool:
        """False, after a warning, where it cannot be written: the one before stays, and the next may succeed."""
        state = {
            "step": step,
            "pictures": self.fingerprint,
            "unreadable": self.unreadable,
            **self.update.state_dict(),
        }
        try:
            write_checkpoint(self.run_dir, state)
        except OSError as error:
            print(
                f"warning: the checkpoint of step {step} cannot be written to {self.run_dir}: {error.strerror}; "
                f"training goes on",
                file=sys.stderr,
                flush=True,
            )
            return False
        return True

    def _load_checkpoint(self) -> int:
        """Takes up the checkpoint of the run folder; returns the step to go on with, 0 without one.

        Raises:
            UserError: as `read_checkpoint`, or the folder of pictures has changed since.
        """
        state = read_checkpoint(self.run_dir)
        if state is None:
            return 0
        if state["pictures"] != self.fingerprint:
            path = self.run_dir / CHECKPOINT_FILE
            raise UserError(
                f"{self.config.data.pictures} does not hold the same pictures as when {path} was written; "
                f"put them back, or change run_dir to start anew"
            )
        self.update.load_state_dict(state)
        self.unreadable = dict(state["unreadable"])
        if self.process.rank == 0:
            print(f"going on from step {state['step']} of {self.config.steps}", file=sys.stderr)
        return state["step"]

    def _check_ranks_agree(self) -> None:
        """Nodes may have folders of their own under the same name.

        Raises:
            UserError: ranks begin at different steps, or with different pictures.
        """
        found = self.ranks.gather_objects((self.first_step, self.fingerprint))
        for rank, (step, pictures) in enumerate(found):
            if step != found[0][0]:
                raise UserError(
                    f"run_dir {self.run_dir} is at step {found[0][0]} on rank 0 and at step {step} on rank {rank}; "
                    f"give a folder that all nodes share"
                )
            if pictures != found[0][1]:
                raise UserError(
                    f"data.pictures {self.config.data.pictures} has fingerprint {found[0][1]} on rank 0 and {pictures} "
                    f"on rank {rank}; give a folder that holds the same files on all nodes"
                )
