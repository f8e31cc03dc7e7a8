"""What keeps a training alive: requests to save or end, saving, spikes, hangs, and the facts of all that.

Ranks find the same thing at the same step: what each knows goes into one small sum per step that runs beside the next
step (`ControlGroup.exchange`), so a decision comes one step late and costs no waiting.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from star_dist.cli import PREEMPTED_EXIT
from star_dist.config import RunConfig
from star_dist.errors import RunEnded, Unavailable, UserError
from star_dist.train.checkpoint import Checkpoint, CheckpointFolder, RunInputs
from star_dist.train.control import ControlGroup
from star_dist.train.engine import Engine
from star_dist.train.facts import FactsLog
from star_dist.train.metrics import MetricsLog
from star_dist.train.saving import CheckpointSaver
from star_dist.train.signals import Request, RequestListener
from star_dist.train.spikes import SPIKES_FILE, SkippedData, Spike, SpikeDetector, StepLosses, record_spike
from star_dist.train.watchdog import Watchdog


class Supervisor:
    """One per rank; all methods are for all ranks together."""

    def __init__(
        self,
        config: RunConfig,
        engine: Engine,
        checkpoints: CheckpointFolder,
        inputs: RunInputs,
        checkpoint: Checkpoint | None,
        requests: RequestListener,
        facts: FactsLog,
        log: MetricsLog,
    ) -> None:
        self.config, self.engine, self.facts, self.log = config, engine, facts, log
        self.rank = engine.process.rank
        self.run_dir = Path(config.run_dir)
        self.control = ControlGroup()
        self.requests = requests
        self.watchdog = Watchdog(config.health.hang_timeout_s, self.run_dir, self.rank, facts.hang)
        self.step_losses = StepLosses(engine.device)
        self.spike_detector = SpikeDetector(config.health)
        self.skipped_data = SkippedData(self.run_dir, checkpoint.skipped_data if checkpoint is not None else ())
        self.skipped_data.steps[:] = self.control.gather(self.skipped_data.steps)[0]  # as rank 0 sees the file
        self.checkpoints = checkpoints
        self.saver = CheckpointSaver(
            config,
            self.checkpoints,
            engine.state,
            self.control,
            self.rank,
            inputs,
            self.skipped_data.steps,
            on_saved=facts.saved,
            on_failed=self._on_save_failed,
            on_prune_failed=self._on_prune_failed,
        )
        self._requested: list[float] = []  # what `end_step` has found last
        self._skipped_steps = engine.skipped_steps  # of the run, and of its last steps in a row
        self._skipped_in_a_row = 0

    @contextlib.contextmanager
    def watching(self, first_step: int) -> Iterator[None]:
        """What happens inside trains from a step on."""
        with (
            self.facts.attempt(first_step, self.control.size),
            self.watchdog.watching(),
        ):
            yield

    def end_step(self, step: int) -> tuple[Request | None, Spike | None]:
        """What all ranks find out at the end of a step about the steps before, without waiting for one another.

        Raises:
            UserError: nothing is learned any more.
        """
        self.facts.step_ended(step + 1)
        self._check_that_it_learns(step + 1)
        self.watchdog.beat(f"step {step + 2}")
        step_loss = self.step_losses.end_step(step)
        answer = self.control.exchange([*self.requests.noted(), self.saver.num_written, *step_loss])
        if answer is None:
            return None, None
        *requested, num_written, loss_sum, samples = answer
        if num_written == self.saver.num_started * self.control.size:
            self.saver.finish()
        spike = None
        if samples:  # the loss is fetched one step late, and the ranks have added it up another one later
            spike = self.spike_detector.judge(step - 2, loss_sum / (samples * self.config.schedule.num_tokens))
        self._requested = requested
        return self.requests.agreed(requested), spike

    def _check_that_it_learns(self, done: int) -> None:
        """All ranks skip the same steps; a spike's loss may be finite where its gradient is not."""
        skipped_steps, limit = self.engine.skipped_steps, self.config.health.max_skipped_steps
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped_steps > self._skipped_steps else 0
        self._skipped_steps = skipped_steps
        if self._skipped_in_a_row == limit:
            raise UserError(
                f"the gradients of steps {done - limit + 1} to {done} are not finite (health.max_skipped_steps "
                f"{limit}): the weights stay as they are; go on from an earlier checkpoint (checkpoint.resume_step), "
                f"on other nodes if one of these may be failing, else with a lower optimizer.learning_rate in another "
                f"run"
            )

    def go_back_before(self, spike: Spike, done: int) -> int | None:
        """Writes a spike down; goes back to before it if that is the option, and returns the step gone back to.

        Raises:
            UserError: it went back too often.
        """
        health = self.config.health
        sample_ids = self.control.gather(self.step_losses.sample_ids(spike.step))
        checkpoint = self._last_before(spike) if health.on_spike == "rollback" else None
        too_often = checkpoint is not None and len(self.skipped_data.steps) >= health.max_rollbacks
        action = "recorded" if checkpoint is None else "end" if too_often else f"back to step {checkpoint.step}"
        if self.rank == 0:
            record_spike(self.run_dir, spike, sample_ids, action)
            self.facts.write("spike", step=spike.step, loss=str(spike.loss), action=action)
        self.log.say(f"step {spike.step + 1} has loss {spike.loss:.4g}, those before {spike.mean:.4g}: {action}")
        if checkpoint is None:
            self.spike_detector.stays(spike)
            return None
        if too_often:
            raise UserError(
                f"the loss spiked at step {spike.step + 1} after {health.max_rollbacks} rollbacks "
                f"(health.max_rollbacks); look at {self.run_dir / SPIKES_FILE}, then lower optimizer.learning_rate in "
                f"another run, or raise the limit"
            )
        with self.pause("going back"):
            *requested, _, _, _ = self.control.finish_exchange()
            for counts in (self._requested, requested):
                self.requests.note_again(counts)
            self.step_losses = StepLosses(self.engine.device)
            self.skipped_data.add(spike.step, write=self.rank == 0)
            self.engine.state.load(checkpoint)
            if self.rank == 0:
                self.checkpoints.set_aside_after(checkpoint.step)
            self.control.gather(None)
            self.log.go_back(checkpoint.step)
            self.facts.went_back(done, checkpoint.step)
        return checkpoint.step

    def _last_before(self, spike: Spike) -> Checkpoint | None:
        """The checkpoint to go back to: rank 0 decides, so that no two ranks see different ones."""
        self.saver.settle()
        found = self.checkpoints.find(None, at_most=spike.step) if self.rank == 0 else None
        step = self.control.gather(None if found is None else found.step)[0]
        return found if step is None or found is not None else self.checkpoints.open(step)

    def save(self, done: int, request: Request | None) -> None:
        """Saves, beside the training where that goes on; ends the run if it was asked to.

        Raises:
            RunEnded: it was asked to end.
            Unavailable: the last step's checkpoint cannot be written, or that of a run that wants to go on.
        """
        last = done == self.config.train.steps
        ends = request is not None and request.exit_code is not None and not last
        with self.pause("saving"):
            self.facts.copied(done)
            saved = self.saver.start(done, wait=last or ends or not self.config.checkpoint.background)
        if last and not saved:
            raise Unavailable(
                f"the last checkpoint could not be written to {self.checkpoints.place}; mend that and start again"
            )
        if ends:
            newest = done if saved else max(self.checkpoints.complete_steps(), default=0)
            goes_on = f"{request.name}: the run goes on from step {newest} when started again"
            if request.exit_code == PREEMPTED_EXIT and not saved:  # a failure, or it would come back for ever
                raise Unavailable(f"{goes_on}; step {done} could not be written to {self.checkpoints.place}")
            raise RunEnded(goes_on, request.exit_code)

    def _on_save_failed(self, step: int, reason: str) -> None:
        self.log.say(f"warning: the checkpoint of step {step} failed: {reason}; training goes on")
        self.facts.write("save_failed", step=step, reason=reason)

    def _on_prune_failed(self, reason: str) -> None:
        self.log.say(f"warning: checkpoints that are no longer kept could not be removed: {reason}")
        self.facts.write("prune_failed", reason=reason)

    @contextlib.contextmanager
    def pause(self, doing: str) -> Iterator[None]:
        """What happens inside is no training."""
        self.watchdog.beat(doing)
        yield
        self.watchdog.beat("training")
        self.facts.pause_ended()
