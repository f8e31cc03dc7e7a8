"""Folders and S3 prefixes behind one interface: list, read, write, and errors in one line. Imports no torch.

Credentials come from the ordinary AWS chain (environment, profile, instance role). The endpoint of another store than
Amazon's is given, or read from S3_ENDPOINT_URL, the variable that mosaicml-streaming reads too. No message ever holds
a key.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar
from urllib.parse import urlsplit

from star_dist.errors import Unavailable, UserError
from star_dist.files import replaced

Result = TypeVar("Result")

S3_SCHEME = "s3://"
ENDPOINT_VARIABLE = "S3_ENDPOINT_URL"
CONNECT_TIMEOUT_S = 10
READ_TIMEOUT_S = 60
ATTEMPTS = 8  # the client's pauses are random up to 1, 2, 4, … 64 s: a minute on average, two at most
FIRST_PAUSE_S = 0.5  # between attempts at a body; each next one is twice as long, a minute in all
METADATA_ATTEMPTS = 5  # at credentials, each of a second at most
CONNECTIONS = 64
DELETED_AT_ONCE = 1000  # the most that S3 takes in one request
UNFINISHED_FOLDER = ".unfinished"  # inside a local store, so that whatever a kill leaves is in one place
BUCKET = re.compile(r"[A-Za-z0-9._-]{1,255}|arn:aws[A-Za-z0-9:._-]+")  # what the client takes

KEYS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
REFUSALS = {
    "InvalidAccessKeyId": "the store does not know the access key; check AWS_ACCESS_KEY_ID or the profile",
    "SignatureDoesNotMatch": "the secret key is wrong; check AWS_SECRET_ACCESS_KEY or the profile",
    "ExpiredToken": "the session token has expired; renew it",
    "InvalidToken": "the session token is wrong; check AWS_SESSION_TOKEN",
    "NoSuchBucket": "the bucket does not exist; create it or change the URL",
    "AccessDenied": "the credentials may not do this; check the bucket's policy and the keys",
    "403": "the credentials may not do this; check the bucket's policy and the keys",
    "PermanentRedirect": "the bucket is in another region; set AWS_DEFAULT_REGION",
    "AuthorizationHeaderMalformed": "the bucket is in another region; set AWS_DEFAULT_REGION",
    "InvalidBucketName": "that is no bucket name; change the URL",
}
BUSY_CODES = frozenset({"SlowDown", "RequestTimeout", "RequestTimeTooSkewed", "Throttling", "InternalError"})
ABSENT_CODES = frozenset({"NoSuchKey", "404", "NotFound"})
# What the store says of one object alone: the number that a local file would give, and the reason.
OBJECT_FAULTS = {
    "KeyTooLongError": (errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG)),
    "InvalidObjectState": (errno.EACCES, "archived by the store"),
}


@dataclass(frozen=True)
class StoredObject:
    """name: path under the store's URL, with forward slashes."""

    name: str
    num_bytes: int


class RefusedObject(OSError, UserError):
    """The store refuses one object for itself; `errno` and `strerror` say why, as those of a local file do."""

    def __str__(self) -> str:
        return f"the store refuses {self.filename}: {self.strerror}; restore it, or take it out"


class ObjectStore(Protocol):
    """Objects under a URL, by name. Threads may share one; processes forked from its owner may use it too.

    A name that does not exist is a FileNotFoundError; whatever else goes wrong with S3, after retries, is a UserError:
    Unavailable where the store or the network may be well again later, RefusedObject where this object alone is at
    fault.
    An object appears complete or not at all.
    """

    url: str

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        """All objects whose name starts with `prefix`, in no order: not every store sorts as Amazon's does."""

    def read(self, name: str) -> bytes: ...

    def download(self, name: str, path: Path) -> None:
        """Copies an object to a local file, which appears complete or not at all."""

    def write(self, name: str, data: bytes) -> None: ...

    def upload(self, path: Path, name: str) -> None:
        """Copies a local file to an object."""

    def exists(self, name: str) -> bool: ...

    def discard_unfinished(self) -> None:
        """Removes what killed writers have left; for when nobody else is writing."""


def is_s3(url: str) -> bool:
    return url.startswith(S3_SCHEME)


