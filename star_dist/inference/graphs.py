"""Functions of fixed shapes recorded once as CUDA graphs: replaying one launches all of its kernels at once.

https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

WARMUP_RUNS = 2  # libraries choose their kernels and allocate their workspaces in the first

Recorder = Callable[[Callable[[], None]], Callable[[], None]]
"""Takes a function that works on fixed memory alone; returns what does the same work again when it is called."""


class CudaGraphRecorder:
    """Records on one GPU. What the graphs compute in passing shares one memory pool: they may run one after another
    alone, which those of one stream do, and nothing of it may be read after a replay.

    The pool goes with the last of its graphs, and PyTorch refuses to record into a pool that is gone: once they are
    all dropped, make a new recorder.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        with torch.cuda.device(self.device):
            side_stream = torch.cuda.Stream()
            side_stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side_stream):
                for _ in range(WARMUP_RUNS):
                    function()
            torch.cuda.current_stream().wait_stream(side_stream)
            graph = torch.cuda.CUDAGraph()
            # PyTorch's own stream for this is made once, on the first GPU that records. thread_local: other threads, as
            # those of a server, may use the GPU meanwhile.
            with torch.cuda.graph(graph, self.pool, side_stream, capture_error_mode="thread_local"):
                function()
        return graph.replay


class RecordedFunction:
    """A function of one tensor whose input and output have one place for good.

    inputs, outputs: that memory; another recorded function may use the outputs' as well, as long as each result is
    read before the next replay.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], inputs: Tensor, outputs: Tensor, record: Recorder) -> None:
        self.inputs, self.outputs = inputs, outputs
        self._replay = record(lambda: outputs.copy_(function(inputs)))

    def replay(self, inputs: Tensor) -> Tensor:
        """The function's result for inputs of the recorded shape; it holds until the next replay."""
        self.inputs.copy_(inputs)
        self._replay()
        return self.outputs
