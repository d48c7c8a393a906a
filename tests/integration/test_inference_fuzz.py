"""Every string field of every request, and requests of any bytes: documented status codes, and no file elsewhere."""

import asyncio
import os
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from factories import png, publish_classifier, publish_language_model, write_image_dataset
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.inference.server import running_server
from tandem.settings import Settings
from tandem.volume import Volume
from tandem.wire.oip import grpc_service_pb2 as oip
from tandem.wire.v1 import inference_pb2 as pb

ROOT = Path(__file__).parents[2]
DOCUMENTED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    # A dataset that is no image dataset, or models that can't be compared.
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.ABORTED,
}
NAMES_OF_MODELS = ("model", "model_a", "model_b", "model_name", "name")
SECRET = "the secret of the file outside"
# Their strings that name a model would take it out of service for the others.
LEFT_OUT = {"RepositoryModelUnload", "UnloadModel"}
# Its stream goes on until the caller leaves.
ENDLESS = "/WatchModels"
METHODS: dict[str, tuple[Any, Any]] = {
    f"/{service.full_name}/{method.name}": (GetMessageClass(method.input_type), method)
    for file in (pb.DESCRIPTOR, oip.DESCRIPTOR)
    for service in file.services_by_name.values()
    for method in service.methods
    if method.name not in LEFT_OUT
}
HOSTILE = (
    "..",
    "../..",
    "../outside",
    "/etc/passwd",
    "pictures/../../outside",
    "run:../../outside",
    "run:run-c/../../..",
    "run:run-c/1",
    "pictures@../x",
    "pictures:1",
    "pictures:99999999999999999999",
    "pictures\0",
    "pictures\n",
    "shapes",
    "words",
    "%2e%2e%2f",
    "\u202epictures",
    "．．／",
    "a" * 70_000,
    "",
    " ",
)

# Which files are opened while a fuzzed call is under way. A hook can't be taken away again, so it is told when to look.
_opened: set[str] = set()
_watching = threading.Event()


def _on_event(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching.is_set() and event in ("open", "os.listdir", "os.scandir") and isinstance(arguments[0], str | bytes):
        _opened.add(os.path.realpath(os.fsdecode(arguments[0])))


class InProcess:
    """A server of this process, on an event loop of its own thread, and a channel to it."""

    def __init__(self, home: Path) -> None:
        self.loop = asyncio.new_event_loop()
        self.started, self.stop = threading.Event(), asyncio.Event()
        self.address = ""
        environment = {"TANDEM_LISTEN": "127.0.0.1:0", "TANDEM_HOME": str(home), "TANDEM_DEVICE": "cpu"}
        self.settings = Settings.from_environment(environment)
        self.thread = threading.Thread(target=self.loop.run_until_complete, args=(self.serve(),))
        self.thread.start()
        assert self.started.wait(60)
        self.channel = grpc.insecure_channel(self.address)

    async def serve(self) -> None:
        async with running_server(self.settings) as running:
            for reference in ("pictures", "words"):
                await running.engine.models.get(reference)
            self.address = running.address
            self.started.set()
            await self.stop.wait()

    def close(self) -> None:
        self.channel.close()
        self.loop.call_soon_threadsafe(self.stop.set)
        self.thread.join(30)
        assert not self.thread.is_alive()

    def call(self, method: str, data: bytes) -> tuple[grpc.StatusCode, str]:
        """Return the status that `method` ends with, and its message; of a stream without an error, what it said."""
        shape, said = METHODS[method][1], b""
        kinds = ["stream" if streams else "unary" for streams in (shape.client_streaming, shape.server_streaming)]
        make: Any = getattr(self.channel, "_".join(kinds))
        try:
            answer: Any = make(method)(iter([data]) if shape.client_streaming else data, timeout=240)
            for each in answer if shape.server_streaming else ():
                said += each
                if method.endswith(ENDLESS):
                    answer.cancel()
                    break
        except grpc.RpcError as error:
            refused: Any = error
            return refused.code(), refused.details()
        return grpc.StatusCode.OK, said.decode(errors="replace")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcess]:
    directory = tmp_path_factory.mktemp("fuzz")
    volume = Volume(directory / "home")
    publish_classifier(volume, "pictures", "run-c")
    publish_language_model(volume, "words", "run-l")
    write_image_dataset(volume, "shapes", 4)
    (directory / "outside").mkdir()
    (directory / "outside" / "manifest.json").write_text(SECRET)
    server = InProcess(volume.home)
    try:
        yield server
    finally:
        server.close()


