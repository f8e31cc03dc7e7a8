"""Folders and a real S3 server behind one interface, and every refusal in one line without a secret."""

from __future__ import annotations

import errno
import http.client
import json
import os
import pickle
import ssl
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import botocore.exceptions
import pytest

from star_dist.errors import Unavailable, UserError
from star_dist.object_store import ObjectStore, open_store
from tests.fault_proxy import Fault, FaultProxy
from tests.s3 import SECRET_KEY, S3Bucket


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    if request.param == "folder":
        return open_store(tmp_path / "store")
    return open_store(f"{request.getfixturevalue('s3').url}/some/prefix/")


def names(store: ObjectStore, prefix: str = "") -> list[str]:
    return sorted(entry.name for entry in store.list(prefix))


def test_objects_are_written_listed_and_read(store: ObjectStore, tmp_path: Path) -> None:
    assert not list(store.list())
    store.write("b/2.bin", b"two")
    store.write("a.bin", b"")
    (tmp_path / "file").write_bytes(b"from a file")
    store.upload(tmp_path / "file", "b/1.bin")
    store.write("a.bin", b"again")
    assert {entry.name: entry.num_bytes for entry in store.list()} == {"a.bin": 5, "b/1.bin": 11, "b/2.bin": 3}
    assert names(store, "b/") == ["b/1.bin", "b/2.bin"]
    assert names(store, "b/1") == ["b/1.bin"]
    assert store.read("b/1.bin") == b"from a file" and store.exists("a.bin") and not store.exists("b")
    store.download("b/2.bin", tmp_path / "new" / "copy")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["copy"]
    assert pickle.loads(pickle.dumps(store)).read("b/2.bin") == b"two"
    for read in (store.read, lambda name: store.download(name, tmp_path / "x")):
        with pytest.raises(FileNotFoundError):
            read("absent")


def test_names_under_a_prefix_are_that_prefix_s_alone(s3: S3Bucket) -> None:
    s3.write("data/x", b"1")
    s3.write("data-2/y", b"2")
    assert names(open_store(f"{s3.url}/data")) == ["x"]
    assert names(open_store(s3.url)) == ["data-2/y", "data/x"]


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"AWS_ACCESS_KEY_ID": "stranger"}, "the store does not know the access key"),
        ({"AWS_SECRET_ACCESS_KEY": "wrong-secret"}, "the secret key is wrong; check AWS_SECRET_ACCESS_KEY"),
        ({"S3_ENDPOINT_URL": "http://127.0.0.1:9"}, "the store cannot be reached; check the endpoint"),
        ({"S3_ENDPOINT_URL": "http://stranger:wrong-secret@h:9"}, "the endpoint of h:9 holds a user name or password"),
        ({"AWS_PROFILE": "absent"}, r"The config profile \(absent\) could not be found"),
        (
            {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None, "AWS_SHARED_CREDENTIALS_FILE": "/absent"},
            "there are no AWS credentials; set AWS_ACCESS_KEY_ID",
        ),
    ],
)
def test_refusals_say_what_to_change_and_hold_no_secret(
    s3: S3Bucket, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str | None], said: str
) -> None:
    monkeypatch.setattr("star_dist.object_store.ATTEMPTS", 2)  # a dead endpoint would take more than a minute
    for name, value in environment.items():
        if value is None:
            monkeypatch.delenv(name)
        else:
            monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said) as raised:
        next(open_store(f"{s3.url}/x").list(), None)
    text = str(raised.value)
    assert "\n" not in text and SECRET_KEY not in text and "wrong-secret" not in text and "stranger" not in text


