"""This rank's part of the training state in DeepSpeed's ZeRO optimizers, as pieces of named parameters.

DeepSpeed's own checkpoints resume on the same number of ranks only, and its universal ones lose each group's settings
and count Adam's steps wrongly (measured with 0.19.8). The layout behind them is simple: every rank holds flat ranges of
parameters inside fp32 tensors (the masters), each with one Adam state. Stage 3 parts every parameter equally, stages 1
and 2 part the concatenation of a group's parameters, and at stage 0 every rank holds all.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from star_dist.errors import UserError
from star_dist.model.size import FLOAT32_BYTES
from star_dist.run_folder import differences
from star_dist.train.checkpoint import Checkpoint
from star_dist.train.shards import KINDS, Piece, Scalars, ShardReader

# Of AdamW, what decides how the moments go on; PyTorch adds switches of its own from one version to the next.
GROUP_SETTINGS = ("weight_decay", "betas", "eps")


class ShardedState:
    """Weights, Adam moments and counters of a DeepSpeed engine; `group_of`: parameter -> name of its group."""

    def __init__(self, engine: Any, zero_stage: int, rank: int, world_size: int, group_of: dict[str, str]) -> None:
        # Nothing else is saved, so there may be nothing else that training changes or that starts from a file.
        assert not list(engine.module.buffers()) and all(p.requires_grad for p in engine.module.parameters())
        self._engine = engine
        self._stage = zero_stage
        self._rank, self._world_size = rank, world_size
        self._group_of = group_of

    @functools.cached_property
    def shapes(self) -> dict[str, list[int]]:
        """Whole shape of every parameter, by name."""
        parameters = self._engine.module.named_parameters()
        return {name: list(getattr(parameter, "ds_shape", parameter.shape)) for name, parameter in parameters}

    @functools.cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """The flat ranges of parameters that this rank writes; over all ranks they cover every parameter once."""
        return tuple(piece for piece, _, _ in self._written())

    @property
    def size_bytes(self) -> int:
        """Size of a checkpoint, over all ranks."""
        return sum(math.prod(shape) for shape in self.shapes.values()) * len(KINDS) * FLOAT32_BYTES

    def _held(self) -> Iterator[tuple[Piece, Tensor, int]]:
        """What this rank holds of each parameter, with the master that it lies in, and its offset there."""
        optimizer = self._engine.optimizer
        masters = self._whole_masters() if self._stage == 0 else {}
        for name, parameter in self._engine.module.named_parameters():
            if self._stage == 0:
                start, stop, master, offset = 0, parameter.numel(), masters[parameter], 0
            elif self._stage == 3:
                group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
                start = size * self._rank  # equal parts, the last ones padded
                stop = min(start + size, parameter.ds_numel)
                master = optimizer.fp32_partitioned_groups_flat[group]
            elif parameter._hp_mapping is None:
                continue
            else:
                mapping = parameter._hp_mapping
                start, offset = mapping.lp_fragment_address.start, mapping.hp_fragment_address.start
                stop = start + mapping.lp_fragment_address.numel
                master = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
            if start < stop:
                yield Piece(name, start, stop), master, offset

    def _written(self) -> Iterator[tuple[Piece, Tensor, int]]:
        """`_held`, but where all ranks hold the same an equal part for each."""
        for piece, master, offset in self._held():
            if self._stage > 0:
                yield piece, master, offset
                continue
            size = -(-piece.stop // self._world_size)
            start, stop = size * self._rank, min(size * (self._rank + 1), piece.stop)
            if start < stop:
                yield Piece(piece.name, start, stop), master, start

    def _parts(self, pieces: Iterable[tuple[Piece, Tensor, int]]) -> Iterator[tuple[str, Piece, Tensor]]:
        """Weight and moments of pieces: kind, piece, and the flat range of the optimizer's own tensor."""
        for piece, master, offset in pieces:
            for kind in KINDS:
                whole = master if kind == "weight" else self._adam.state[master][kind]
                yield kind, piece, whole.detach().view(-1).narrow(0, offset, piece.stop - piece.start)

    def _masters(self) -> list[Tensor]:
        """The fp32 tensors of the optimizer, each with one Adam state."""
        optimizer = self._engine.optimizer
        if self._stage == 0:
            return list(self._whole_masters().values())
        return optimizer.fp32_partitioned_groups_flat if self._stage == 3 else optimizer.single_partition_of_fp32_groups

    def _whole_masters(self) -> dict[Tensor, Tensor]:
        """Parameter -> its master; in fp32 the parameter itself."""
        optimizer = self._engine.optimizer
        low = getattr(optimizer, "fp16_groups", None)
        if low is None:
            return {parameter: parameter for parameter in self._engine.module.parameters()}
        return {p: master for group in zip(low, optimizer.fp32_groups) for p, master in zip(*group)}

    @torch.no_grad()
    def undo_first_update(self) -> None:
        """DeepSpeed's optimizer of stage 0 in bf16 makes its states by an update with gradients of zero, which counts
        as one and decays the weights: takes it back (`FP16_UnfusedOptimizer.initialize_optimizer_states`).
        """
        if self._stage > 0:
            return
        for parameter, master in self._whole_masters().items():
            if master is not parameter:
                master.copy_(parameter)
                for value in self._adam.state[master].values():
                    value.zero_()

    @property
    def _adam(self) -> torch.optim.AdamW:
        """What DeepSpeed's optimizers are wrapped around; it stands alone at stage 0 in fp32."""
        return getattr(self._engine.optimizer, "optimizer", self._engine.optimizer)

    def snapshot(self) -> tuple[dict[str, Tensor], Scalars]:
        """A copy, on the CPU, of this rank's part of the training state, for `shards.write_shard`."""
        states = self._adam.state
        parts = self._parts(self._written())
        tensors = {f"{kind}/{piece.name}": part.to("cpu", copy=True) for kind, piece, part in parts}
        steps = {int(states[master]["step"]) for master in self._masters() if master.numel()}
        assert len(steps) <= 1, f"parts of the optimizer have counted different numbers of updates: {steps}"
        groups, group_of = self._groups()
        scalars = Scalars(
            optimizer_steps=steps.pop() if steps else self._engine.global_steps - self._engine.skipped_steps,
            global_steps=self._engine.global_steps,
            skipped_steps=self._engine.skipped_steps,
            groups=groups,
            group_of=group_of,
        )
        return tensors, scalars

    def load(self, checkpoint: Checkpoint) -> None:
        """Restores weights, Adam moments and counters, written by any number of ranks at any ZeRO stage.

        Every rank reads the slices that it holds now.

        Raises:
            UserError: a file that cannot be read, other parameters, or other settings of a parameter group.
        """
        states = self._adam.state
        reader = ShardReader(checkpoint)
        reader.check_parameters(self.shapes)
        self._check_groups(checkpoint, reader.scalars)
        for master in self._masters():
            moments = {kind: states[master].get(kind, torch.zeros_like(master)) for kind in KINDS[1:]}
            updates = torch.tensor(float(reader.scalars.optimizer_steps), device=master.device)
            states[master] = {"step": updates, **moments}
        reader.read_into(self._parts(self._held()))
        self._engine.global_steps = reader.scalars.global_steps
        self._engine.skipped_steps = reader.scalars.skipped_steps
        self._masters_to_weights()

    @torch.no_grad()
    def _masters_to_weights(self) -> None:
        """Writes the masters into the weights that the model computes with."""
        optimizer = self._engine.optimizer
        if self._stage == 0:
            for parameter, master in self._whole_masters().items():
                parameter.copy_(master)
        elif self._stage == 3:
            optimizer.checkpoint_event_prologue()  # parts again what is whole on every rank
            for flat, low in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_partitioned_groups_flat):
                low.data.copy_(flat.data)
            for flat, parts in zip(optimizer.fp16_partitioned_groups_flat, optimizer.fp16_partitioned_groups):
                for part, values in zip(parts, optimizer.unflatten(flat, parts)):
                    part.data = values.data
            optimizer.checkpoint_event_epilogue()  # makes whole again the small parameters that stay so
        else:
            optimizer.update_lp_params()
            optimizer._lazy_init_hp_params_optimizer_state()

    def _groups(self) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
        """Settings of the parameter groups by name, and the group of each parameter."""
        groups = {group["name"]: _settings(group) for group in self._engine.optimizer.param_groups}
        return groups, self._group_of

    def _check_groups(self, checkpoint: Checkpoint, scalars: Scalars) -> None:
        kept = {name: _settings(group) for name, group in scalars.groups.items()}  # older checkpoints have more
        before = {"groups": kept, "group_of": scalars.group_of}
        groups, group_of = self._groups()
        for key, then, now in differences(before, {"groups": groups, "group_of": group_of}):
            raise UserError(f"checkpoint {checkpoint.path} was written with {key} = {then}, this code has {now}")


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    """Those of a parameter group that are kept, as JSON gives them back."""
    return json.loads(json.dumps({name: group.get(name) for name in GROUP_SETTINGS}))
