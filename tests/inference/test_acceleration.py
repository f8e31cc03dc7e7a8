"""Recorded scales draw what the plain model draws; on a CPU the recorder is a stand-in that runs the function again."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from star_dist.errors import UserError
from star_dist.inference import acceleration, pipeline
from star_dist.inference.cached_model import CachedModel
from star_dist.inference.options import SamplingOptions
from star_dist.inference.pipeline import StarPipeline
from star_dist.model.block_functions import PLAIN, compiled_functions
from star_dist.model.compiling import compiled
from tests.ranks import run_ranks

PROMPTS = ["red heart", "blue flag", "green face"]
GUIDED = SamplingOptions(3.0, top_k=(1, 5, 9, 0))
UNGUIDED = SamplingOptions(0.0)
HALF_GUIDED = SamplingOptions(guidance_by_scale=(0, 2, 0, 0))


class Rerun:
    """Records as a CUDA graph does: it knows memory, not values. What is computed is forgotten until a replay.

    made: how many recorders were asked for.
    """

    def __init__(self) -> None:
        self.made = self.recorded = self.replayed = 0

    def new(self) -> Rerun:
        self.made += 1
        return self

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        function()
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            function()

        return replay


@pytest.fixture
def plain(inference_folder: Path) -> StarPipeline:
    return StarPipeline.from_pretrained(inference_folder)


@pytest.fixture
def recorder() -> Rerun:
    return Rerun()


@pytest.fixture
def recorded(inference_folder: Path, recorder: Rerun) -> StarPipeline:
    recorded = StarPipeline.from_pretrained(inference_folder)
    recorded.record_with(recorder.new)
    return recorded


def assert_same(first: StarPipeline, second: StarPipeline, prompts: list[str], seed: int, options: object) -> None:
    drawn, expected = (p.sample(prompts, seed, options) for p in (first, second))
    assert torch.equal(drawn.tokens_BL, expected.tokens_BL)
    assert torch.equal(drawn.latent_BCHH, expected.latent_BCHH)
    pictures = [[picture.tobytes() for picture in p.decode(drawn.latent_BCHH)] for p in (first, second)]
    assert pictures[0] == pictures[1]


@pytest.mark.parametrize("options", [GUIDED, UNGUIDED, HALF_GUIDED], ids=["guided", "unguided", "half guided"])
def test_recorded_scales_draw_the_same_pictures(
    plain: StarPipeline, recorded: StarPipeline, recorder: Rerun, options: SamplingOptions
) -> None:
    """Batches of 1 and 3, other prompts and other text lengths one after another, from the same memory."""
    for seed, prompts in enumerate([PROMPTS, [PROMPTS[1]], [""], ["red heart blue flag", "", "face"], PROMPTS[:1]]):
        assert_same(recorded, plain, prompts, seed, options)
    row_counts = {GUIDED: 2, UNGUIDED: 2, HALF_GUIDED: 2}[options]
    assert recorder.recorded == (4 + 1) * row_counts  # each scale and the texts, once per batch, whatever the prompts
    assert recorder.replayed == 5 * (4 + 1)


def test_memory_stays_in_place_until_a_larger_batch_comes(
    plain: StarPipeline, recorded: StarPipeline, recorder: Rerun
) -> None:
    assert_same(recorded, plain, PROMPTS, 1, GUIDED)
    cache = recorded.recorded.plain.cache
    addresses = cache.keys.data_ptr(), cache.values.data_ptr(), cache.text_keys.data_ptr()
    for options in (UNGUIDED, GUIDED):
        assert_same(recorded, plain, PROMPTS[:1], 2, options)
    assert recorded.recorded.plain.cache is cache and len(recorded.recorded.recorded) == 3
    assert recorder.made == 1
    assert addresses == (cache.keys.data_ptr(), cache.values.data_ptr(), cache.text_keys.data_ptr())
    assert_same(recorded, plain, PROMPTS + PROMPTS, 3, GUIDED)
    assert recorded.recorded.plain.cache is not cache and list(recorded.recorded.recorded) == [12]
    assert recorder.made == 2  # PyTorch refuses the memory pool of graphs that are all gone


def test_drawing_goes_on_after_memory_was_short(
    plain: StarPipeline, recorded: StarPipeline, recorder: Rerun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the cache did not fit, and where a scale could not be recorded."""

    def fail(*arguments: object, **keywords: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert_same(recorded, plain, PROMPTS[:1], 1, GUIDED)
    for where, name in ((acceleration, "CachedModel"), (Rerun, "__call__"), (acceleration.torch, "empty")):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, fail)
            with pytest.raises(torch.OutOfMemoryError):
                model = recorded.recorded.reserve(12, 8)
                model.set_text(torch.zeros(12, 16), tuple(range(12)), (1,) * 12)
                model.logits(0, torch.zeros(12, 16))
        assert recorded.recorded.plain is None and not recorded.recorded.recorded and not recorded.recorded.texts
        assert_same(recorded, plain, PROMPTS[:1], 1, GUIDED)


def test_graphs_of_the_last_row_counts_alone_are_kept(
    plain: StarPipeline, recorded: StarPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acceleration, "KEPT_ROW_COUNTS", 2)
    for batch in (3, 2, 1, 3):
        assert_same(recorded, plain, PROMPTS[:batch], batch, UNGUIDED)
    assert list(recorded.recorded.recorded) == [1, 3]
    assert set(recorded.recorded.texts) == {1, 3}


