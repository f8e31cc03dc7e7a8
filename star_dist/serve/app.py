"""The web application: one page, and the API that the page and scripts use.

    GET    /                                 the page
    GET    /api/model                        what the model draws, and the limits
    POST   /api/jobs                         requests.DrawRequest -> 202 and the job; 422 what is wrong; 503 queue full
    GET    /api/jobs/ID                      the job's state
    GET    /api/jobs/ID/events               its states as server-sent events, until it is finished
    GET    /api/jobs/ID/scales/K/I           picture I after scale K: a small JPEG, of the last scale the PNG itself
    GET    /api/jobs/ID/pictures/I.png       picture I
    DELETE /api/jobs/ID                      cancels it

Every error is {"error": "one sentence"}: 400 a host that is not this server's, 403 a page of another host, 404 no such
path, drawing or picture, 405 another method, 413 a request that is too large, 422 and 503 as above. (Beyond its limit
of connections uvicorn answers 503 by itself, in plain text.)
"""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from star_dist.errors import UserError
from star_dist.inference.pipeline import StarPipeline
from star_dist.serve.jobs import FINISHED, Job, QueueFull, Worker, media_type
from star_dist.serve.limits import Limits
from star_dist.serve.requests import DrawRequest, check_request
from star_dist.text import check_fit

PAGE = Path(__file__).with_name("page.html")
EVENT_INTERVAL_S = 0.05
# Everything comes from this server, so that a prompt that looks like HTML could load nothing.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "img-src 'self' data: blob:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}
PICTURE_HEADERS = {"Cache-Control": "private, max-age=86400", "X-Content-Type-Options": "nosniff"}


