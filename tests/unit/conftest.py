"""An S3 server on loopback for each file of tests that asks for one, empty at the start of each test."""

from collections.abc import Iterator

import pytest
from object_stores import S3Server, s3_server


@pytest.fixture(scope="module")
def s3_of_module() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture
def s3(s3_of_module: S3Server) -> S3Server:
    return s3_of_module.clear()
