"""The inference server: `python -m services.inference.server`. The one place where its parts are put together."""

# Two settings of the environment must be made before gRPC and torch are imported.
# ruff: noqa: E402

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from tandem.openmp import limit_spinning

# gRPC's core writes lines of its own about a port in use; ours says it better.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
limit_spinning(os.environ)

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from services.inference.authorization import Authorization
from services.inference.boundary import Boundary
from services.inference.collection import freeze_imports
from services.inference.counts import LoadCounts
from services.inference.decoding import Decoder
from services.inference.devices import Devices, num_workers, resolve_devices
from services.inference.draining import drain, patience
from services.inference.engine import Engine
from services.inference.health import SERVICE, HealthBoard
from services.inference.independence import rows_are_independent
from services.inference.listening import (
    ALLOW_INSECURE_LISTEN,
    SERVER_OPTIONS,
    bind,
    check_free,
    check_loopback,
    quiet_about_callers_who_leave,
    warn_of_open_doors,
)
from services.inference.loading import Served, ServedClassifier, ServedLanguageModel, load, needed_bytes
from services.inference.memory import MemoryBudget, default_budget
from services.inference.niceness import give_way
from services.inference.observation import Observer
from services.inference.oip.servicer import SERVICE as OPEN_INFERENCE
from services.inference.oip.servicer import OpenInferenceServicer
from services.inference.reflection import Pools
from services.inference.registry import NUM_LOADERS, ServingRegistry, Wiring
from services.inference.runtimes.openvino import MODULES as OPENVINO_MODULES
from services.inference.runtimes.selection import RuntimeSelector, engines
from services.inference.scheduler import DeviceScheduler
from services.inference.servicers import InferenceServicer, ModelsServicer
from services.inference.shadows import Shadows
from services.inference.shedding import Shedder
from services.inference.slow_calls import CallFields
from services.inference.store_watch import watch_store
from services.inference.telemetry import telling
from services.inference.texts import TextLoop
from services.inference.tls import Certificates
from services.inference.tokens import TokenFile
from services.inference.trials import run_in_turn
from services.inference.watch import keep_running, listen, watch_devices, watch_volume
from tandem.access import ServerAccess
from tandem.checkpoints.registry import Located, Registry
from tandem.checkpoints.store.cache import StoreCache
from tandem.checkpoints.store.objects import ObjectStore
from tandem.errors import InvalidRequest, TandemError
from tandem.local.state import find_system
from tandem.logs import configure_logging
from tandem.models.devices import configure_device
from tandem.settings import Settings, parse_listen
from tandem.sizes import format_size
from tandem.volume import Volume, replace_file, volume_errors
from tandem.wire.oip import grpc_service_pb2_grpc
from tandem.wire.v1 import inference_pb2_grpc

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

    Raises InvalidRequest for an address that makes no sense or must not be listened on, and for certificates or tokens
    that can't be used; Conflict for an address in use.
    """
    host, port = parse_listen(settings.listen)
    access = settings.server_access
    check_loopback(host, allow_insecure or access.is_encrypted)
    certificates = Certificates(access) if access.is_encrypted else None
    boundary = Boundary(str(settings.home))
    port = check_free(host, port)
    warn_of_open_doors(host, access)
    quiet_about_callers_who_leave()
    health, observer = HealthBoard(), Observer()
    async with _engine(settings) as engine, telling(settings, engine, observer):
        shedder = Shedder(engine.devices.num_late, engine.devices.asked_s, engine.devices.note_shed)
        server = _build(engine, health, boundary, (observer, *_authorization(access), shedder))
        address = bind(server, host, port, certificates)
        await health.starting()
        await server.start()
        async with _background(engine, settings, health, shedder):
            try:
                yield Running(address, engine, asyncio.Event())
            finally:
                # Callers first, then the rest.
                stops = patience(host, settings.drain_delay_s, settings.drain_grace_s)
                await drain(server, health, observer, stops, engine.models.changes.close)


@contextlib.asynccontextmanager
async def _engine(settings: Settings) -> AsyncIterator[Engine]:
    try:
        named = resolve_devices(settings.device)
    except InvalidRequest as error:
        raise InvalidRequest(f"TANDEM_DEVICE={settings.device!r}: {error}") from error
    selectors = {device: RuntimeSelector(device, settings.engine, settings.precision) for device in named}
    for device in selectors:
        configure_device(device)
    volume = Volume(settings.home, settings.checkpoint_store)
    devices = Devices([DeviceScheduler(device, num_workers=num_workers(device)) for device in named])
    decoder = Decoder()
    loads, loaders = LoadCounts(), ThreadPoolExecutor(NUM_LOADERS, "load", initializer=give_way)
    wiring = Wiring(
        load=lambda located: loads.count(
            _load_warm(loaders, devices, [selectors[device] for device in named], volume, located)
        ),
        needed_bytes=lambda located: needed_bytes(located, max(map(named.count, named))),
        is_busy=devices.is_busy,
    )
    budget = MemoryBudget(settings.model_memory or min(map(default_budget, named)))
    cache = _cache(volume, settings.checkpoint_cache)
    models = ServingRegistry(Registry(volume) if cache is None else cache.registry, wiring, budget)
    shadows = Shadows(models, devices, decoder)
    try:
        yield Engine(models, devices, decoder, volume, shadows, loads, cache)
    finally:
        shadows.close()
        await models.close()
        loaders.shutdown(wait=False, cancel_futures=True)
        decoder.close()
        devices.close()


def _cache(volume: Volume, num_bytes: int) -> StoreCache | None:
    if volume.store is None:
        return None
    with volume_errors(volume.home):
        volume.models.mkdir(parents=True, exist_ok=True)
    return StoreCache(volume, ObjectStore(volume.store), num_bytes)


async def _load_warm(
    loaders: Executor, devices: Devices, selectors: Sequence[RuntimeSelector], volume: Volume, located: Located
) -> Served:
    """Load beside what is served, then run it once on each device, so that its first caller doesn't wait."""
    loop, names = asyncio.get_running_loop(), [scheduler.device for scheduler in devices]
    turns = [partial(run_in_turn, scheduler, loop) for scheduler in devices]
    # Not on the threads that prompts are read on: a load takes seconds, and more where the volume is slow.
    served = await loop.run_in_executor(loaders, load, located, names, selectors, turns, volume)
    if isinstance(served, ServedClassifier):
        tried = [await _tried(scheduler, each) for scheduler, each in zip(devices, served.everywhere, strict=True)]
        return replace(tried[0], elsewhere=tuple(tried[1:]))
    ready = [await _writing(scheduler, each) for scheduler, each in zip(devices, served.everywhere, strict=True)]
    return replace(ready[0], elsewhere=tuple(ready[1:]))


