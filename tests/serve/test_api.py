"""The API of `star-dist serve`, called over HTTP as scripts call it."""

from __future__ import annotations

import io
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import torch
import uvicorn
from fastapi.testclient import TestClient
from PIL import Image

from star_dist.errors import UserError
from star_dist.inference import memory
from star_dist.inference.options import SamplingOptions
from star_dist.inference.pipeline import StarPipeline
from star_dist.serve import jobs
from star_dist.serve.app import create_app
from star_dist.serve.jobs import Job, Worker
from star_dist.serve.limits import Limits
from star_dist.serve.requests import Drawing
from star_dist.serve.server import LOOPBACK_HOSTS, Server, fitting_limits, serve

LIMITS = Limits(pictures=4, prompt_letters=50, waiting=2, kept=3, body_bytes=2000)
DEADLINE_S = 60


@pytest.fixture(scope="module")
def pipeline(inference_folder: Path) -> StarPipeline:
    return StarPipeline.from_pretrained(inference_folder)


@pytest.fixture
def client(pipeline: StarPipeline) -> Iterator[TestClient]:
    with TestClient(create_app(pipeline, "tiny", LIMITS, LOOPBACK_HOSTS), base_url="http://127.0.0.1:7860") as client:
        yield client


@pytest.fixture
def held(pipeline: StarPipeline, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Drawings wait at their first scale until this is called."""
    gate = threading.Event()
    decode = StarPipeline.decode

    def waiting(self: StarPipeline, latent: object) -> list[Image.Image]:
        assert gate.wait(DEADLINE_S)
        return decode(self, latent)

    monkeypatch.setattr(StarPipeline, "decode", waiting)
    yield gate.set
    gate.set()


def submit(client: TestClient, **body: object) -> dict:
    response = client.post("/api/jobs", json={"prompts": ["red heart"]} | body)
    assert response.status_code == 202, response.text
    return response.json()


def wait(client: TestClient, job: dict, *states: str) -> dict:
    deadline = time.monotonic() + DEADLINE_S
    while (found := client.get(f"/api/jobs/{job['id']}").json())["state"] not in (states or ("done",)):
        assert time.monotonic() < deadline and found["state"] != "failed", found
        time.sleep(0.01)
    return found


def picture(client: TestClient, path: str, kind: str = "png") -> Image.Image:
    response = client.get(path)
    assert response.status_code == 200 and response.headers["content-type"] == f"image/{kind}"
    return Image.open(io.BytesIO(response.content)).convert("RGB")


def test_a_batch_draws_what_the_pipeline_draws(client: TestClient, pipeline: StarPipeline) -> None:
    prompts = ["red heart", "blue flag"]
    job = wait(client, submit(client, prompts=prompts, seed=[3, 9], guidance=2.0, top_k=[1, 5, 5, 0], temperature=0.9))
    expected = pipeline(prompts, [3, 9], SamplingOptions(2.0, top_k=(1, 5, 5, 0), temperature=0.9))
    assert [picture(client, path).tobytes() for path in job["pictures"]] == [drawn.tobytes() for drawn in expected]
    last = picture(client, f"/api/jobs/{job['id']}/scales/3/1")
    first = picture(client, f"/api/jobs/{job['id']}/scales/0/1", "jpeg")
    assert last.tobytes() == expected[1].tobytes() != first.tobytes()


def test_seeds_count_up_or_are_drawn(client: TestClient) -> None:
    assert submit(client, count=3, seed=7)["seeds"] == [7, 8, 9]
    assert submit(client)["seeds"] != submit(client)["seeds"]


def test_events_tell_every_scale(client: TestClient) -> None:
    job = submit(client, count=2)
    states = []
    with client.stream("GET", f"/api/jobs/{job['id']}/events") as response:
        for line in response.iter_lines():
            if line.startswith("data: "):
                states.append(json.loads(line.removeprefix("data: ")))
    assert states[-1]["state"] == "done" and states[-1]["scales_done"] == 4 and len(states[-1]["pictures"]) == 2
    done = [state["scales_done"] for state in states]
    assert done == sorted(done)


def test_model_tells_what_can_be_asked(client: TestClient) -> None:
    found = client.get("/api/model").json()
    assert found["resolution"] == 16 and found["scales"] == [1, 2, 3, 4] and found["max_pictures"] == 4


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"prompts": []}, "there is no prompt"),
        ({"prompts": ["  "]}, "the prompt is empty"),
        ({"prompts": ["x" * 51]}, "a prompt has 51 letters, the limit is 50"),
        ({"prompts": ["red " * 7]}, "a prompt has 9 tokens, the model takes 8"),
        ({"count": 5}, "5 pictures were asked for, the limit is 4"),
        ({"prompts": ["a", "b", "c"], "count": 2}, "6 pictures were asked for, the limit is 4"),
        ({"count": 0}, "the number of pictures must be at least 1, got 0"),
        ({"seed": -1}, "a seed must lie in 0.."),
        ({"seed": [1, 2]}, "1 pictures were asked for with 2 seeds"),
        ({"top_k": [1, 2]}, "top_k has 2 values, the model has 4 scales"),
        ({"top_p": 2.0}, "top_p must lie in 0..1, got 2"),
        ({"guidance": "high"}, "guidance: Input should be a valid number"),
        ({"gidance": 1.0}, "gidance: Extra inputs are not permitted"),
        ({"prompts": "red heart"}, "prompts: Input should be a valid list"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_mistakes_are_one_sentence(client: TestClient, body: dict, said: str) -> None:
    response = client.post("/api/jobs", json={"prompts": ["red heart"]} | body)
    assert response.status_code == 422 and said in response.json()["error"]


def test_requests_from_elsewhere_are_refused(client: TestClient) -> None:
    for host in ("evil.example", "127.0.0.1.evil.example:7860", "[::1", ""):
        refused = client.get("/api/model", headers={"Host": host})
        assert refused.status_code == 400 and f"for host {host!r}; open the address" in refused.json()["error"]
    for host in ("localhost:7860", "LOCALHOST", "[::1]:7860"):
        assert client.get("/api/model", headers={"Host": host}).status_code == 200
    for origin in (
        "https://evil.example",
        "http://127.0.0.1.evil.example",
        "http://127.0.0.1@evil.example",
        "null",
        "",
    ):
        refused = client.post("/api/jobs", json={"prompts": ["x"]}, headers={"Origin": origin})
        assert refused.status_code == 403 and f"a page at {origin!r}; open the address" in refused.json()["error"]
    for origin in ("http://127.0.0.1:7860", "http://localhost", "https://LOCALHOST:443", "http://[::1]:7860"):
        assert client.get("/api/model", headers={"Origin": origin}).status_code == 200
    untyped = client.post("/api/jobs", content='{"prompts": ["x"]}')
    assert untyped.status_code == 422  # what a script of a foreign page could send; since FastAPI 0.132
    method = client.put("/api/model")
    assert method.status_code == 405 and method.json()["error"]
    plain = client.post("/api/jobs", content='{"prompts": ["x"]}', headers={"Content-Type": "text/plain"})
    assert plain.status_code == 422  # what a form of a foreign page could send
    large = client.post("/api/jobs", json={"prompts": ["x" * 3000]})
    assert large.status_code == 413 and "limit of 2000 bytes" in large.json()["error"]
    chunks = client.post(
        "/api/jobs", content=(b"x" * 500 for _ in range(9)), headers={"Content-Type": "application/json"}
    )
    assert chunks.status_code == 413
    quotes = client.post("/api/jobs", content=b"{'prompts'", headers={"Content-Type": "application/json"})
    assert quotes.status_code == 422
    assert quotes.json()["error"] == (
        "the request is no JSON: Expecting property name enclosed in double quotes at letter 2"
    )
    for path in ("/api/jobs/none", "/api/jobs/none/events", "/api/jobs/none/pictures/0.png", "/nothing"):
        response = client.get(path)
        assert response.status_code == 404 and response.json()["error"]


def test_the_printed_address_is_answered(
    pipeline: StarPipeline, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def answered(server: uvicorn.Server, sockets: list) -> None:
        sockets[0].close()
        address = re.search(r"http://\S+", capsys.readouterr().out)[0]
        with TestClient(server.config.app, base_url=address) as client:
            assert client.get("/api/model").status_code == 200, address
            assert client.get("/api/model", headers={"Host": "127.0.0.3"}).status_code == 400

    monkeypatch.setattr(uvicorn.Server, "run", answered)
    for host in ("127.0.0.1", "127.0.0.2"):
        serve(lambda: pipeline, host, 0, LIMITS, loopback=True)


@pytest.mark.parametrize("host", ["127..0.1", "a" * 70, "192.0.2.1"])
def test_a_host_that_is_no_address_of_this_machine_is_refused(host: str) -> None:
    def load() -> StarPipeline:
        raise AssertionError("the model was loaded first")

    with pytest.raises(UserError, match=f"cannot listen on {re.escape(host)} port 0: .*; change --host or --port"):
        serve(load, host, 0, LIMITS, loopback=False)


def test_queue_is_bounded_and_drawings_can_be_cancelled(client: TestClient, held: Callable[[], None]) -> None:
    running = submit(client)
    wait(client, running, "drawing")
    waiting = [submit(client) for _ in range(2)]
    assert waiting[1]["waiting_before"] == 2
    full = client.post("/api/jobs", json={"prompts": ["red heart"]})
    assert full.status_code == 503 and "2 jobs are waiting, which is the limit" in full.json()["error"]
    cancelled = client.delete(f"/api/jobs/{waiting[0]['id']}")
    assert cancelled.status_code == 202 and cancelled.json()["state"] == "cancelled"  # at once, and it makes room
    assert client.get(f"/api/jobs/{waiting[1]['id']}").json()["waiting_before"] == 1
    third = submit(client)
    assert client.delete(f"/api/jobs/{running['id']}").json()["state"] == "drawing"
    held()
    assert wait(client, running, "cancelled")["scales_done"] < 4
    assert wait(client, waiting[1])["scales_done"] == wait(client, third)["scales_done"] == 4
    assert wait(client, waiting[0], "cancelled")["scales_done"] == 0


def test_old_drawings_are_dropped(client: TestClient) -> None:
    drawn = [wait(client, submit(client)) for _ in range(5)]
    known = [client.get(f"/api/jobs/{job['id']}").status_code for job in drawn]
    assert known == [404, 200, 200, 200, 200]  # the newest, and the three that were finished before it came


@pytest.mark.parametrize(("most", "side"), [(256, 8), (4, 4)])  # the model draws 16 pixels
def test_previews_are_small_and_kept_pictures_bounded_in_bytes(
    pipeline: StarPipeline, most: int, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "PREVIEW_SIDE", most)
    worker = Worker(pipeline, Limits(kept=100, kept_bytes=4000))
    worker.start()
    drawings = [worker.submit(Drawing(("red heart",), (seed,), SamplingOptions())) for seed in range(9)]
    deadline = time.monotonic() + DEADLINE_S
    while drawings[-1].state != "done":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    worker.stop()
    last = drawings[-1]
    sizes = [Image.open(io.BytesIO(files[0])).size for files in last.previews]
    assert sizes == [(side, side)] * 3 + [(16, 16)]
    kept = [job for job in drawings if job.id in worker.jobs]
    assert kept == drawings[-len(kept) :] and 1 <= len(kept) < 9
    assert sum(job.num_bytes for job in kept) <= 4000 or len(kept) == 1


def test_pictures_can_be_fetched_though_others_wait_and_memory_is_short(
    pipeline: StarPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    permits = threading.Semaphore(len(pipeline.schedule))  # one a scale, so for the first drawing alone
    decode = StarPipeline.decode

    def waiting(self: StarPipeline, latent: object) -> list[Image.Image]:
        assert permits.acquire(timeout=DEADLINE_S)
        return decode(self, latent)

    def until(job: Job, state: str) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while job.state != state:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    monkeypatch.setattr(StarPipeline, "decode", waiting)
    worker = Worker(pipeline, Limits(kept=1, kept_bytes=1))
    worker.start()
    first, second, cancelled = (worker.submit(Drawing(("red heart",), (i,), SamplingOptions())) for i in range(3))
    worker.cancel(cancelled)  # it has no pictures, and costs nobody theirs
    until(second, "drawing")
    assert worker.find(first.id).state == "done"
    permits.release(len(pipeline.schedule))
    until(second, "done")
    worker.stop()
    assert list(worker.jobs) == [second.id]


def test_streams_end_at_once_with_the_server(pipeline: StarPipeline, held: Callable[[], None]) -> None:
    """uvicorn would wait for them, then cut them off and print where that was."""
    listener = socket.create_server(("127.0.0.1", 0))
    address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    app = create_app(pipeline, "tiny", LIMITS, LOOPBACK_HOSTS)
    server = Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=DEADLINE_S))
    running = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    running.start()
    try:
        with httpx.Client(base_url=address, timeout=DEADLINE_S) as client:
            drawing, waiting = (
                client.post("/api/jobs", json={"prompts": ["red heart"]}).json()["id"] for _ in range(2)
            )
            with (
                client.stream("GET", f"/api/jobs/{drawing}/events") as first,
                client.stream("GET", f"/api/jobs/{waiting}/events") as second,
            ):
                streams = [response.iter_lines() for response in (first, second)]
                for lines in streams:
                    next(lines)
                began = time.monotonic()
                server.should_exit = True
                of_drawing, of_waiting = ("".join(lines) for lines in streams)
                assert time.monotonic() - began < DEADLINE_S / 2
        assert '"cancelled"' in of_waiting and '"cancelled"' not in of_drawing  # its scale is still being drawn
    finally:
        held()
        server.should_exit = True
        running.join(DEADLINE_S)
    assert not running.is_alive()


def test_no_more_pictures_than_fit_the_memory(pipeline: StarPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    one = memory.drawing_bytes(pipeline)
    cache = 2 * 2 * 32 * (30 + 8) * 4  # keys and values, 2 layers of width 32, 30 + 8 tokens, float32
    assert one > 2 * cache
    monkeypatch.setattr(memory, "free_bytes", lambda device: 4 * one)
    assert fitting_limits(pipeline, Limits(pictures=16)).pictures == 3
    assert fitting_limits(pipeline, Limits(pictures=2)).pictures == 2
    monkeypatch.setattr(memory, "free_bytes", lambda device: one)
    with pytest.raises(UserError, match=r"one picture takes about 0\.\d+ GB to draw, .* free on cpu"):
        fitting_limits(pipeline, Limits())


@pytest.mark.parametrize(
    ("own", "folder", "names"),
    [
        ("0::/pods/one", "pods/one", ("memory.max", "memory.current", "inactive_file")),
        ("0::/pods/one", "pods", ("memory.max", "memory.current", "inactive_file")),  # the limit of a parent
        ("0::/../of/the/host", "", ("memory.max", "memory.current", "inactive_file")),  # what a container sees
        (
            "4:cpu,cpuacct:/x\n3:memory:/slurm/job\n0::/",
            "memory/slurm/job",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ),
    ],
)
def test_free_memory_is_what_a_container_may_take(
    own: str, folder: str, names: tuple[str, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu, limit, usage, reclaimable = torch.device("cpu"), *names
    (tmp_path / "own").write_text(own + "\n")
    group = tmp_path / "tree" / folder
    group.mkdir(parents=True)
    (tmp_path / "tree" / "pods" / "one").mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(memory, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "tree")
    whole = psutil.virtual_memory().total
    assert memory.free_bytes(cpu) > 10**7  # no limit anywhere
    (group / limit).write_text("9000\n")
    (group / usage).write_text("5000\n")
    (group / "memory.stat").write_text(f"anon 1\n{reclaimable} 300\n")
    assert memory.free_bytes(cpu) == 4300
    (group / limit).write_text("max\n" if limit == "memory.max" else f"{2**63 - 4096}\n")
    assert 10**7 < memory.free_bytes(cpu) < whole


def test_a_drawing_that_fails_says_so_and_the_next_is_drawn(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(StarPipeline, "sample", fail)
        job = submit(client)
        deadline = time.monotonic() + DEADLINE_S
        while (state := client.get(f"/api/jobs/{job['id']}").json())["state"] != "failed":
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert state["error"] == "drawing failed: MemoryError; the server's log has the details"
    wait(client, submit(client))