@pytest.fixture(scope="module", autouse=True)
def hook() -> None:
    sys.addaudithook(_on_event)


texts = st.one_of(st.sampled_from(HOSTILE), st.text(max_size=60), st.sampled_from(("pictures", "words", "shapes")))


byte_strings = st.sampled_from((png(0), b"", b"GIF89a", png(0)[:50], len(png(0)).to_bytes(4, "little") + png(0)))


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, Message]:
    """Draw a method and a request of it, any string of which may be hostile; its numbers keep the work small."""
    method = draw(st.sampled_from(sorted(METHODS)))
    request: Message = METHODS[method][0]()
    fill(draw, request)
    return method, request


def fill(draw: st.DrawFn, message: Any) -> None:
    for field in message.DESCRIPTOR.fields:
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            values, entries = field.message_type.fields_by_name["value"], getattr(message, field.name)
            for key in draw(st.lists(texts | st.sampled_from(("seed", "priority", "classification")), max_size=2)):
                if values.message_type is None:
                    entries[key] = draw(_elements(values))
                else:
                    fill(draw, entries[key])
        elif field.message_type is not None:
            if field.is_repeated:
                for _ in range(draw(st.integers(0, 2))):
                    fill(draw, getattr(message, field.name).add())
            elif draw(st.booleans()):
                fill(draw, getattr(message, field.name))
        elif field.is_repeated:
            getattr(message, field.name).extend(draw(st.lists(_elements(field), max_size=4)))
        elif field.type == FieldDescriptor.TYPE_STRING:
            setattr(message, field.name, draw(texts))
        elif field.type == FieldDescriptor.TYPE_BYTES:
            setattr(message, field.name, draw(byte_strings))
        elif field.type == FieldDescriptor.TYPE_BOOL:
            setattr(message, field.name, draw(st.booleans()))
        elif field.type in (FieldDescriptor.TYPE_DOUBLE, FieldDescriptor.TYPE_FLOAT):
            setattr(message, field.name, draw(st.floats(-2, 2) | st.sampled_from((float("nan"), float("inf")))))
        elif field.type in (FieldDescriptor.TYPE_UINT64, FieldDescriptor.TYPE_UINT32):
            setattr(message, field.name, draw(st.integers(0, 2**32 - 1)))
        else:
            setattr(message, field.name, draw(st.integers(-3, 9)))


def _elements(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    if field.type == FieldDescriptor.TYPE_STRING:
        return texts
    if field.type == FieldDescriptor.TYPE_BYTES:
        return byte_strings
    return st.booleans() if field.type == FieldDescriptor.TYPE_BOOL else st.integers(0, 9)


BOUNDED = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))


def check(server: InProcess, method: str, data: bytes, tried: "Counter[str]") -> None:
    _opened.clear()
    _watching.set()
    try:
        code, message = server.call(method, data)
    finally:
        _watching.clear()
    tried[f"hostile requests that ended with {code.name}"] += 1
    assert code in DOCUMENTED, (method, code, message)
    for inside in (SECRET, "Traceback", str(server.settings.home), "outside/manifest"):
        assert inside not in message
    elsewhere = {path for path in _opened if not Path(path).is_relative_to(server.settings.home)}
    # Servers of other tests may live in this process; what is beside this one's home counts.
    here = server.settings.home.parent
    elsewhere = {path for path in elsewhere if Path(path).is_relative_to(here) or here.parent not in Path(path).parents}
    # Modules that are imported late.
    # A load that goes on beside asks how much memory this process takes.
    ours = (sys.prefix, sys.base_prefix, str(ROOT), f"/proc/{os.getpid()}/status")
    assert not {path for path in elsewhere if not path.startswith(ours)}, method