def check_endpoint(endpoint: str) -> str:
    """An endpoint as it was given; it is shown in messages and kept in configs, so that it may hold no key.

    Raises:
        UserError: it holds a user name or password.
    """
    if "@" in urlsplit(endpoint).netloc:
        host = urlsplit(endpoint).netloc.rpartition("@")[2]
        raise UserError(
            f"the endpoint of {host} holds a user name or password; give http(s)://host:port, and keys as {KEYS}"
        )
    return endpoint


def open_store(url: str | os.PathLike[str], *, endpoint: str | None = None, region: str | None = None) -> ObjectStore:
    """The store at a local folder or `s3://bucket/prefix`; contacts nothing yet.

    Raises:
        UserError: another scheme, no bucket in the URL or one that cannot be, or a prefix that other readers of the
            URL take for another one.
    """
    url = os.fspath(url)
    if is_s3(url):
        return S3Store(url, endpoint, region)
    scheme, found, rest = url.partition("://")
    if found:
        place = rest.rpartition("@")[2].partition("?")[0]  # neither a password nor the signature of a signed URL
        raise UserError(f"{scheme}://{place} has scheme {scheme!r}; give a local path or s3://bucket/prefix")
    return FolderStore(url)


class FolderStore:
    """A local folder (see `ObjectStore`)."""

    def __init__(self, path: str) -> None:
        self.url = path
        self.path = Path(path)

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        """The folder need not exist. Links to folders are followed.

        Raises:
            UserError: a folder cannot be read, or is a link to one above itself.
        """
        root = self.path / prefix.rpartition("/")[0]

        def fail(error: OSError) -> None:
            if isinstance(error, FileNotFoundError | NotADirectoryError) and error.filename == os.fspath(root):
                return
            kind = UserError if isinstance(error, PermissionError) else Unavailable
            raise kind(
                f"cannot list {error.filename}: {error.strerror}; make it readable, or try again later"
            ) from None

        for folder, subfolders, files in os.walk(root, onerror=fail, followlinks=True):
            above = Path(folder).parent.resolve()
            if os.path.islink(folder) and Path(folder).resolve() in (above, *above.parents):
                raise UserError(f"{folder} is a link to {Path(folder).resolve()}, which contains it; remove the link")
            if UNFINISHED_FOLDER in subfolders:
                subfolders.remove(UNFINISHED_FOLDER)
            for file in files:
                path = Path(folder, file)
                name = path.relative_to(self.path).as_posix()
                if name.startswith(prefix) and path.is_file():
                    yield StoredObject(name, path.stat().st_size)

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def download(self, name: str, path: Path) -> None:
        with replaced(path) as partial:
            shutil.copyfile(self.path / name, partial)

    def write(self, name: str, data: bytes) -> None:
        with self._unfinished(name) as partial:
            partial.write_bytes(data)

    def upload(self, path: Path, name: str) -> None:
        with self._unfinished(name) as partial:
            shutil.copyfile(path, partial)

    def exists(self, name: str) -> bool:
        return (self.path / name).is_file()

    def discard_unfinished(self) -> None:
        shutil.rmtree(self.path / UNFINISHED_FOLDER, ignore_errors=True)

    @contextlib.contextmanager
    def _unfinished(self, name: str) -> Iterator[Path]:
        """A file to write to, which then takes its place under the name."""
        (self.path / name).parent.mkdir(parents=True, exist_ok=True)
        partial = self.path / UNFINISHED_FOLDER / uuid.uuid4().hex
        partial.parent.mkdir(exist_ok=True)
        try:
            yield partial
            os.replace(partial, self.path / name)
        finally:
            partial.unlink(missing_ok=True)


