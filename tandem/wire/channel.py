"""Channels to the inference service, blocking and asyncio, with TLS and a token where they are wanted."""

from functools import partial
from typing import Any

import grpc

from tandem.access import ClientAccess, Credentials, read_credentials
from tandem.wire.limits import CHANNEL_OPTIONS, PRIORITY_KEY

_OPTIONS = (
    *CHANNEL_OPTIONS,
    # A server that was just started must not be waited for in steps of 20 s.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # A server that is gone without a word is noticed within 50 s, also by calls without a deadline. It allows more.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # A proxy meant for the web must not come between.
    ("grpc.enable_http_proxy", 0),
)


def open_channel(address: str, access: ClientAccess, priority: str = "") -> Any:
    """Return a blocking channel; raise InvalidRequest for what is wrong with the files of `access`.

    All its calls carry the token of `access`, and `priority`: low, normal or high, empty for the server's default.
    """
    found = read_credentials(access, address)
    if not found.is_encrypted:
        return _with_metadata(grpc.insecure_channel(address, options=_OPTIONS), found.token, priority)
    return _with_metadata(grpc.secure_channel(address, _tls(found), options=_OPTIONS), found.token, priority)


def open_aio_channel(address: str, access: ClientAccess, priority: str = "") -> Any:
    """See open_channel; for asyncio."""
    found = read_credentials(access, address)
    if not found.is_encrypted:
        return _with_metadata(grpc.aio.insecure_channel(address, options=_OPTIONS), found.token, priority)
    return _with_metadata(grpc.aio.secure_channel(address, _tls(found), options=_OPTIONS), found.token, priority)


def _tls(found: Credentials) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(found.root_certificates, found.private_key, found.certificate_chain)


def _with_metadata(channel: Any, token: str | None, priority: str) -> Any:
    metadata = [] if token is None else [("authorization", f"Bearer {token}")]
    metadata += [(PRIORITY_KEY, priority)] if priority else []
    return _ChannelWithMetadata(channel, tuple(metadata)) if metadata else channel


class _ChannelWithMetadata:
    """A channel whose calls all carry the same metadata.

    Not gRPC's call credentials, which refuse loopback in the clear, nor interceptors, which cost a task for each call.
    """

    def __init__(self, channel: Any, metadata: tuple[tuple[str, str], ...]) -> None:
        self._channel, self._metadata = channel, metadata
        self.close = channel.close

    def unary_unary(self, *arguments: Any, **options: Any) -> Any:
        """Return the callable of a method."""
        return partial(self._channel.unary_unary(*arguments, **options), metadata=self._metadata)

    def unary_stream(self, *arguments: Any, **options: Any) -> Any:
        """Return the callable of a method."""
        return partial(self._channel.unary_stream(*arguments, **options), metadata=self._metadata)

    def stream_unary(self, *arguments: Any, **options: Any) -> Any:
        """Return the callable of a method."""
        return partial(self._channel.stream_unary(*arguments, **options), metadata=self._metadata)

    def stream_stream(self, *arguments: Any, **options: Any) -> Any:
        """Return the callable of a method."""
        return partial(self._channel.stream_stream(*arguments, **options), metadata=self._metadata)
