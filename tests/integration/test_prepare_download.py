"""Downloads against a server on 127.0.0.1 that can break off, ignore ranges, and change its file."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from prepare_samples import Recorder, tiny_imagenet_files, visible, write_zip

from tandem.data.prepare import download as download_module
from tandem.data.prepare import prepare_text, prepare_tiny_imagenet, prepare_wikitext
from tandem.data.prepare.download import download, public_form
from tandem.errors import BadSource, Conflict, Unavailable
from tandem.volume import Volume


class Served:
    """What the server has, how it behaves, and what it was asked."""

    def __init__(self) -> None:
        self.data = b""
        self.etag = '"1"'
        self.ranges = True
        self.break_after: int | None = None
        self.asked: list[str | None] = []
        self.url = ""

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        asked = handler.headers.get("Range")
        self.asked.append(asked)
        if handler.path == "/missing":
            handler.send_error(404)
            return
        first = int(asked[6:-1]) if asked and self.ranges else 0
        if handler.headers.get("If-Range", self.etag) != self.etag:
            first = 0
        if first and first >= len(self.data):
            handler.send_response(416)
            handler.send_header("Content-Range", f"bytes */{len(self.data)}")
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        handler.send_response(206 if first else 200)
        if first:
            handler.send_header("Content-Range", f"bytes {first}-{len(self.data) - 1}/{len(self.data)}")
        handler.send_header("ETag", self.etag)
        handler.send_header("Content-Length", str(len(self.data) - first))
        handler.end_headers()
        handler.wfile.write(self.data[first:][: self.break_after])


@pytest.fixture
def served() -> Iterator[Served]:
    state = Served()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.answer(self)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}/a.zip"
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def volume(tmp_path: Path) -> Volume:
    return Volume(tmp_path / "home")


def test_a_connection_that_breaks_off_is_taken_up_where_it_broke(served: Served, tmp_path: Path) -> None:
    served.data = bytes(range(256)) * 100
    served.break_after = 10_000
    download(served.url, tmp_path / "a", Recorder())
    assert (tmp_path / "a").read_bytes() == served.data
    assert served.asked == [None, "bytes=10000-", "bytes=20000-"]
    assert visible(tmp_path) == ["a"]


def test_an_interrupted_download_goes_on_in_the_next_call(served: Served, tmp_path: Path) -> None:
    served.data = bytes(3_000_000)
    with pytest.raises(KeyboardInterrupt):
        download(served.url, tmp_path / "a", Recorder(interrupt_at=1))
    have = (tmp_path / "a.part").stat().st_size
    assert 1_000_000 <= have < 3_000_000
    assert not (tmp_path / "a").exists()
    download(served.url, tmp_path / "a", Recorder())
    assert served.asked == [None, f"bytes={have}-"]
    assert (tmp_path / "a").read_bytes() == served.data


def test_a_server_that_ignores_ranges_and_one_with_another_file_send_it_all(served: Served, tmp_path: Path) -> None:
    for ranges, etag in ((False, '"1"'), (True, '"2"')):
        served.data, served.ranges, served.etag, served.asked = b"old" * 500_000, True, '"1"', []
        with pytest.raises(KeyboardInterrupt):
            download(served.url, tmp_path / etag, Recorder(interrupt_at=1))
        served.data, served.ranges, served.etag = b"new" * 400_000, ranges, etag
        download(served.url, tmp_path / etag, Recorder())
        assert (tmp_path / etag).read_bytes() == served.data
        assert len(served.asked) == 2


def test_a_part_that_is_the_whole_file_or_more(served: Served, tmp_path: Path) -> None:
    served.data = b"0123456789"
    (tmp_path / "a.part").write_bytes(served.data)
    (tmp_path / "b.part").write_bytes(b"something longer")
    for name in "ab":
        download(served.url, tmp_path / name, Recorder())
        assert (tmp_path / name).read_bytes() == served.data


def test_two_downloads_of_the_same(served: Served, tmp_path: Path) -> None:
    import fcntl

    with open(tmp_path / "a.part", "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(Conflict, match="being downloaded by another process"):
            download(served.url, tmp_path / "a", Recorder())


def test_failures_of_the_network_are_one_line_with_the_remedy(
    served: Served, volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download_module, "TIMEOUT_S", 2.0)
    served.data, served.break_after = bytes(10_000), 0
    nobody = "http://127.0.0.1:9/a.zip"
    cases = {nobody: "Connection refused", served.url.replace("a.zip", "missing"): "404", served.url: "broke off"}
    for url, reason in cases.items():
        with pytest.raises(Unavailable, match=rf"can't download {url}: .*{reason}.*--source FILE") as caught:
            prepare_tiny_imagenet(volume, url)
        assert "\n" not in str(caught.value)
    assert visible(volume.datasets) == [".downloads"]


def test_other_schemes(volume: Volume, tmp_path: Path) -> None:
    with pytest.raises(BadSource, match="no http, https or file address"):
        prepare_wikitext(volume, "s3://bucket/a.zip")
    text = tmp_path / "a b.txt"
    text.write_text("a b\nc d\ne f\n")
    assert prepare_text(volume, text.as_uri(), "a").num_tokens["train"] == 3


def test_a_dataset_by_address_asks_the_server_once(served: Served, volume: Volume, tmp_path: Path) -> None:
    served.data = write_zip(tmp_path / "a.zip", tiny_imagenet_files(), "tiny-imagenet-200/").read_bytes()
    first = prepare_tiny_imagenet(volume, served.url, checksum=False)
    assert prepare_tiny_imagenet(volume, served.url, checksum=False) == first
    assert len(served.asked) == 1
    assert first.source == served.url
    # The same archive from a file is the same source.
    assert prepare_tiny_imagenet(volume, tmp_path / "a.zip", checksum=False) == first
    assert list((volume.datasets / ".downloads").iterdir()) == []


def test_a_download_with_a_wrong_checksum_goes(served: Served, volume: Volume, tmp_path: Path) -> None:
    served.data = write_zip(tmp_path / "a.zip", tiny_imagenet_files()).read_bytes()
    with pytest.raises(BadSource, match="altered or truncated"):
        prepare_tiny_imagenet(volume, served.url)
    assert list((volume.datasets / ".downloads").iterdir()) == []


def test_what_was_downloaded_stays_when_preparing_is_interrupted(
    served: Served, volume: Volume, tmp_path: Path
) -> None:
    served.data = write_zip(tmp_path / "a.zip", tiny_imagenet_files()).read_bytes()

    class InterruptedLater(Recorder):
        def advance(self, units: int = 1) -> None:
            if self.stages[-1] == "preparing images":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_tiny_imagenet(volume, served.url, checksum=False, progress=InterruptedLater())
    prepare_tiny_imagenet(volume, served.url, checksum=False)
    assert len(served.asked) == 1


def test_no_password_is_recorded() -> None:
    found = public_form("https://user:secret@host/a.zip?token=secret")
    assert found.startswith("https://host/a.zip?sha256=")
    assert "secret" not in found
    assert found != public_form("https://host/a.zip?token=other")
