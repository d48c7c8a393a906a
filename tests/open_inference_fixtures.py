"""A server that the public client of the Open Inference Protocol calls: a plugin for the modules that name it."""

from collections.abc import Iterator
from typing import Any

import pytest
import tritonclient.grpc as triton
from factories import publish_classifier, publish_language_model
from open_inference import InProcess

from tandem.client import Client
from tandem.volume import Volume


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcess]:
    """Two versions of a classifier `pictures`, one of `others`, a language model `words`."""
    volume = Volume(tmp_path_factory.mktemp("oip"))
    publish_classifier(volume, "pictures", "run-1", seed=12)
    publish_classifier(volume, "pictures", "run-2", seed=13)
    publish_classifier(volume, "others", "run-3", seed=14)
    publish_language_model(volume, "words", "run-l")
    host = InProcess(volume.home)
    try:
        yield host
    finally:
        host.close()


@pytest.fixture
def public(host: InProcess) -> Iterator[Any]:
    with triton.InferenceServerClient(host.address) as client:
        yield client


@pytest.fixture
def ours(host: InProcess) -> Iterator[Client]:
    with Client(host.address) as client:
        yield client
