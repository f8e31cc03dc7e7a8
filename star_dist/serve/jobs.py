"""One worker that draws job after job, a bounded queue before it, and the last finished jobs' pictures in memory.

Previews are thumbnails, of at most half the picture's side: the latent is averaged before it is decoded, so that the
drawing waits little for them. The pictures themselves are decoded in full.
"""

from __future__ import annotations

import io
import logging
import secrets
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, Literal

from PIL import Image

from star_dist.errors import UserError
from star_dist.inference.pipeline import StarPipeline
from star_dist.inference.sampler import SampledScale
from star_dist.serve.limits import Limits
from star_dist.serve.requests import Drawing
from star_dist.tokenizer.quantizer import shrink

logger = logging.getLogger(__name__)

State = Literal["waiting", "drawing", "done", "failed", "cancelled"]
PREVIEW_SIDE = 256  # of previews at most, in pixels
FINISHED = ("done", "failed", "cancelled")


class QueueFull(UserError):
    """There is no room for another job now."""


class Cancelled(Exception):
    """Ends a drawing between two scales."""


@dataclass
class Job:
    """previews: files of every picture, scale by scale: small JPEGs, and of the last scale PNGs, the pictures."""

    drawing: Drawing
    num_scales: int
    id: str = field(default_factory=lambda: secrets.token_urlsafe(12))
    state: State = "waiting"
    error: str | None = None
    previews: list[list[bytes]] = field(default_factory=list)
    cancel: threading.Event = field(default_factory=threading.Event)

    @property
    def num_bytes(self) -> int:
        """Memory of its pictures."""
        return sum(len(file) for files in self.previews for file in files)

    def describe(self) -> dict[str, Any]:
        """The job as the API shows it. scales_done: for how many scales there are previews."""
        return {
            "id": self.id,
            "state": self.state,
            "error": self.error,
            "prompts": self.drawing.prompts,
            "seeds": self.drawing.seeds,
            "num_scales": self.num_scales,
            "scales_done": len(self.previews),
            "pictures": [f"api/jobs/{self.id}/pictures/{i}.png" for i in range(len(self.drawing.prompts))]
            if self.state == "done"
            else [],
        }


class Worker:
    """Draws jobs in their order of arrival on a thread of its own."""

    def __init__(self, pipeline: StarPipeline, limits: Limits) -> None:
        self.pipeline = pipeline
        self.limits = limits
        # Decoding averages of the latent's cells gives a small picture at a small part of the cost. Half the side at
        # most, else every scale of a model of small pictures would cost as much as the picture itself.
        cells = PREVIEW_SIDE // pipeline.tokenizer.config.downsampling
        self.preview_cells = max(1, min(cells, pipeline.schedule.latent_side // 2))
        self.jobs: OrderedDict[str, Job] = OrderedDict()  # in their order of arrival
        self.changed = threading.Condition()  # held where jobs come and go, and where one begins or is cancelled
        self.stopping = False
        self.thread = threading.Thread(target=self._run, name="drawing", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def end(self) -> None:
        """Cancels every job; none is drawn any more."""
        with self.changed:
            self.stopping = True
            for job in self.jobs.values():
                self.cancel(job)
            self.changed.notify()

    def stop(self) -> None:
        """Ends, and waits for the scale that is being drawn."""
        self.end()
        self.thread.join()

    def submit(self, drawing: Drawing) -> Job:
        """Queues a job.

        Raises:
            QueueFull: as many jobs wait as may.
        """
        job = Job(drawing, len(self.pipeline.schedule))
        with self.changed:
            if sum(other.state == "waiting" for other in self.jobs.values()) >= self.limits.waiting:
                raise QueueFull(f"{self.limits.waiting} jobs are waiting, which is the limit; try again in a moment")
            self.jobs[job.id] = job
            self._drop_old()
            self.changed.notify()
        return job

    def cancel(self, job: Job) -> None:
        """Ends a job: at once if it waits, after the running scale if it is drawn."""
        with self.changed:
            job.cancel.set()
            if job.state == "waiting":
                job.state = "cancelled"

    def _drop_old(self) -> None:
        """Drops the oldest finished jobs beyond either limit; call it with `changed` held.

        Never the one that was drawn last: whoever asked for it has had no time to fetch its pictures.
        """
        finished = [job for job in self.jobs.values() if job.state in FINISHED]
        last_drawn = next((job for job in reversed(finished) if job.state == "done"), None)
        old = [job for job in finished if job is not last_drawn]
        held = sum(job.num_bytes for job in self.jobs.values())
        for i, job in enumerate(old):
            if len(old) - i <= self.limits.kept and held <= self.limits.kept_bytes:
                return
            held -= job.num_bytes
            del self.jobs[job.id]

    def find(self, job_id: str) -> Job:
        """A job by its id.

        Raises:
            KeyError: there is none, or it was dropped as too old.
        """
        with self.changed:
            return self.jobs[job_id]

    def position(self, job: Job) -> int:
        """How many jobs are drawn before this one."""
        with self.changed:
            unfinished = [other for other in self.jobs.values() if other.state not in FINISHED]
        return unfinished.index(job) if job in unfinished else 0

    def _run(self) -> None:
        while (job := self._next()) is not None:
            self._work(job)
            with self.changed:
                self._drop_old()

    def _next(self) -> Job | None:
        """Waits for the oldest waiting job, which is drawn from now on; None when the worker ends."""
        with self.changed:
            while not self.stopping:
                for job in self.jobs.values():
                    if job.state == "waiting":
                        job.state = "drawing"
                        return job
                self.changed.wait()
        return None

    def _work(self, job: Job) -> None:
        """Draws a job and says in it how that ended."""
        try:
            self._draw(job)
            job.state = "done"
        except Cancelled:
            job.state = "cancelled"
        except UserError as error:
            job.error, job.state = str(error), "failed"
        except Exception as error:
            # Whatever it is (most likely memory), the page must say so and the next job must be drawn.
            logger.exception("job %s failed", job.id)
            job.error = f"drawing failed: {type(error).__name__}; the server's log has the details"
            job.state = "failed"

    def _draw(self, job: Job) -> None:
        def keep(drawn: SampledScale) -> None:
            if job.cancel.is_set():
                raise Cancelled
            last = drawn.scale + 1 == drawn.num_scales
            latent_BCHH = drawn.latent_BCHH if last else shrink(drawn.latent_BCHH, self.preview_cells)
            pictures = self.pipeline.decode(latent_BCHH)
            job.previews.append([_file(picture, "PNG" if last else "JPEG") for picture in pictures])

        drawing = job.drawing
        self.pipeline.sample(drawing.prompts, drawing.seeds, drawing.options, on_scale=keep)


def media_type(file: bytes) -> str:
    """Of a job's picture or preview."""
    return "image/png" if file.startswith(b"\x89PNG") else "image/jpeg"


def _file(picture: Image.Image, kind: Literal["PNG", "JPEG"]) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()