def test_hostile_strings_reach_no_file_outside_the_volume(server: InProcess, tried: "Counter[str]") -> None:
    @BOUNDED
    @given(requests())
    def fuzz(drawn: tuple[str, Message]) -> None:
        method, request = drawn
        check(server, method, request.SerializeToString(), tried)

    fuzz()


def test_the_hook_sees_what_is_opened(server: InProcess) -> None:
    # Else the test above could not fail.
    _opened.clear()
    _watching.set()
    try:
        request = pb.CompareDatasetRequest(model_a="pictures", model_b="pictures", dataset="shapes")
        code, message = server.call("/tandem.v1.Inference/CompareDataset", request.SerializeToString())
        assert code == grpc.StatusCode.OK, message
    finally:
        _watching.clear()
    assert any(Path(path).is_relative_to(server.settings.home / "datasets" / "shapes") for path in _opened)


def test_each_hostile_name_in_each_string_field(server: InProcess, tried: "Counter[str]") -> None:
    for method, (kind, _) in sorted(METHODS.items()):
        for field in kind.DESCRIPTOR.fields:
            # The id comes back with the answer, whatever it is.
            if field.name == "id" or field.type != FieldDescriptor.TYPE_STRING or field.is_repeated:
                continue
            for name in HOSTILE:
                request = kind(**{each: "pictures" for each in NAMES_OF_MODELS if has(kind, each)})
                if has(kind, "images"):
                    request.images.add(data=png(0))
                if has(kind, "dataset"):
                    request.dataset = "shapes"
                if method.endswith("/SetAlias"):
                    request.alias, request.version = "x", 1
                if has(kind, "texts"):
                    request.texts.append("the cat")
                setattr(request, field.name, name)
                check(server, method, request.SerializeToString(), tried)


def test_each_hostile_name_within_a_stream(server: InProcess, tried: "Counter[str]") -> None:
    for name in HOSTILE:
        request = pb.ClassifyRequest(model=name, images=[pb.Image(data=png(0), name=name, label=name)])
        streamed = pb.ClassifyStreamRequest(id=name, request=request)
        check(server, "/tandem.v1.Inference/ClassifyStream", streamed.SerializeToString(), tried)


def has(kind: Any, name: str) -> bool:
    return name in kind.DESCRIPTOR.fields_by_name


def test_any_bytes_for_a_request(server: InProcess, tried: "Counter[str]") -> None:
    raw = pb.Image(raw=pb.RawImage(width=2, height=2, rgb=bytes(12)))
    images = [pb.Image(data=png(0), name="a"), raw]
    whole = pb.ClassifyRequest(model="pictures", images=images, top_k=2).SerializeToString()

    @BOUNDED
    @given(
        st.sampled_from(sorted(METHODS)),
        st.one_of(
            st.binary(max_size=200),
            st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)).map(
                lambda change: whole[: change[0]] + bytes([change[1]]) + whole[change[0] + 1 :]
            ),
        ),
    )
    def fuzz(method: str, data: bytes) -> None:
        # A number of words that is drawn by chance may be as large as the limit.
        if method.endswith(("/Generate", "/Complete")) and has_many_words(data):
            return
        check(server, method, data, tried)

    fuzz()


def has_many_words(data: bytes) -> bool:
    try:
        return bool(pb.GenerateRequest.FromString(data).sampling.max_words > 1000)
    except DecodeError:
        return False
