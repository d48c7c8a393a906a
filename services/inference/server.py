"""The inference server: `python -m services.inference.server`. The one place where its parts are put together."""

# Two settings of the environment must be made before gRPC and torch are imported.
# ruff: noqa: E402

import argparse
import asyncio
import contextlib
import ipaddress
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tandem.openmp import limit_spinning

# gRPC's core writes lines of its own about a port in use; ours says it better.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
limit_spinning(os.environ)

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from services.inference.boundary import Boundary
from services.inference.decoding import Decoder
from services.inference.engine import Engine
from services.inference.health import SERVICE, HealthBoard
from services.inference.loading import Served, load
from services.inference.registry import ServingRegistry
from services.inference.scheduler import DeviceScheduler
from services.inference.servicers import InferenceServicer, ModelsServicer
from services.inference.watch import keep_running, listen, watch_volume
from tandem.checkpoints.registry import Located, Registry
from tandem.errors import Conflict, InvalidRequest, TandemError
from tandem.local.state import find_system
from tandem.models.devices import configure_device, resolve_device
from tandem.settings import Settings
from tandem.volume import Volume, replace_file, volume_errors
from tandem.wire.limits import CHANNEL_OPTIONS
from tandem.wire.v1 import inference_pb2_grpc

STOP_GRACE_S = 5.0
ALLOW_INSECURE_LISTEN = "TANDEM_ALLOW_INSECURE_LISTEN"

log = logging.getLogger("tandem.inference")


@dataclass(frozen=True)
class Running:
    """A server that answers at `address`; `stop` ends it when it is set."""

    address: str
    engine: Engine
    stop: asyncio.Event


@contextlib.asynccontextmanager
async def running_server(settings: Settings, allow_insecure: bool = False) -> AsyncIterator[Running]:
    """Start the server of `settings`; leaving the context stops it with grace.

    Raises InvalidRequest for an address that makes no sense or is not loopback, Conflict for one in use.
    """
    host, port = parse_listen(settings.listen)
    check_loopback(host, allow_insecure)
    port = check_free(host, port)
    health = HealthBoard()
    async with _engine(settings) as engine:
        server = _build(engine, health, settings.home)
        address = _bind(server, host, port)
        await health.starting()
        await server.start()
        async with _background(engine, settings, health):
            await health.ready()
            try:
                yield Running(address, engine, asyncio.Event())
            finally:
                # In this order: callers are told to go elsewhere, those under way are answered, then the rest stops.
                await health.stopping()
                await server.stop(STOP_GRACE_S)


@contextlib.asynccontextmanager
async def _engine(settings: Settings) -> AsyncIterator[Engine]:
    try:
        device = resolve_device(settings.device)
    except InvalidRequest as error:
        raise InvalidRequest(f"TANDEM_DEVICE={settings.device!r}: {error}") from error
    configure_device(device)
    volume = Volume(settings.home)
    scheduler, decoder = DeviceScheduler(device), Decoder()
    models = ServingRegistry(Registry(volume), partial(_load_warm, scheduler))
    try:
        yield Engine(models, scheduler, decoder, volume)
    finally:
        await models.close()
        decoder.close()
        scheduler.close()


async def _load_warm(scheduler: DeviceScheduler, located: Located) -> Served:
    """Load beside what is served, then run it once on the device, so that its first caller doesn't wait."""
    served = await asyncio.to_thread(load, located, scheduler.device)
    await scheduler.run(served.runtime.warm)
    return served