async def _writing(scheduler: DeviceScheduler, served: ServedLanguageModel) -> ServedLanguageModel:
    """Run a language model on its device, and let it write texts there."""
    if scheduler.is_alive:
        await scheduler.run(served.runtime.warm)
        scheduler.begin_statistics(*served.runtimes, label=served.located.label)
    return replace(served, texts=TextLoop(served.runtime, scheduler))


async def _tried(scheduler: DeviceScheduler, served: ServedClassifier) -> ServedClassifier:
    """Run a classifier on its device, and find out whether its images may share batches there."""
    if not scheduler.is_alive:
        # Another takes its calls.
        return served
    await scheduler.run(served.runtime.warm)
    joins = (served.selected is not None and served.selected.keeps_rows) or await rows_are_independent(
        scheduler, served.runtime, served.card.preprocessing.image_size
    )
    if not joins:
        log.info("%s gets no shared batches: its answers depend on them in the last bits", served.located.label)
    # What was run to try it out was for no caller.
    scheduler.begin_statistics(*served.runtimes, label=served.located.label)
    return replace(served, joins=joins)


def _authorization(access: ServerAccess) -> tuple[grpc.aio.ServerInterceptor, ...]:
    return () if access.tokens_file is None else (Authorization(TokenFile(access.tokens_file)),)


