"""What reflection tells of: the shared descriptor pool, and that of the Open Inference Protocol, which has its own."""

from typing import Any

from google.protobuf import descriptor_pool

from tandem.wire.oip import grpc_service_pb2


class Pools:
    """Stands in for one pool, under the names of the methods that reflection calls; each raises KeyError."""

    def __init__(self) -> None:
        self._pools: tuple[Any, ...] = (descriptor_pool.Default(), grpc_service_pb2.DESCRIPTOR.pool)

    def FindFileByName(self, name: str) -> Any:
        """Return the file's descriptor."""
        return self._first("FindFileByName", name)

    def FindFileContainingSymbol(self, name: str) -> Any:
        """Return the descriptor of the file that has the service, method or message `name`."""
        return self._first("FindFileContainingSymbol", name)

    def FindMessageTypeByName(self, name: str) -> Any:
        """Return the message's descriptor."""
        return self._first("FindMessageTypeByName", name)

    def FindExtensionByNumber(self, message: Any, number: int) -> Any:
        """Return the extension's descriptor."""
        return message.file.pool.FindExtensionByNumber(message, number)

    def FindAllExtensions(self, message: Any) -> Any:
        """Return the descriptors of the extensions of `message`."""
        return message.file.pool.FindAllExtensions(message)

    def _first(self, method: str, name: str) -> Any:
        for pool in self._pools:
            try:
                return getattr(pool, method)(name)
            except KeyError:
                continue
        raise KeyError(name)
