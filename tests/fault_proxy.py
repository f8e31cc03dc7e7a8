"""An HTTP proxy before the tests' S3 server that does what object stores do on a bad day, when told to.

s3_faults.inject("status_503", times=3, path="shard.00001")     # the next three requests for that shard
...
assert s3_faults.hits["status_503"] == 3
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

import pytest

from tests.s3 import S3Bucket, S3Server

Fault = Literal["status_503", "stall", "truncate", "corrupt", "reset", "slow"]
HOP_BY_HOP = frozenset({"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "expect"})
SLOW_DOWN = b'<?xml version="1.0"?><Error><Code>SlowDown</Code><Message>injected by the tests</Message></Error>'
RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # linger for 0 s: closing sends RST


@dataclass
class Rule:
    """fault: what happens to requests of `method` whose path and query contain `path`; times: how often, None always.

    status_503: the server is not asked. stall: half of the body, then nothing until the rule is cleared. truncate: half
    of the body, then the connection closes in order. corrupt: all of the body, its middle byte changed, without the
    store's checksum (as an object that was stored so). reset: half of the body, then RST. slow: the body at
    `bytes_per_s`.
    """

    fault: Fault
    path: str = ""
    method: str = "GET"
    times: int | None = None
    bytes_per_s: int = 100_000

    def takes(self, method: str, path: str) -> bool:
        return self.times != 0 and method == self.method and self.path in path


class FaultProxy:
    """A running proxy; without rules it passes everything on unchanged."""

    def __init__(self, upstream: str) -> None:
        self.upstream = urlsplit(upstream).netloc
        self.hits: Counter[str] = Counter()
        self.requests: list[tuple[str, str]] = []  # (method, path) of all
        self._rules: list[Rule] = []
        self._cleared = threading.Event()
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": self}))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def inject(
        self,
        fault: Fault,
        *,
        path: str = "",
        method: str = "GET",
        times: int | None = None,
        bytes_per_s: int = 100_000,
    ) -> None:
        """Adds a rule (see `Rule`); the first one that takes a request decides."""
        with self._lock:
            self._rules.append(Rule(fault, path, method, times, bytes_per_s))

    def clear(self) -> None:
        """Ends all faults, stalled ones included; `hits` stays."""
        with self._lock:
            self._rules.clear()
            self._cleared.set()
            self._cleared = threading.Event()

    def close(self) -> None:
        self.clear()
        self._server.shutdown()
        self._server.server_close()

    def rule_for(self, method: str, path: str) -> tuple[Rule | None, threading.Event]:
        """The rule that this request falls under, counted as used, and what a stalled response waits for."""
        with self._lock:
            self.requests.append((method, path))
            for rule in self._rules:
                if rule.takes(method, path):
                    rule.times = rule.times if rule.times is None else rule.times - 1
                    self.hits[rule.fault] += 1
                    return rule, self._cleared
            return None, self._cleared


class _Handler(BaseHTTPRequestHandler):
    proxy: FaultProxy
    protocol_version = "HTTP/1.1"

    def handle_one_request(self) -> None:
        with contextlib.suppress(ConnectionError):  # clients give up on stalled and slow responses
            super().handle_one_request()

    def _forward(self) -> None:
        request_body = self._read_body()
        rule, cleared = self.proxy.rule_for(self.command, self.path)
        if rule is not None and rule.fault == "status_503":
            self._respond(503, "Slow Down", [("Content-Type", "application/xml")], len(SLOW_DOWN))
            self.wfile.write(SLOW_DOWN)
            return
        upstream = http.client.HTTPConnection(self.proxy.upstream, timeout=60)
        try:
            # The host is part of the signature, so it stays the one that the client addressed.
            headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP_BY_HOP}
            headers["Content-Length"] = str(len(request_body))
            upstream.request(self.command, self.path, request_body, headers)
            response = upstream.getresponse()
            body = response.read()
        finally:
            upstream.close()
        passed_on = [
            (name, value)
            for name, value in response.getheaders()
            if name.lower() not in HOP_BY_HOP and name.lower() != "content-length"
        ]
        if rule is not None and rule.fault == "corrupt":
            passed_on = [(name, value) for name, value in passed_on if not name.lower().startswith("x-amz-checksum-")]
        length = int(response.headers.get("Content-Length", len(body)))  # of HEAD, which has no body
        self._respond(response.status, response.reason, passed_on, length)
        if self.command != "HEAD":
            self._send(body, rule, cleared)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _forward

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass  # trailers
        return b"".join(parts)

    def _respond(self, status: int, reason: str, headers: list[tuple[str, str]], length: int) -> None:
        self.send_response_only(status, reason)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def _send(self, body: bytes, rule: Rule | None, cleared: threading.Event) -> None:
        half = len(body) // 2
        match rule.fault if rule else None:
            case "corrupt":
                self.wfile.write(body[:half] + bytes([body[half] ^ 0xFF]) + body[half + 1 :] if body else body)
            case "slow":
                piece = max(1, rule.bytes_per_s // 20)
                for start in range(0, len(body), piece):
                    self.wfile.write(body[start : start + piece])
                    if cleared.wait(1 / 20):
                        piece = len(body)
            case "stall":
                self.wfile.write(body[:half])
                self.wfile.flush()
                cleared.wait()
                self.close_connection = True
            case "truncate":
                self.wfile.write(body[:half])
                self.close_connection = True
            case "reset":
                self.wfile.write(body[:half])
                self.wfile.flush()
                time.sleep(0.05)  # RST also discards what the client has not read yet
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
                self.connection.shutdown(socket.SHUT_RD)
                self.close_connection = True
            case _:
                self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Says nothing: the tests ask `requests` and `hits`."""


@pytest.fixture
def s3_faults(s3_server: S3Server, s3: S3Bucket, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy between this test and the server: `S3_ENDPOINT_URL` is the proxy's, the fixture `s3` stays direct."""
    proxy = FaultProxy(s3_server.endpoint)
    monkeypatch.setenv("S3_ENDPOINT_URL", proxy.endpoint)
    yield proxy
    proxy.close()