class S3Store:
    """`s3://bucket/prefix` on Amazon S3 or any store that speaks its protocol (see `ObjectStore`)."""

    def __init__(self, url: str, endpoint: str | None = None, region: str | None = None) -> None:
        self.url = url.rstrip("/")
        self.bucket, _, prefix = url.removeprefix(S3_SCHEME).rstrip("/").partition("/")
        if not self.bucket:
            raise UserError(f"{url!r} names no bucket; give s3://bucket/prefix")
        if not BUCKET.fullmatch(self.bucket):
            if "@" in url:  # of keys before the bucket; a secret may hold slashes, and is not shown
                raise UserError(f"an S3 URL holds a user name or password; give s3://bucket/prefix, and keys as {KEYS}")
            raise UserError(
                f"{url!r} names bucket {self.bucket!r}, which must be letters, digits, dots, hyphens and underscores; "
                f"give s3://bucket/prefix, and a host and port as endpoint ({ENDPOINT_VARIABLE})"
            )
        if prefix.startswith("/") or not set("#?").isdisjoint(prefix):
            # What follows a question mark may be the signature of a signed URL.
            place, query, _ = f"{S3_SCHEME}{self.bucket}/{prefix}".partition("?")
            read = f"{S3_SCHEME}{self.bucket}/{urlsplit(self.url).path.lstrip('/')}"
            raise UserError(
                f"{place}{query} begins its path with a slash or holds '#' or '?', and mosaicml-streaming would read "
                f"{read} instead; choose another prefix"
            )
        self.prefix = f"{prefix}/" if prefix else ""
        self.endpoint = endpoint or os.environ.get(ENDPOINT_VARIABLE)
        if self.endpoint is not None:
            check_endpoint(self.endpoint)
        self.region = region
        self._client: tuple[int, Any] | None = None

    def folders(self) -> Iterator[str]:
        """Names before the first slash, once each."""
        with self._explained("list", ""):
            pages = self.client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=self.prefix, Delimiter="/"
            )
            for page in pages:
                for entry in page.get("CommonPrefixes", ()):
                    yield entry["Prefix"].removeprefix(self.prefix).rstrip("/")

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        with self._explained("list", prefix):
            pages = self.client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=self.prefix + prefix
            )
            for page in pages:
                for entry in page.get("Contents", ()):
                    if not entry["Key"].endswith("/"):  # the marker of an empty folder
                        yield StoredObject(entry["Key"].removeprefix(self.prefix), entry["Size"])

    def read(self, name: str) -> bytes:
        with self._explained("read", name):
            import botocore.exceptions as broken

            # The client retries requests, but not a body that ends early, stalls or differs from its checksum.
            return _again_after_broken_bodies(
                lambda: self.client.get_object(Bucket=self.bucket, Key=self.prefix + name)["Body"].read(),
                broken.ResponseStreamingError,
                broken.ReadTimeoutError,
                broken.IncompleteReadError,
                broken.FlexibleChecksumError,
            )

    def read_start(self, name: str) -> bytes:
        """The first bytes of an object, which show that it can be read."""
        with self._explained("read", name):
            answer = self.client.get_object(Bucket=self.bucket, Key=self.prefix + name, Range="bytes=0-99")
            return answer["Body"].read()

    def download(self, name: str, path: Path) -> None:
        with self._explained("read", name), replaced(path) as partial:
            _again_after_broken_bodies(lambda: self.client.download_file(self.bucket, self.prefix + name, str(partial)))

    def write(self, name: str, data: bytes) -> None:
        with self._explained("write", name):
            self.client.put_object(Bucket=self.bucket, Key=self.prefix + name, Body=data)

    def upload(self, path: Path, name: str) -> None:
        with self._explained("write", name):
            self.client.upload_file(str(path), self.bucket, self.prefix + name)

    def exists(self, name: str) -> bool:
        try:
            with self._explained("read", name):
                self.client.head_object(Bucket=self.bucket, Key=self.prefix + name)
        except FileNotFoundError:
            return False
        return True

    def copy(self, name: str, target: str) -> None:
        """Copies an object to another name on the server."""
        with self._explained("copy", name):
            source = {"Bucket": self.bucket, "Key": self.prefix + name}
            self.client.copy(source, self.bucket, self.prefix + target)

    def delete(self, names: Sequence[str]) -> None:
        """Removes objects, as many with one request as S3 allows."""
        for start in range(0, len(names), DELETED_AT_ONCE):
            batch = names[start : start + DELETED_AT_ONCE]
            with self._explained("delete", batch[0]):
                objects = {"Objects": [{"Key": self.prefix + name} for name in batch], "Quiet": True}
                answer = self.client.delete_objects(Bucket=self.bucket, Delete=objects)
            for failure in answer.get("Errors", ()):
                raise Unavailable(f"cannot delete {S3_SCHEME}{self.bucket}/{failure['Key']}: {failure.get('Code')}")

    def discard_unfinished(self) -> None:
        """Nothing is visible; parts of cut uploads go by the bucket's own rule (AbortIncompleteMultipartUpload)."""

    @property
    def client(self) -> Any:
        """This process's client: connections must not be shared with a process that was forked.

        Raises:
            UserError: an AWS profile or endpoint that cannot be used, or a profile that gives no credentials.
        """
        if self._client is None or self._client[0] != os.getpid():
            import botocore.exceptions
            from boto3.session import Session
            from botocore.config import Config

            # Of an instance role: by default one short fault of the service that gives them means "no credentials".
            os.environ.setdefault("AWS_METADATA_SERVICE_NUM_ATTEMPTS", str(METADATA_ATTEMPTS))
            # The modes "standard" and "adaptive" share one quota of retries among all threads, which a store that
            # answers 500 or 503 uses up in a second; "legacy" has none, and pauses that grow without a limit.
            options = Config(
                retries={"mode": "legacy", "total_max_attempts": ATTEMPTS},
                connect_timeout=CONNECT_TIMEOUT_S,
                read_timeout=READ_TIMEOUT_S,
                max_pool_connections=CONNECTIONS,
            )
            try:
                client = Session(region_name=self.region).client("s3", endpoint_url=self.endpoint, config=options)
            except (botocore.exceptions.BotoCoreError, ValueError) as error:
                raise UserError(f"cannot use S3 for {self.url}: {_settings_fault(error) or error}") from None
            self._client = os.getpid(), client
        return self._client[1]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_client": None}

    @contextlib.contextmanager
    def _explained(self, action: str, name: str) -> Iterator[None]:
        """Turns what the client raises into one line that says what to change."""
        import boto3.exceptions
        import botocore.exceptions
        import urllib3.exceptions

        try:
            yield
        except boto3.exceptions.Boto3Error as error:
            self._explain(action, name, error.__context__ or error)
        except (
            botocore.exceptions.BotoCoreError,
            botocore.exceptions.ClientError,
            urllib3.exceptions.HTTPError,
        ) as error:
            self._explain(action, name, error)

    def _explain(self, action: str, name: str, error: BaseException) -> NoReturn:
        import botocore.exceptions as broken

        where = f"{self.url}/{name}"
        at = f" (endpoint {self.endpoint})" if self.endpoint else ""
        kind = UserError
        if fault := _settings_fault(error):
            reason = fault
        elif isinstance(error, broken.EndpointConnectionError | broken.ConnectTimeoutError):
            kind = Unavailable
            reason = f"the store cannot be reached; check the endpoint ({ENDPOINT_VARIABLE}) and the network"
        elif isinstance(error, broken.ClientError):
            code = str(error.response.get("Error", {}).get("Code", "unknown"))
            if code in ABSENT_CODES:
                raise FileNotFoundError(2, os.strerror(2), where) from None
            if code in OBJECT_FAULTS:
                raise RefusedObject(*OBJECT_FAULTS[code], where) from None
            reason = f"{REFUSALS[code]} ({code})" if code in REFUSALS else f"the store answered {code}"
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            kind = Unavailable if status >= 500 or code in BUSY_CODES else UserError
        else:
            kind = Unavailable
            reason = f"{type(error).__name__} after {ATTEMPTS} attempts; try again when the store answers"
        raise kind(f"cannot {action} {where}{at}: {reason}") from None


