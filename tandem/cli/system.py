"""`tandem up`, `down` and `status`: the whole system on this machine."""

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from tandem.access import ClientAccess
from tandem.cli.output import console, json_option, print_json, table
from tandem.errors import Conflict, TandemError, Unavailable
from tandem.jobs.broker import Broker
from tandem.jobs.store import JobStore, connect
from tandem.local.state import SystemState, find_system, is_alive, read_state
from tandem.settings import Settings
from tandem.volume import Volume, volume_errors

if TYPE_CHECKING:
    from rich.table import Table

_PORT = click.IntRange(0, 65_535)
_POLL_S = 0.05
_DETACH_TIMEOUT_S = 120.0
_DOWN_TIMEOUT_S = 150.0
_SERVICES = ("broker", "trainer", "inference", "tensorboard")


@click.command()
@click.option("--detach", "-d", is_flag=True, help="Return when everything answers, and leave it running.")
@click.option("--port", type=_PORT, default=0, help="Of the inference server; 0 takes a free one.  [default: 0]")
@click.option("--tensorboard-port", type=_PORT, default=0, help="0 takes a free one.  [default: 0]")
@click.option("--no-tensorboard", is_flag=True, help="Leave TensorBoard out.")
@json_option
def up(detach: bool, port: int, tensorboard_port: int, no_tensorboard: bool, as_json: bool) -> None:
    """Run broker, trainer, inference and TensorBoard on loopback until Ctrl-C, or 'tandem down'."""
    settings = Settings.from_environment()
    if detach:
        _detached(settings, as_json)
        return
    from tandem.local.manager import run_stack
    from tandem.local.stack import Ports, Stack

    def say(line: str) -> None:
        click.echo(line, err=True)

    def ready(stack: Stack) -> None:
        _print_status(system_status(stack.settings), stack.settings.home, as_json)
        if not as_json:
            click.echo("Ctrl-C stops it all; runs in progress are saved, and go on at the next 'tandem up'")

    run_stack(settings, Ports(port, tensorboard_port), not no_tensorboard, say, ready)


def _detached(settings: Settings, as_json: bool) -> None:
    """Start this same command again without a terminal, and wait until it is ready or has failed."""
    volume = Volume(settings.home, settings.checkpoint_store)
    if read_state(volume) is not None:
        raise Conflict(f"{settings.home} has a system running already; 'tandem status' shows it")
    with volume_errors(volume.local):
        volume.local.mkdir(parents=True, exist_ok=True)
        log = open(volume.local / "up.log", "wb")  # noqa: SIM115 - the child keeps it
    arguments = [argument for argument in sys.argv[1:] if argument not in ("--detach", "-d", "--json")]
    command = [sys.executable, "-m", "tandem", *arguments]
    with log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        _await_start(process, volume)
    except BaseException:
        # Also on Ctrl-C: what was not ready is not left running.
        process.terminate()
        process.wait()
        raise
    _print_status(system_status(settings), settings.home, as_json)


def _await_start(process: "subprocess.Popen[bytes]", volume: Volume) -> None:
    deadline = time.monotonic() + _DETACH_TIMEOUT_S
    while (state := read_state(volume)) is None or state.manager.pid != process.pid:
        if process.poll() is not None:
            raise Unavailable(_last_line(volume.local / "up.log"))
        if time.monotonic() > deadline:
            raise Unavailable(f"the system did not start in {_DETACH_TIMEOUT_S:.0f} s; see {volume.local}")
        time.sleep(_POLL_S)


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("tandem: ") if lines else f"the system ended at once; see {log}"


@click.command()
@json_option
def down(as_json: bool) -> None:
    """Stop what 'tandem up' started; runs in progress are saved first."""
    settings = Settings.from_environment()
    state = read_state(Volume(settings.home, settings.checkpoint_store))
    if state is not None:
        os.kill(state.manager.pid, signal.SIGTERM)
        _await_end(state)
    if as_json:
        print_json({"stopped": state is not None})
    else:
        click.echo("stopped" if state is not None else "nothing was running")


