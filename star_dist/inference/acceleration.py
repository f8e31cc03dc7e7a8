"""Drawing with recorded graphs, one for each scale and number of rows, kept from one drawing to the next; compilation.

R rows, N tokens of one scale, V codebook size.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor

from star_dist.inference.cached_model import CachedModel, ScaleLogits
from star_dist.inference.graphs import RecordedFunction, Recorder
from star_dist.model.star import STAR
from star_dist.scales import ScaleSchedule

# With guidance a batch has graphs of two numbers of rows where the last scales are not guided.
KEPT_ROW_COUNTS = 4


def compile_blocks(model: STAR, schedule: ScaleSchedule) -> None:
    """torch.compile of every block for this process's lifetime: once per scale and number of rows, all layers share it.

    Fuses the norms, rotations, GELU and sums between the matrix products.
    """
    import torch._dynamo  # PyTorch's compiler, which takes seconds to import

    # Beyond PyTorch's own limit of 8 shapes it would run the rest operation by operation.
    shapes = KEPT_ROW_COUNTS * len(schedule)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 2 * shapes)
    for block in model.blocks:
        block.compile(dynamic=False)


class RecordedModel:
    """A model's scales as recorded functions around one cache.

    The cache holds the largest drawing so far and serves smaller ones; a larger one takes its place, and all graphs
    are recorded again, by a new recorder. Graphs of the `KEPT_ROW_COUNTS` numbers of rows that were used last are kept.
    """

    def __init__(
        self, model: STAR, schedule: ScaleSchedule, text_tokens: int, new_recorder: Callable[[], Recorder]
    ) -> None:
        self.model, self.schedule, self.new_recorder = model, schedule, new_recorder
        self.text_tokens = text_tokens
        self.recorded: OrderedDict[int, dict[int, RecordedFunction]] = OrderedDict()
        self._forget()

    def _forget(self) -> None:
        """Gives all memory back."""
        self.recorded.clear()
        self.record: Recorder | None = None
        self.plain: CachedModel | None = None
        self.logits_memory: Tensor | None = None

    def reserve(self, rows: int, text_tokens: int) -> ScaleLogits:
        """Makes room for a drawing; call it before each."""
        held = self.plain.cache if self.plain else None
        if held is None or held.max_rows < rows or held.text_tokens < text_tokens:
            if held is not None:
                rows, text_tokens = max(rows, held.max_rows), max(text_tokens, held.text_tokens)
            # The old memory goes before the new is taken: together they may not fit.
            held = None
            self._forget()
            # One for all scales: each scale's logits are drawn from before the next are computed.
            largest = rows * max(self.schedule.lengths) * self.model.config.vocab_size
            self.logits_memory = torch.empty(largest, device=self.model.word_embed.weight.device)
            self.record = self.new_recorder()
            # Last, because it says that there is room: the memory may be too short for any of these.
            self.plain = CachedModel(self.model, self.schedule, rows, max(text_tokens, self.text_tokens))
        return self

    def set_text(self, hidden_SW: Tensor, starts: tuple[int, ...], lengths: tuple[int, ...]) -> None:
        self.plain.set_text(hidden_SW, starts, lengths)

    def logits(self, scale: int, inputs: Tensor) -> Tensor:
        rows = len(inputs)
        of_rows = self.recorded.setdefault(rows, {})
        self.recorded.move_to_end(rows)
        while len(self.recorded) > KEPT_ROW_COUNTS:
            self.recorded.popitem(last=False)
        if scale not in of_rows:
            try:
                of_rows[scale] = self._recorded(scale, inputs)
            except BaseException:  # most likely memory: nothing is recorded into what a broken recording has left
                self._forget()
                raise
        return of_rows[scale].replay(inputs)

    def _recorded(self, scale: int, inputs: Tensor) -> RecordedFunction:
        plain, rows, tokens = self.plain, len(inputs), self.schedule.lengths[scale]
        kept_inputs = inputs.to(plain.device, plain.dtype, copy=True)
        shape = rows, tokens, self.model.config.vocab_size
        kept_logits = self.logits_memory[: rows * tokens * shape[-1]].view(shape)
        return RecordedFunction(lambda x: plain.logits(scale, x), kept_inputs, kept_logits, self.record)