def test_wrong_places_are_named(s3: S3Bucket, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot list s3://absent-bucket/x/.*: the bucket does not exist"):
        next(open_store("s3://absent-bucket/x").list(), None)
    with pytest.raises(UserError, match="has scheme 'gs'; give a local path or s3://"):
        open_store("gs://bucket")
    with pytest.raises(UserError, match=r"^https://host/x has scheme 'https'"):
        open_store(f"https://someone:{SECRET_KEY}@host/x?X-Amz-Signature={SECRET_KEY}")
    for url in ("s3://", "s3:///x"):
        with pytest.raises(UserError, match="names no bucket"):
            open_store(url)
    for bucket in ("My Bucket", "bucket:8080"):
        with pytest.raises(UserError, match=rf"names bucket '{bucket}', which must be letters, digits.*; give s3://"):
            open_store(f"s3://{bucket}/x")
    for url in ("s3://AKIA:wrong-secret@bucket/x", "s3://AKIA:wrong/secret@bucket/x", "s3://AKIA@bucket"):
        with pytest.raises(UserError, match="an S3 URL holds a user name or password") as raised:
            open_store(url)
        assert "AKIA" not in str(raised.value) and "wrong" not in str(raised.value)
    for path, shown, read in (
        ("run#2/256", "run#2/256", "run"),
        ("what?X-Amz-Signature=x", r"what\?", "what"),
        ("/a", "/a", "a"),
    ):
        with pytest.raises(UserError, match=rf"^s3://bucket/{shown} begins .* would read s3://bucket/{read} instead"):
            open_store(f"s3://bucket/{path}")
    for url in ("s3://Old_bucket.of-1/a@b", "s3://arn:aws:s3:us-east-1:123456789012:accesspoint:name/x"):
        assert open_store(url).url == url
    (tmp_path / "file").write_bytes(bytes(20_000_000))  # goes up in parts
    for name in ("file", "small"):
        (tmp_path / "small").write_bytes(b"x")
        with pytest.raises(UserError, match=rf"cannot write s3://absent-bucket/{name} .*the bucket does not exist"):
            open_store("s3://absent-bucket").upload(tmp_path / name, name)


@pytest.mark.parametrize("fault", ["status_503", "truncate", "reset"])
def test_passing_faults_are_survived(s3: S3Bucket, s3_faults: FaultProxy, fault: Fault, tmp_path: Path) -> None:
    store = open_store(s3.url)
    s3.write("x", b"x" * 100_000)
    s3_faults.inject(fault, times=2)
    assert store.read("x") == b"x" * 100_000
    s3_faults.inject(fault, times=2)
    store.download("x", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == b"x" * 100_000
    assert s3_faults.hits == {fault: 4}


def test_a_record_that_tls_cannot_decrypt_is_asked_for_again(
    s3: S3Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client passes urllib3's own error on, where a body breaks off by it. Raised by the connection; no server."""
    store = open_store(s3.url)
    s3.write("x", b"x" * 100_000)
    read, broken = http.client.HTTPResponse.read, []

    def break_off(response: http.client.HTTPResponse, *amount: int) -> bytes:
        if response.length == 100_000 and len(broken) < allowed:  # not the answers without a body
            broken.append(response)
            raise ssl.SSLError(1, "[SSL: DECRYPTION_FAILED_OR_BAD_RECORD_MAC] decryption failed or bad record mac")
        return read(response, *amount)

    monkeypatch.setattr("star_dist.object_store.FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(http.client.HTTPResponse, "read", break_off)
    for ask in (lambda: store.read("x"), lambda: store.download("x", tmp_path / "x")):
        broken.clear()
        allowed = 2
        ask()
        assert len(broken) == 2
        allowed = 100
        with pytest.raises(Unavailable, match=rf"cannot read {s3.url}/x .*: SSLError after 8 attempts; try again"):
            ask()
    assert (tmp_path / "x").read_bytes() == b"x" * 100_000
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_an_instance_s_role_is_asked_for_again(s3: S3Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A service as EC2's, whose every first answer is 503; the keys that it gives are the test server's."""
    asked: Counter[str] = Counter()
    answers = {
        "/latest/api/token": "token",
        "/latest/meta-data/iam/security-credentials/": "role",
        "/latest/meta-data/iam/security-credentials/role": json.dumps(
            {"Code": "Success", "AccessKeyId": s3.server.access_key, "SecretAccessKey": s3.server.secret_key}
            | {"Token": "", "Expiration": "2999-01-01T00:00:00Z"}
        ),
    }

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked[self.path] += 1
            body = answers[self.path].encode()
            self.send_response(503 if asked[self.path] == 1 else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_PUT = do_GET

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    s3.write("x", b"x")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_EC2_METADATA_DISABLED", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    # Set first, so that it is gone again after the test.
    monkeypatch.setenv("AWS_METADATA_SERVICE_NUM_ATTEMPTS", "1")
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "absent"))
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}/")
        try:
            with pytest.raises(UserError, match="there are no AWS credentials"):  # as a user has it who wants it so
                open_store(s3.url).read("x")
            asked.clear()
            monkeypatch.delenv("AWS_METADATA_SERVICE_NUM_ATTEMPTS")
            assert open_store(s3.url).read("x") == b"x"
        finally:
            server.shutdown()
    assert set(asked) == set(answers) and min(asked.values()) > 1


@pytest.mark.slow
@pytest.mark.parametrize("status", [500, 503])
def test_many_threads_survive_a_store_that_is_down_for_seconds(
    s3: S3Bucket, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    """Without a word in the answer, which the client takes for a short fault; SlowDown makes it wait longer."""
    refused = []
    well_again = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if well_again.is_set() else status)
            self.send_header("Content-Length", "0")
            self.end_headers()
            if not well_again.is_set():
                refused.append(self.path)

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server, ThreadPoolExecutor(16) as pool:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        monkeypatch.setenv("S3_ENDPOINT_URL", f"http://127.0.0.1:{server.server_address[1]}")
        store = open_store(s3.url)
        assert store.client  # one for all threads
        threading.Timer(2, well_again.set).start()
        reads = [pool.submit(store.read, "x") for _ in range(16)]
        try:
            assert [read.result() for read in reads] == [b""] * 16
        finally:
            server.shutdown()
    assert len(refused) >= 16


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            botocore.exceptions.UnauthorizedSSOTokenError(),
            r"\(UnauthorizedSSOTokenError\); log in again \(aws sso login",
        ),
        (botocore.exceptions.SSOTokenLoadError(error_msg="x"), "log in again"),
        (
            botocore.exceptions.CredentialRetrievalError(provider="custom-process", error_msg="x\nwrong-secret"),
            "the AWS profile gives no credentials .*; check its role or credential_process",
        ),
        (botocore.exceptions.NoRegionError(), "set AWS_DEFAULT_REGION"),
        (botocore.exceptions.ParamValidationError(report="a\nb"), r"refuses the request \(.* a b\); change the URL"),
    ],
)
@pytest.mark.parametrize("when", ["the client is made", "a request is made"])
def test_settings_that_keep_the_client_from_asking_are_mistakes_of_the_user(
    s3: S3Bucket, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str, when: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    store = open_store(s3.url)
    if when == "the client is made":
        monkeypatch.setattr("boto3.session.Session.client", fail)
    else:
        monkeypatch.setattr(store.client, "get_object", fail)
    with pytest.raises(UserError, match=said) as raised:
        store.read("x")
    text = str(raised.value)
    assert not isinstance(raised.value, Unavailable)
    assert "\n" not in text and "attempts" not in text and "wrong-secret" not in text


def test_linked_folders_are_listed_and_circles_named(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a").write_bytes(b"a")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "link").symlink_to(tmp_path / "elsewhere")
    store = open_store(tmp_path / "store")
    assert names(store) == ["link/a"]
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"link/back is a link to .*/elsewhere, which contains it; remove the link"):
        names(store)


def test_folders_that_cannot_be_read_are_not_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path)
    for name in ("one/x", "two/y"):
        store.write(name, b"x")
    scandir = os.scandir
    for number, kind in ((errno.EIO, Unavailable), (errno.ENOENT, Unavailable), (errno.EACCES, UserError)):

        def scandir_or_fail(path: str, number: int = number) -> Iterator[os.DirEntry]:
            if os.path.basename(path) == "two":
                raise OSError(number, os.strerror(number), path)
            return scandir(path)

        monkeypatch.setattr(os, "scandir", scandir_or_fail)
        with pytest.raises(UserError, match=rf"cannot list .*/two: {os.strerror(number)}; make it readable") as raised:
            names(store)
        assert type(raised.value) is kind
    assert names(store, "absent/") == names(store, "one/x/") == []


def test_what_a_killed_writer_leaves_is_not_listed_and_can_be_discarded(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.write("a", b"a")
    with pytest.raises(FileNotFoundError):
        store.upload(tmp_path / "absent", "b")
    assert not list((tmp_path / ".unfinished").iterdir())
    (tmp_path / ".unfinished" / "left").write_bytes(b"half")
    assert names(store) == ["a"]
    store.discard_unfinished()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