def test_in_bf16_and_with_weights_moved(plain: StarPipeline, recorded: StarPipeline, recorder: Rerun) -> None:
    assert_same(recorded, plain, PROMPTS, 1, GUIDED)
    for moved in (plain, recorded):
        moved.to(dtype=torch.bfloat16)
    assert recorded.recorded is None  # on a CPU nothing records unless it is told to
    recorded.record_with(recorder.new)
    assert_same(recorded, plain, PROMPTS, 1, GUIDED)


def test_a_compiler_that_does_not_work_is_a_mistake(plain: StarPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "compiler_problem", lambda device: "no g++")
    with pytest.raises(UserError, match=r"compiler does not work here: no g\+\+; install a C\+\+ compiler"):
        plain.accelerate(compile=True)
    assert plain.model.functions is PLAIN


def test_graphs_are_never_used_where_they_cannot_be(plain: StarPipeline) -> None:
    assert plain.accelerate().recorded is None and plain.accelerate(graphs=False).recorded is None
    with pytest.raises(UserError, match="CUDA graphs need a GPU, the pipeline is on cpu"):
        plain.accelerate(graphs=True)
    with pytest.raises(UserError, match="there is no device cuda:77"):
        plain.to("cuda:77")


def test_what_does_not_change_is_computed_once(plain: StarPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a drawing: the layers' constants once per layer, and texts once per layer, not once per scale."""
    counts = {"attn": 0, "cross": 0, "text": 0}

    def count(kind: str, cls: type, name: str) -> None:
        original = getattr(cls, name)

        def counted(self: object, *arguments: object) -> object:
            counts[kind] += 1
            return original(self, *arguments)

        monkeypatch.setattr(cls, name, counted)

    block = plain.model.blocks[0]
    count("attn", type(block.attn), "constants")
    count("cross", type(block.cross_attn), "constants")
    count("text", type(block.cross_attn), "text_key_value")
    plain.sample(PROMPTS, 1, GUIDED)
    assert counts == {"attn": 2, "cross": 2, "text": 2}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler")
def test_compiled_functions_agree(inference_folder: Path, plain: StarPipeline) -> None:
    """All layers, scales and batches share what is compiled, but for scales of one token."""

    @torch.no_grad()
    def compare() -> tuple[float, list[int], bool]:
        faster = StarPipeline.from_pretrained(inference_folder).accelerate(compile=True)
        torch.manual_seed(0)
        worst, graphs = 0.0, []
        models = [CachedModel(p.model, p.schedule, 7, 8) for p in (plain, faster)]
        for rows in (5, 7):  # no other size in the model: the compiler binds sizes that are equal by chance
            text, inputs = torch.randn(6 * rows, 16), [torch.randn(rows, 16)]
            inputs += [torch.randn(rows, length, 8) for length in plain.schedule.lengths[1:]]
            for model in models:
                model.set_text(text, tuple(range(0, 6 * rows, 6)), (6,) * rows)
            for scale, x in enumerate(inputs):
                one, other = (model.logits(scale, x) for model in models)
                worst = max(worst, (one - other).abs().max().item() / one.abs().max().item())
                graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        moved = faster.to(dtype=torch.bfloat16).model
        return worst, graphs, moved.functions is compiled_functions(dynamic=True)

    # In a process of its own: the compiler starts threads, after which no test could fork.
    ((worst, graphs, still_compiled),) = run_ranks(compare, 1)
    assert still_compiled and plain.model.functions is PLAIN
    assert worst < 1e-5
    assert graphs[-1] <= 10  # texts; the sum, queries and keys of images, queries of texts: of one token and of several
    assert len(set(graphs[2:])) == 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler")
def test_more_kinds_of_inputs_than_pytorch_compiles_by_itself_in_any_thread() -> None:
    def compile_in_a_thread() -> int:
        double = compiled(lambda x: 2 * x, dynamic=False)

        def work() -> None:
            for length in range(1, 13):
                double(torch.ones(length))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    assert run_ranks(compile_in_a_thread, 1) == [12]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: CUDA graphs cannot be recorded")
@pytest.mark.parametrize("compile", [False, True])
def test_cuda_graphs_draw_what_the_plain_path_draws(inference_folder: Path, compile: bool) -> None:
    """In fp32: tokens of both paths; that graphs were used at all is seen in what is kept."""
    graphs = StarPipeline.from_pretrained(inference_folder, "cuda", torch.float32).accelerate(compile=compile)
    plain = StarPipeline.from_pretrained(inference_folder, "cuda", torch.float32).accelerate(graphs=False)
    for options in (GUIDED, UNGUIDED, HALF_GUIDED):
        # The last batch is larger than all before it, so everything is recorded again.
        for seed, prompts in enumerate(
            [PROMPTS, [PROMPTS[1]], ["red heart blue flag", "", "face"], PROMPTS[:1], 2 * PROMPTS]
        ):
            drawn, expected = (pipeline.sample(prompts, seed, options) for pipeline in (graphs, plain))
            assert torch.equal(drawn.tokens_BL, expected.tokens_BL)
    assert graphs.recorded.recorded and plain.recorded is None
    assert graphs("red heart")[0].size == (16, 16)  # pixels in bf16