def _build(engine: Engine, health: HealthBoard, home: Path) -> grpc.aio.Server:
    # Without this a second server on the same port would start, and the kernel would share the callers out.
    options = (*CHANNEL_OPTIONS, ("grpc.so_reuseport", 0))
    server = grpc.aio.server(interceptors=(Boundary(str(home)),), options=options)
    inference_pb2_grpc.add_InferenceServicer_to_server(InferenceServicer(engine), server)  # type: ignore[no-untyped-call]
    inference_pb2_grpc.add_ModelsServicer_to_server(ModelsServicer(engine), server)  # type: ignore[no-untyped-call]
    health_pb2_grpc.add_HealthServicer_to_server(health.servicer, server)
    names = (SERVICE, "tandem.v1.Models", "grpc.health.v1.Health", reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    return server


@contextlib.asynccontextmanager
async def _background(engine: Engine, settings: Settings, health: HealthBoard) -> AsyncIterator[None]:
    wake = asyncio.Event()
    tasks = [
        asyncio.create_task(keep_running(name, start))
        for name, start in (
            ("the watch of the volume", lambda: watch_volume(engine.models, engine.volume.models, wake, health.models)),
            ("the reader of announcements", lambda: listen(lambda: find_system(settings).redis_url, wake)),
        )
    ]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def parse_listen(listen_address: str) -> tuple[str, int]:
    """Return host and port of `HOST:PORT` (an IPv6 host in brackets); raise InvalidRequest."""
    host, colon, port = listen_address.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise InvalidRequest(f"can't listen on {listen_address!r}: write HOST:PORT, such as 127.0.0.1:8500")
    return host.removeprefix("[").removesuffix("]"), int(port)


def check_loopback(host: str, allow_insecure: bool) -> None:
    """Raise InvalidRequest if `host` can be reached from other machines, unless that is allowed."""
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback and not allow_insecure:
        raise InvalidRequest(
            f"{host} is not a loopback address, and calls are not encrypted: listen on 127.0.0.1, or set "
            f"{ALLOW_INSECURE_LISTEN}=1 where the network itself is closed"
        )


def check_free(host: str, port: int) -> int:
    """Return `port`, or a free one for 0; raise Conflict if it can't be bound, with the reason."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise _not_bound(host, port, error.strerror or str(error)) from error
    return port


def _bind(server: grpc.aio.Server, host: str, port: int) -> str:
    bracketed = f"[{host}]" if ":" in host else host
    try:
        bound = server.add_insecure_port(f"{bracketed}:{port}")
    except RuntimeError as error:
        raise _not_bound(host, port, "gRPC can't bind it") from error
    return f"{bracketed}:{bound}"


def _not_bound(host: str, port: int, reason: str) -> Conflict:
    return Conflict(f"can't listen on {host}:{port}: {reason}; choose another with --listen HOST:PORT (port 0: any)")


async def serve(settings: Settings, port_file: Path | None, allow_insecure: bool) -> None:
    """Serve until SIGTERM or SIGINT."""
    async with running_server(settings, allow_insecure) as running:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, running.stop.set)
        if port_file is not None:
            with volume_errors(port_file):
                replace_file(port_file, f"{running.address}\n".encode(), durable=False)
        print(f"listening on {running.address}", flush=True)  # noqa: T201 - what scripts wait for
        log.info("serving %s on %s", settings.home, running.engine.scheduler.device)
        await running.stop.wait()
        log.info("stopping: no new calls; those under way have %g s", STOP_GRACE_S)


def main() -> None:
    """Read the command line, serve, and exit: 0 after a signal, 1 with one line for what can't be done."""
    arguments = _parser().parse_args()
    try:
        settings = Settings.from_environment(_environment(arguments))
        _log_to_stderr(settings.log_level)
        allow_insecure = os.environ.get(ALLOW_INSECURE_LISTEN) == "1"
        asyncio.run(serve(settings, arguments.port_file, allow_insecure))
    except TandemError as error:
        print(f"tandem: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(1)
    except KeyboardInterrupt:
        # Before the handlers were in place.
        sys.exit(0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m services.inference.server", description=__doc__)
    parser.add_argument("--listen", metavar="HOST:PORT", help="port 0 takes any free one (default: TANDEM_LISTEN)")
    parser.add_argument("--home", metavar="DIR", help="the shared volume (default: TANDEM_HOME)")
    parser.add_argument("--port-file", metavar="FILE", type=Path, help="where to write the address that was bound")
    return parser


def _environment(arguments: argparse.Namespace) -> dict[str, str]:
    given = {"TANDEM_LISTEN": arguments.listen, "TANDEM_HOME": arguments.home}
    return {**os.environ, **{name: value for name, value in given.items() if value}}


def _log_to_stderr(level: str) -> None:
    names = logging.getLevelNamesMapping()
    if level not in names:
        raise InvalidRequest(f"TANDEM_LOG_LEVEL={level!r} is none of DEBUG, INFO, WARNING, ERROR")
    logging.basicConfig(level=names[level], format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # It tells of each connection attempt.
    logging.getLogger("asyncio").setLevel(max(names[level], logging.WARNING))


if __name__ == "__main__":
    main()
