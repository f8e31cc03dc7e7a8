"""The tests' own S3 server: what other tests take for granted."""

import botocore.exceptions
import pytest

from tests.s3 import S3Bucket


def test_objects_can_be_written_listed_and_read(s3: S3Bucket) -> None:
    s3.write("a/b.bin", b"1" * 6_000_000)
    s3.write("a/c.bin", b"")
    assert s3.keys("a/") == ["a/b.bin", "a/c.bin"]
    assert s3.read("a/b.bin") == b"1" * 6_000_000 and s3.read("a/c.bin") == b""


def test_wrong_keys_and_buckets_are_refused(s3: S3Bucket) -> None:
    with pytest.raises(botocore.exceptions.ClientError, match="NoSuchBucket"):
        s3.client().put_object(Bucket="absent-bucket", Key="x", Body=b"")
    stranger = type(s3.server)(s3.endpoint, secret_key="wrong")
    with pytest.raises(botocore.exceptions.ClientError, match="SignatureDoesNotMatch"):
        stranger.client().list_objects_v2(Bucket=s3.bucket)
