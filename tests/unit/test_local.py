"""The system on one machine: where things are found, and what names a process for good."""

import os
import subprocess
from pathlib import Path

import pytest

from tandem.errors import BrokerUnavailable, InvalidRequest, ServerUnavailable, VolumeUnavailable
from tandem.local.broker import broker_url, server_command, socket_path
from tandem.local.stack import _metrics_of_inference
from tandem.local.state import (
    STATE_FILE,
    Service,
    SystemState,
    find_system,
    is_alive,
    own_service,
    process_start_time,
    read_state,
    require_broker,
    require_inference_address,
)
from tandem.settings import Settings
from tandem.volume import Volume, replace_file, replace_json, volume_errors


def settings(home: Path, **variables: str) -> Settings:
    return Settings.from_environment({"TANDEM_HOME": str(home), **variables})


def write_state(home: Path, manager: Service) -> None:
    (home / "local").mkdir()
    addresses = {"broker": "redis://broker:1/0", "inference": "inference-address"}
    services = {name: Service(pid=1, start_time=1, address=address) for name, address in addresses.items()}
    replace_json(home / "local" / STATE_FILE, SystemState(manager=manager, services=services).model_dump())


def test_addresses_come_from_the_environment_first_and_from_up_second(tmp_path: Path) -> None:
    with pytest.raises(BrokerUnavailable, match="tandem up"):
        require_broker(settings(tmp_path))
    with pytest.raises(ServerUnavailable, match="tandem up"):
        require_inference_address(settings(tmp_path))
    write_state(tmp_path, own_service())
    assert str(require_broker(settings(tmp_path))) == "redis://broker:1/0"
    assert require_inference_address(settings(tmp_path)) == "inference-address"
    assert str(find_system(settings(tmp_path, REDIS_URL="redis://elsewhere")).broker) == "redis://elsewhere:6379/0"


def test_the_state_of_a_dead_manager_counts_for_nothing(tmp_path: Path) -> None:
    process = subprocess.Popen(["true"])
    gone = Service(pid=process.pid, start_time=process_start_time(process.pid) or 1)
    process.wait()
    write_state(tmp_path, gone)
    assert read_state(Volume(tmp_path)) is None
    assert not is_alive(Service(pid=os.getpid(), start_time=1)), "the pid lives on as another process"


def test_a_long_home_gets_a_short_socket(tmp_path: Path) -> None:
    assert socket_path(tmp_path / "x") == tmp_path / "x" / "broker.sock"
    long = socket_path(tmp_path / ("d" * 100))
    assert len(str(long)) < 100
    assert broker_url(long) == f"redis+socket://{long}?virtual_host=0"
    long.parent.rmdir()


def test_the_embedded_broker_listens_on_no_port_and_forgets_nothing(tmp_path: Path) -> None:
    command = server_command(tmp_path / "s", tmp_path)
    options = dict(zip(command[1::2], command[2::2], strict=True))
    assert options["--port"] == "0"
    assert options["--unixsocketperm"] == "700"
    assert options["--appendonly"] == "yes"
    assert options["--maxmemory-policy"] == "noeviction"


@pytest.mark.parametrize(
    ("listen", "expected"),
    [
        (None, {}),
        (("127.0.0.1", 0), {"TANDEM_METRICS_LISTEN": "127.0.0.1:0"}),
        (("127.0.0.1", 9464), {"TANDEM_METRICS_LISTEN": "127.0.0.1:9465"}),
        (("::1", 9464), {"TANDEM_METRICS_LISTEN": "[::1]:9465"}),
    ],
)
def test_trainer_and_inference_of_one_machine_share_no_port(
    listen: tuple[str, int] | None, expected: dict[str, str]
) -> None:
    assert _metrics_of_inference(listen) == expected


def test_a_setting_that_makes_no_sense_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="TANDEM_LEASE_S='soon'"):
        settings(tmp_path, TANDEM_LEASE_S="soon")
    with pytest.raises(InvalidRequest, match="TANDEM_STOP_GRACE_S='-1'"):
        settings(tmp_path, TANDEM_STOP_GRACE_S="-1")
    assert settings(tmp_path).lease_s == 5.0


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    replace_file(path, b"old")
    with pytest.raises(VolumeUnavailable, match="can't write"), volume_errors(tmp_path):
        replace_file(tmp_path / "missing" / "a.json", b"new")
    with pytest.raises(ValueError, match="not JSON compliant"):
        replace_json(path, {"loss": float("nan")})
    assert path.read_bytes() == b"old"
    assert [each.name for each in tmp_path.iterdir()] == ["a.json"]