def _await_end(state: SystemState) -> None:
    deadline = time.monotonic() + _DOWN_TIMEOUT_S
    while is_alive(state.manager):
        if time.monotonic() > deadline:
            raise Unavailable(f"process {state.manager.pid} has not stopped in {_DOWN_TIMEOUT_S:.0f} s")
        time.sleep(_POLL_S)


@click.command()
@json_option
def status(as_json: bool) -> None:
    """Say what runs, and where."""
    settings = Settings.from_environment()
    _print_status(system_status(settings), settings.home, as_json)


def system_status(settings: Settings) -> dict[str, dict[str, Any]]:
    """Return for each service whether it answers, its address, and its process where we started it."""
    state = read_state(Volume(settings.home, settings.checkpoint_store))
    found = find_system(settings)
    result: dict[str, dict[str, Any]] = {}
    for name in _SERVICES:
        service = state.services.get(name) if state else None
        started = service is not None and service.pid > 0
        result[name] = {
            "running": started and service is not None and is_alive(service),
            "address": service.address if service else None,
            "pid": service.pid if started and service else None,
            "log": service.log if service else None,
        }
    problem = _broker_problem(found.broker)
    address = None if found.broker is None else str(found.broker)
    result["broker"].update(address=address, running=problem == "", problem=problem)
    result["trainer"].update(workers=_workers(found.broker) if problem == "" else [])
    result["trainer"]["running"] = result["trainer"]["running"] or bool(result["trainer"]["workers"])
    result["inference"].update(
        address=found.inference_address, **_inference_health(found.inference_address, settings.client_access)
    )
    return result


def _broker_problem(broker: Broker | None) -> str | None:
    """Return why the broker does not answer, "" where it does, None where none is known."""
    if broker is None:
        return None
    try:
        JobStore(connect(broker), broker).ping()
    except TandemError as error:
        return str(error)
    return ""


def _workers(broker: Broker | None) -> list[dict[str, Any]]:
    try:
        return JobStore(connect(broker), broker).workers() if broker else []
    except TandemError:
        return []


def _inference_health(address: str | None, access: ClientAccess) -> dict[str, Any]:
    """Return whether the inference server serves, and the `problem` where it does not speak with us."""
    if address is None:
        return {"running": False}
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    from tandem.wire.channel import open_channel
    from tandem.wire.handshakes import tls_problem

    try:
        with closing(open_channel(address, access)) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=2.0)
    except grpc.RpcError as error:
        # grpcio's types don't say that a call that failed is a call too.
        details = cast(Any, error).details() or ""
        return {"running": False, "problem": tls_problem(details, address, access.is_encrypted)}
    except TandemError as error:
        return {"running": False, "problem": str(error)}
    return {"running": answer.status == health_pb2.HealthCheckResponse.SERVING}


def _print_status(services: dict[str, dict[str, Any]], home: Path, as_json: bool) -> None:
    if as_json:
        print_json({**services, "home": str(home)})
        return
    result = table("service", "state", "address", "log")
    for name, facts in services.items():
        result.add_row(name, "running" if facts["running"] else "-", facts["address"] or "", facts["log"] or "")
    console().print(result)
    if workers := services["trainer"]["workers"]:
        console().print(_worker_table(workers))
    for name in ("broker", "inference"):
        if problem := services[name].get("problem"):
            click.echo(problem)
    click.echo(f"data, runs and models: {home}")


def _worker_table(workers: list[dict[str, Any]]) -> "Table":
    result = table("worker", "slots", "queues")
    for worker in workers:
        # Those for several devices go without saying.
        queues = [queue for queue in worker["queues"] if "-x" not in queue]
        result.add_row(worker["worker"], str(worker.get("slots", 1)), ", ".join(queues))
    return result
