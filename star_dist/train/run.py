"""One training run from its configuration: checks everything cheap first, then builds and trains."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from star_dist.config import RunConfig, dump_config
from star_dist.environment import describe_environment
from star_dist.errors import RunEnded, UserError
from star_dist.files import write_text_atomically
from star_dist.process import ProcessInfo
from star_dist.run_folder import CONFIG_FILE, claim_run_folder
from star_dist.train.checkpoint import (
    Checkpoint,
    CheckpointFolder,
    check_same_data,
    check_same_run,
    check_same_tokenizer,
)
from star_dist.train.facts import FactsLog, this_job_started_from
from star_dist.train.signals import RequestListener


def train(config: RunConfig, process: ProcessInfo) -> None:
    """Trains `config` to its last step, from the newest complete checkpoint of its run folder if there is one.

    Raises:
        UserError: anything the user can mend: found before the model is built wherever that is possible.
    """
    run_dir = Path(config.run_dir)
    lock = claim_run_folder(run_dir) if process.rank == 0 else None
    requests = RequestListener(run_dir, process.rank)
    facts = FactsLog(run_dir, process.rank)
    # From here on a signal is noted and acted on after the first steps: the start takes minutes on a large cluster.
    with requests.listening(), facts.mistakes():
        _train(config, process, requests, facts)
    del lock


def _train(config: RunConfig, process: ProcessInfo, requests: RequestListener, facts: FactsLog) -> None:
    run_dir = Path(config.run_dir)
    config.accumulation_steps(process.world_size)
    checkpoints = CheckpointFolder(run_dir, config.checkpoint)
    resume_step = config.checkpoint.resume_step
    if resume_step is not None and this_job_started_from(run_dir, resume_step):
        if process.rank == 0:
            print(f"this job has gone back to checkpoint.resume_step {resume_step} before: now from the newest on")
        resume_step = None
    checkpoint = checkpoints.find(resume_step)
    changes = check_same_run(checkpoint, config) if checkpoint is not None else []
    _check_nodes(config, process)

    from star_dist.data.fetch import fetch_matching_metadata
    from star_dist.data.shared_memory import remove_segments_of_dead_jobs
    from star_dist.data.streams import claim_caches
    from star_dist.tokenizer.io import load_tokenizer, tokenizer_hash

    tokenizer = load_tokenizer(Path(config.tokenizer.path))
    if checkpoint is not None:
        check_same_tokenizer(checkpoint, tokenizer_hash(tokenizer))
        if checkpoint.step >= config.train.steps:
            return _report_finished(run_dir, checkpoint, config, process)
    caches = []
    if process.local_rank == 0:  # before the ranks meet: all must find the same numbers of shared memory taken
        caches = claim_caches(config.data)
        remove_segments_of_dead_jobs()
    metadata = fetch_matching_metadata(config, tokenizer_hash(tokenizer))
    if checkpoint is not None:
        check_same_data(checkpoint, config.data, [source.content_hash for source in metadata])
    weights = None
    if config.train.init_from is not None and checkpoint is None and (process.rank == 0 or config.train.zero_stage < 3):
        from star_dist.export import initial_weights_from, other_text

        if process.rank == 0:
            for difference in other_text(config.train.init_from, config):
                print(f"warning: {difference}", file=sys.stderr)
        weights = initial_weights_from(config.train.init_from, config, tokenizer_hash(tokenizer))

    from star_dist.train.engine import Engine
    from star_dist.train.trainer import Trainer

    engine = Engine(config, process, weights)
    engine.check_all_ranks_agree(0 if checkpoint is None else checkpoint.step, "the checkpoint to go on from")
    trainer = Trainer(config, engine, tokenizer, metadata, checkpoints, checkpoint, requests, facts)
    if process.rank == 0:
        _write_environment(run_dir, config, process, trainer)
        _say_where_it_starts(trainer, changes)
        if checkpoint is not None:  # later ones are damaged, or to be trained again
            for path in checkpoints.set_aside_after(checkpoint.step):
                trainer.log.say(f"set aside: {path}")
    try:
        trainer.run()
    except RunEnded:
        engine.close()
        raise
    # Not after another error: NCCL would wait for the ranks that go on, and the message would never be seen.
    engine.close()
    del caches


def _report_finished(run_dir: Path, checkpoint: Checkpoint, config: RunConfig, process: ProcessInfo) -> None:
    """Says that there is nothing left to train.

    Raises:
        UserError: the checkpoint is from beyond the last step, so train.steps was made smaller.
    """
    if checkpoint.step > config.train.steps:
        raise UserError(
            f"{run_dir} has a checkpoint of step {checkpoint.step}, beyond train.steps {config.train.steps}; set "
            f"checkpoint.resume_step to an earlier one, or train.steps to {checkpoint.step} or more"
        )
    if process.rank == 0:
        print(f"{run_dir} is trained to step {checkpoint.step} of {config.train.steps}; nothing to do")


def _check_nodes(config: RunConfig, process: ProcessInfo) -> None:
    """Refuses what streaming would refuse in the middle of the start: shards must fall to nodes evenly.

    Raises:
        UserError: neither of data.num_canonical_nodes and the number of nodes divides the other.
    """
    nodes, canonical = process.world_size // process.local_world_size, config.data.num_canonical_nodes
    if canonical % nodes and nodes % canonical:
        raise UserError(
            f"data.num_canonical_nodes {canonical} and the number of nodes {nodes} do not divide one another; set the "
            f"former to a multiple of {nodes} (before the first step: it decides the order of the samples)"
        )


def _write_environment(run_dir: Path, config: RunConfig, process: ProcessInfo, trainer) -> None:
    """The resolved config and the environment, before step 1."""
    write_text_atomically(run_dir / CONFIG_FILE, dump_config(config) + "\n")
    facts = describe_environment() | {
        "world_size": process.world_size,
        "device": str(trainer.device),
        "first_step": trainer.first_step,
        "attention_kernel": trainer.engine.attention,
        "peak_flops": trainer.peak_flops,
        "peak_flops_source": trainer.peak_source,
    }
    write_text_atomically(run_dir / "environment.json", json.dumps(facts, indent=2) + "\n")


def _say_where_it_starts(trainer, changes: list[str]) -> None:
    trainer.log.say(f"attention kernel: {trainer.engine.attention}")
    if trainer.first_step:
        trainer.log.say(f"going on from step {trainer.first_step} of {trainer.config.train.steps}")
    for change in changes:
        trainer.log.say(f"changed since the checkpoint: {change}")