def _again_after_broken_bodies(get: Callable[[], Result], *faults: type[Exception]) -> Result:
    """Asks again, after pauses of a minute in all, where a body breaks off by one of the faults, or by what the client
    lets pass as urllib3 raises it: a TLS record that cannot be decrypted."""
    import urllib3.exceptions

    for attempt in range(1, ATTEMPTS):
        try:
            return get()
        except (urllib3.exceptions.HTTPError, *faults):
            time.sleep(FIRST_PAUSE_S * 2 ** (attempt - 1))
    return get()


def _settings_fault(error: BaseException) -> str | None:
    """What to change where the client refuses to ask the store at all; None for every other error."""
    import botocore.exceptions as broken

    if isinstance(error, broken.NoCredentialsError | broken.PartialCredentialsError):
        return f"there are no AWS credentials; set {KEYS}"
    kind = type(error).__name__
    if isinstance(error, broken.SSOError | broken.TokenRetrievalError | broken.LoginError):
        return f"the session of the AWS profile has ended ({kind}); log in again (aws sso login, or aws login)"
    if isinstance(error, broken.CredentialRetrievalError):
        return f"the AWS profile gives no credentials ({kind}); check its role or credential_process, or set {KEYS}"
    if isinstance(error, broken.NoRegionError | broken.InvalidRegionError):
        return f"there is no region, or none of that name ({kind}); set AWS_DEFAULT_REGION"
    if isinstance(error, broken.ParamValidationError):
        return f"the client refuses the request ({' '.join(str(error).split())}); change the URL"
    return None
