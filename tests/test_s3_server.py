"""The tests' own S3 server and the proxy before it: what other tests take for granted."""

import io
import random
import time

import botocore.exceptions
import pytest
from botocore.config import Config

from tests.fault_proxy import Fault, FaultProxy
from tests.s3 import S3Bucket, S3Server


def test_objects_can_be_written_listed_and_read(s3: S3Bucket) -> None:
    s3.write("a/b.bin", b"1" * 6_000_000)
    s3.write("a/c.bin", b"")
    assert s3.keys("a/") == ["a/b.bin", "a/c.bin"]
    assert s3.read("a/b.bin") == b"1" * 6_000_000 and s3.read("a/c.bin") == b""


def test_wrong_keys_and_buckets_are_refused(s3: S3Bucket) -> None:
    with pytest.raises(botocore.exceptions.ClientError, match="NoSuchBucket"):
        s3.client().put_object(Bucket="absent-bucket", Key="x", Body=b"")
    stranger = S3Server(s3.endpoint, secret_key="wrong")
    with pytest.raises(botocore.exceptions.ClientError, match="SignatureDoesNotMatch"):
        stranger.client().list_objects_v2(Bucket=s3.bucket)


def read_through(proxy: FaultProxy, s3: S3Bucket, key: str) -> bytes:
    """Reads once, without the client's own retries."""
    options = Config(retries={"total_max_attempts": 1}, read_timeout=1, connect_timeout=1)
    client = S3Server(proxy.endpoint).client(options)
    return client.get_object(Bucket=s3.bucket, Key=key)["Body"].read()


def test_the_proxy_passes_on_what_it_is_not_told_to_break(s3: S3Bucket, s3_faults: FaultProxy) -> None:
    through = S3Bucket(S3Server(s3_faults.endpoint), s3.bucket)
    data = random.Random(0).randbytes(20_000_000)  # above boto3's limit for uploads in parts
    through.write("small", b"small")
    through.client().upload_fileobj(io.BytesIO(data), s3.bucket, "large")
    assert through.keys() == s3.keys() == ["large", "small"]
    assert read_through(s3_faults, s3, "large") == s3.read("large") == data
    assert not s3_faults.hits and ("PUT", f"/{s3.bucket}/small") in s3_faults.requests


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("status_503", botocore.exceptions.ClientError),
        ("stall", botocore.exceptions.ReadTimeoutError),
        ("truncate", botocore.exceptions.ResponseStreamingError),
        ("reset", botocore.exceptions.ResponseStreamingError),
    ],
)
def test_faults_reach_the_client_as_often_as_told(
    s3: S3Bucket, s3_faults: FaultProxy, fault: Fault, error: type[Exception]
) -> None:
    s3.write("a/shard", b"x" * 100_000)
    s3.write("a/other", b"y")
    s3_faults.inject(fault, path="shard", times=2)
    assert read_through(s3_faults, s3, "a/other") == b"y"
    for _ in range(2):
        with pytest.raises(error):
            read_through(s3_faults, s3, "a/shard")
    assert read_through(s3_faults, s3, "a/shard") == b"x" * 100_000
    assert s3_faults.hits == {fault: 2}


def test_corrupt_and_slow_bodies_arrive_whole(s3: S3Bucket, s3_faults: FaultProxy) -> None:
    s3.write("shard", bytes(50_000))
    s3_faults.inject("corrupt", times=1)
    data = read_through(s3_faults, s3, "shard")
    assert len(data) == 50_000 and data != bytes(50_000)
    s3_faults.inject("slow", bytes_per_s=100_000)
    started = time.monotonic()
    assert read_through(s3_faults, s3, "shard") == bytes(50_000)
    assert 0.4 < time.monotonic() - started < 5
    s3_faults.clear()
    assert read_through(s3_faults, s3, "shard") == bytes(50_000) and s3_faults.hits == {"corrupt": 1, "slow": 1}