def _build(
    engine: Engine, health: HealthBoard, boundary: Boundary, before: tuple[grpc.aio.ServerInterceptor, ...]
) -> grpc.aio.Server:
    server = grpc.aio.server(interceptors=(*before, boundary), options=SERVER_OPTIONS)
    inference_pb2_grpc.add_InferenceServicer_to_server(InferenceServicer(engine, boundary.status), server)  # type: ignore[no-untyped-call]
    inference_pb2_grpc.add_ModelsServicer_to_server(ModelsServicer(engine, boundary.status), server)  # type: ignore[no-untyped-call]
    open_inference = OpenInferenceServicer(engine, lambda: health.is_ready, boundary.status)
    grpc_service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(open_inference, server)  # type: ignore[no-untyped-call]
    health_pb2_grpc.add_HealthServicer_to_server(health.servicer, server)
    names = (SERVICE, "tandem.v1.Models", OPEN_INFERENCE, "grpc.health.v1.Health", reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server, Pools())  # type: ignore[arg-type]
    return server


@contextlib.asynccontextmanager
async def _background(engine: Engine, settings: Settings, health: HealthBoard, shedder: Shedder) -> AsyncIterator[None]:
    models = engine.models
    models.on_answers = health.model

    async def refreshed(serving: Mapping[str, bool]) -> None:
        await health.models(serving)
        await health.ready()

    if not await asyncio.to_thread(engine.volume.models.is_dir):
        # Nothing was published yet, or the volume is not there: there is nothing to warm.
        await health.ready()
    looked, look = asyncio.Event(), asyncio.Event()
    cache, announced = engine.cache, models.wake if engine.cache is None else look
    if cache is None:
        looked.set()

    def has_looked(is_new: bool) -> None:
        looked.set()
        if is_new:
            models.wake.set()

    async def watch_models() -> None:
        # With a store, what there is to warm is known after the first look at it.
        await looked.wait()
        await watch_volume(models, engine.volume.models, refreshed)

    async def watch_store_if_any() -> None:
        await (asyncio.Event().wait() if cache is None else watch_store(cache, look, has_looked))

    tasks = [
        asyncio.create_task(keep_running(name, start))
        for name, start in (
            ("the watch of the store", watch_store_if_any),
            ("the watch of the volume", watch_models),
            ("the watch of the event loop", shedder.watch),
            ("the shadows", engine.shadows.run),
            ("the watch of the devices", lambda: watch_devices(engine.devices, health.failed)),
            ("the reader of announcements", lambda: listen(lambda: find_system(settings).broker, announced)),
        )
    ]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def serve(settings: Settings, port_file: Path | None, allow_insecure: bool) -> None:
    """Serve until SIGTERM or SIGINT; a second one ends the process at once."""
    freeze_imports(_imported_later(settings))
    async with running_server(settings, allow_insecure) as running:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, _stop, running.stop, number)
        if port_file is not None:
            with volume_errors(port_file):
                replace_file(port_file, f"{running.address}\n".encode(), durable=False)
        if settings.log_format == "text":
            print(f"listening on {running.address}", flush=True)  # noqa: T201 - what scripts wait for
        else:
            log.info("listening on %s", running.address)
        room = format_size(running.engine.models.budget.num_bytes)
        where = ", ".join(running.engine.devices.names())
        log.info("serving %s on %s, with %s for models", settings.home, where, room)
        await running.stop.wait()


def _imported_later(settings: Settings) -> tuple[str, ...]:
    """Return the modules that the first model would import."""
    with contextlib.suppress(InvalidRequest):
        tried = engines(resolve_devices(settings.device)[0], settings.engine, settings.precision)
        return OPENVINO_MODULES if "openvino" in tried else ()
    return ()


def _stop(stop: asyncio.Event, number: int) -> None:
    if stop.is_set():
        log.warning("told to stop a second time: what is under way is cut off")
        os._exit(128 + number)
    stop.set()


def main() -> None:
    """Read the command line, serve, and exit: 0 after a signal, 1 with one line for what can't be done."""
    arguments = _parser().parse_args()
    try:
        settings = Settings.from_environment(_environment(arguments))
        _log_to_stderr(settings)
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


def _log_to_stderr(settings: Settings) -> None:
    configure_logging(settings.log_level, settings.log_format)
    for handler in logging.getLogger().handlers:
        handler.addFilter(CallFields())
    # It tells of each connection attempt.
    logging.getLogger("asyncio").setLevel(max(logging.getLevelNamesMapping()[settings.log_level], logging.WARNING))


if __name__ == "__main__":
    main()
