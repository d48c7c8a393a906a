"""The rig as a fixture."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from rig import Bench, answers
from samples import write_image_dataset, write_text_dataset
from waiting import wait_for

from tandem.local.broker import broker_url, socket_path
from tandem.volume import Volume


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """A fresh volume and broker, and no worker yet."""
    volume = Volume(tmp_path / "home")
    volume.home.mkdir()
    write_image_dataset(volume, "shapes")
    write_text_dataset(volume, "words")
    path = socket_path(volume.home)
    bench = Bench(volume, broker_url(path), broker=subprocess.Popen(["true"]))
    bench.start_broker()
    try:
        wait_for(lambda: answers(bench), "the broker")
        yield bench
    finally:
        bench.stop()