def create_app(pipeline: StarPipeline, name: str, limits: Limits, hosts: list[str] | None) -> FastAPI:
    """The application around a loaded model.

    Its worker is `app.state.worker`. name: shown on the page. hosts: names and addresses that requests may be sent to,
    and by whose pages alone, against pages elsewhere, also those that point their own name at this machine; None allows
    any.
    """
    worker = Worker(pipeline, limits)
    tokenizer = copy.deepcopy(pipeline.text_encoder.tokenizer)  # the drawing thread's own may not be used from here

    @asynccontextmanager
    async def run_worker(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        await asyncio.to_thread(worker.stop)

    app = FastAPI(title=name, lifespan=run_worker, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.worker = worker
    app.add_middleware(BodyLimit, limit=limits.body_bytes)
    if hosts is not None:
        app.add_middleware(HostCheck, hosts=hosts)

    for kind, handler in ERROR_HANDLERS.items():
        app.add_exception_handler(kind, handler)

    def find(job_id: str) -> Job:
        try:
            return worker.find(job_id)
        except KeyError:
            raise HTTPException(404, "there is no such drawing, or it is too old and was dropped") from None

    def describe(job: Job) -> dict[str, Any]:
        return job.describe() | {"waiting_before": worker.position(job)}

    @app.get("/")
    async def page() -> HTMLResponse:
        return HTMLResponse(PAGE.read_text(), headers=PAGE_HEADERS)

    @app.get("/api/model")
    async def model() -> dict[str, Any]:
        return {
            "name": name,
            "resolution": pipeline.resolution,
            "scales": pipeline.schedule.sides,
            "vocab_size": pipeline.model.config.vocab_size,
            "step": pipeline.origin.step if pipeline.origin else 0,
            "max_pictures": limits.pictures,
            "max_prompt_letters": limits.prompt_letters,
        }

    @app.post("/api/jobs", status_code=202)
    async def submit(request: DrawRequest) -> dict[str, Any]:
        drawing = check_request(request, limits, len(pipeline.schedule))
        check_fit(tokenizer, request.prompts, pipeline.text_encoder.config.max_tokens)
        return describe(worker.submit(drawing))

    @app.get("/api/jobs/{job_id}")
    async def state(job_id: str) -> dict[str, Any]:
        return describe(find(job_id))

    @app.get("/api/jobs/{job_id}/events")
    async def events(job_id: str) -> StreamingResponse:
        states = _events(find(job_id), describe, worker)
        return StreamingResponse(states, media_type="text/event-stream", headers=PAGE_HEADERS)

    @app.get("/api/jobs/{job_id}/scales/{scale}/{picture}")
    async def preview(job_id: str, scale: int, picture: int) -> Response:
        previews = find(job_id).previews
        if not (0 <= scale < len(previews) and 0 <= picture < len(previews[scale])):
            raise HTTPException(404, "that picture is not drawn yet")
        file = previews[scale][picture]
        return Response(file, media_type=media_type(file), headers=PICTURE_HEADERS)

    @app.get("/api/jobs/{job_id}/pictures/{picture}.png")
    async def finished(job_id: str, picture: int) -> Response:
        return await preview(job_id, find(job_id).num_scales - 1, picture)

    @app.delete("/api/jobs/{job_id}", status_code=202)
    async def cancel(job_id: str) -> dict[str, Any]:
        job = find(job_id)
        worker.cancel(job)
        return describe(job)

    return app


async def _events(job: Job, describe: Callable[[Job], dict[str, Any]], worker: Worker) -> AsyncIterator[str]:
    """The job's description whenever it changes, until it is finished or the worker ends."""
    last = None
    while True:
        finished = job.state in FINISHED or worker.stopping  # before describing: what is finished changes no more
        description = describe(job)
        if description != last:
            yield f"data: {json.dumps(description)}\n\n"
            last = description
        if finished:
            return
        await asyncio.sleep(EVENT_INTERVAL_S)


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": message}, status)


async def _user_error(request: Request, error: UserError) -> JSONResponse:
    return _error(503 if isinstance(error, QueueFull) else 422, str(error))


async def _invalid_request(request: Request, error: RequestValidationError) -> JSONResponse:
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return _error(422, f"the request is no JSON: {first['ctx']['error']} at letter {first['loc'][-1] + 1}")
    where = ".".join(str(part) for part in first["loc"] if part != "body")
    return _error(422, f"{where}: {first['msg']}" if where else first["msg"])


async def _http_error(request: Request, error: HTTPException) -> JSONResponse:
    return _error(error.status_code, str(error.detail))


ERROR_HANDLERS = {UserError: _user_error, RequestValidationError: _invalid_request, HTTPException: _http_error}


class HostCheck:
    """Refuses requests that are sent to another name than the given ones, or by a page of another.

    hosts: without port and brackets. Browsers say in Origin which page a request is of, "null" where they keep it for
    themselves; scripts say nothing. Scheme and port may be those of a proxy, so names alone are compared.
    """

    def __init__(self, app: ASGIApp, hosts: Sequence[str]) -> None:
        self.app = app
        self.hosts = {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            sent_to, page = headers.get("host", ""), headers.get("origin")
            refusal = None
            if not self._knows(f"//{sent_to}"):
                refusal = _error(400, f"the request is for host {sent_to!r}; open the address that the server printed")
            elif page is not None and not self._knows(page):
                refusal = _error(403, f"the request is of a page at {page!r}; open the address that the server printed")
            if refusal is not None:
                return await refusal(scope, receive, send)
        return await self.app(scope, receive, send)

    def _knows(self, address: str) -> bool:
        try:
            return urlsplit(address).hostname in self.hosts
        except ValueError:  # brackets that hold no address
            return False


class BodyLimit:
    """Refuses request bodies beyond a size, declared or not, before they are held in memory."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app = app
        self.limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        received = 0
        body: list[Message] = []
        more = True
        while more:
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.limit:
                refusal = _error(413, f"the request is larger than the limit of {self.limit} bytes")
                return await refusal(scope, receive, send)
            body.append(message)
            more = message.get("more_body", False)

        async def replay() -> Message:
            return body.pop(0) if body else await receive()

        return await self.app(scope, replay, send)
