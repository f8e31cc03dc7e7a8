"""Drawing with recorded graphs of every scale and of the texts, one for each number of rows, kept for later drawings.

R rows, N tokens of one scale, V codebook size.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from star_dist.inference.cached_model import CachedModel, ScaleLogits
from star_dist.inference.graphs import RecordedFunction, Recorder
from star_dist.model.star import STAR
from star_dist.scales import ScaleSchedule

# With guidance a batch has graphs of two numbers of rows where the last scales are not guided.
KEPT_ROW_COUNTS = 4


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
        self.texts: dict[int, tuple[Tensor, Callable[[], None]]] = {}
        self._forget()

    def _forget(self) -> None:
        """Gives all memory back."""
        self.recorded.clear()
        self.texts.clear()
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
        plain, rows = self.plain, len(lengths)
        hidden_RSW = plain.cache.lay_out_text(hidden_SW.to(plain.device, plain.dtype), starts, lengths)
        if rows not in self.texts:
            # All that fits: of what lies beyond a row's own text the keys are masked.
            kept = hidden_RSW.new_zeros(rows, plain.cache.text_tokens, hidden_RSW.shape[-1])
            with self._whole_or_forgotten():
                self.texts[rows] = kept, self.record(lambda: plain.cache.write_text(kept))
        kept, replay = self.texts[rows]
        kept[:, : hidden_RSW.shape[1]] = hidden_RSW
        replay()

    def logits(self, scale: int, inputs: Tensor) -> Tensor:
        rows = len(inputs)
        of_rows = self.recorded.setdefault(rows, {})
        self.recorded.move_to_end(rows)
        while len(self.recorded) > KEPT_ROW_COUNTS:
            dropped, _ = self.recorded.popitem(last=False)
            self.texts.pop(dropped, None)
        if scale not in of_rows:
            with self._whole_or_forgotten():
                of_rows[scale] = self._recorded(scale, inputs)
        return of_rows[scale].replay(inputs)

    @contextmanager
    def _whole_or_forgotten(self) -> Iterator[None]:
        """Where a recording breaks, most likely for memory, nothing is recorded into what it has left."""
        try:
            yield
        except BaseException:
            self._forget()
            raise

    def _recorded(self, scale: int, inputs: Tensor) -> RecordedFunction:
        plain, rows, tokens = self.plain, len(inputs), self.schedule.lengths[scale]
        kept_inputs = inputs.to(plain.device, plain.dtype, copy=True)
        shape = rows, tokens, self.model.config.vocab_size
        kept_logits = self.logits_memory[: rows * tokens * shape[-1]].view(shape)
        return RecordedFunction(lambda x: plain.logits(scale, x), kept_inputs, kept_logits, self.record)
