"""The published limits: the module has all of them, the metadata tells them, and the contract explains each."""

import inspect
import re
from pathlib import Path

from services.inference.listening import SERVER_OPTIONS
from tandem.wire import limits
from tandem.wire.limits import LIMIT_PREFIX, limits_metadata

ROOT = Path(__file__).parents[2]
CONTRACT = ROOT / "proto/tandem/v1/inference.proto"
LINE = re.compile(r"//   ([a-z]+(?:-[a-z]+)*) +([0-9,]+)( KiB| MiB| GiB)?(?:: .+)?")
UNITS = {"": 1, " KiB": 1024, " MiB": 1024**2, " GiB": 1024**3}


def published(num_devices: int = 1) -> dict[str, int]:
    return {name.removeprefix(LIMIT_PREFIX): int(value) for name, value in limits_metadata(num_devices)}


def test_the_metadata_tells_every_limit_of_the_module() -> None:
    constants = {name: value for name, value in vars(limits).items() if name.startswith("MAX_")}
    told = re.findall(r'"[a-z-]+": (MAX_[A-Z_]+)\b', inspect.getsource(limits_metadata))
    assert sorted(told) == sorted(constants)
    assert sorted(published().values()) == sorted(constants.values())


def test_the_contract_explains_every_limit_with_its_number() -> None:
    head = CONTRACT.read_text().split("syntax =")[0]
    explained = {
        found[1]: int(found[2].replace(",", "")) * UNITS[found[3] or ""]
        for line in head.splitlines()
        if (found := LINE.fullmatch(line))
    }
    assert explained == published()
    assert list(explained) == list(published())


def test_what_is_bounded_for_each_device_is_told_of_all_together() -> None:
    one, three = published(), published(3)
    assert {name for name in one if three[name] == 3 * one[name]} == {
        *("queue-items", "model-queue-items", "queue-bytes", "streams")
    }
    assert sum(three[name] == one[name] for name in one) == len(one) - 4


def test_the_limits_fit_in_the_metadata_that_any_client_takes() -> None:
    # HTTP/2 counts 32 bytes more for each; gRPC's clients begin to refuse at 8 KiB.
    assert sum(len(name) + len(value) + 32 for name, value in limits_metadata(64)) < 6 * 1024


def test_no_other_module_of_the_server_has_limits_of_requests_of_its_own() -> None:
    """A limit that is told to a caller is one of the module, or its message would name what nobody publishes."""
    for path in sorted((ROOT / "services/inference").rglob("*.py")):
        source = path.read_text()
        for name in re.findall(r"limit is \{([A-Z_]+)", source):
            assert hasattr(limits, name), f"{path}: {name}"
            assert not re.search(rf"^{name} = ", source, re.MULTILINE), f"{path}: {name}"


def test_the_server_keeps_those_of_a_connection() -> None:
    options = dict(SERVER_OPTIONS)
    assert options["grpc.max_concurrent_streams"] == limits.MAX_CONNECTION_CALLS
    assert options["grpc.absolute_max_metadata_size"] == limits.MAX_HEADER_BYTES
    assert options["grpc.max_receive_message_length"] == limits.MAX_MESSAGE_BYTES
