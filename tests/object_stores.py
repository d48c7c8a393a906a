"""An S3 server on loopback (moto's), that can be away, or go away after so many objects; and what a test does to it."""

import logging
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import boto3
import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from moto.s3.models import s3_backends
from werkzeug.serving import BaseWSGIServer, make_server

from tandem.checkpoints.store.objects import ObjectStore

BUCKET = "tandem-test"


class S3Server:
    """A server of one bucket; `is_away` makes it answer 503 to everything, `puts_left` to all but so many objects."""

    def __init__(self) -> None:
        self.is_away = False
        self.puts_left: int | None = None
        self.num_requests = 0
        logging.getLogger("werkzeug").setLevel(logging.WARNING)
        self._application = DomainDispatcherApplication(create_backend_app)
        self._server: BaseWSGIServer = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    @property
    def address(self) -> str:
        return f"s3://{BUCKET}/prefix"

    @property
    def store(self) -> ObjectStore:
        return ObjectStore(self.address)

    @property
    def environment(self) -> dict[str, str]:
        """What processes that use it have in their environment."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def clear(self) -> "S3Server":
        """Have an empty bucket, and everything work."""
        self.is_away, self.puts_left = False, None
        s3_backends.reset()
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        return self

    def flip(self, name: str) -> None:
        """Flip one bit in the middle of an object."""
        data = bytearray(self.store.get(name) or b"")
        data[len(data) // 2] ^= 1
        self.store.put(name, bytes(data))

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        self.num_requests += 1
        is_put = environ["REQUEST_METHOD"] == "PUT"
        if self.is_away or (is_put and self.puts_left == 0):
            start_response("503 Service Unavailable", [("Content-Length", "0")])
            return [b""]
        if is_put and self.puts_left is not None:
            self.puts_left -= 1
        answer: Iterable[bytes] = self._application(environ, start_response)
        return answer


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """A server, which this process finds by its environment; its bucket is there once it is cleared."""
    server = S3Server()
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        patch.delenv("AWS_PROFILE", raising=False)
        try:
            yield server
        finally:
            server.stop()
            s3_backends.reset()
