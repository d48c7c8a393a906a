"""A server with real checkpoints of small networks: a plugin, shared by all test modules that name it."""

from collections.abc import Iterator

import pytest
from factories import CLASS_IDS, MODELS, publish_classifier, publish_language_model, write_image_dataset
from inference_server import BROKEN_PLACES, ServerProcess, start_server
from waiting import PATIENCE_S

from tandem.client import Client
from tandem.volume import Volume


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Classifiers a, b (classes in reverse) and three (classes), a language model of each kind, a dataset.

    The seeds are such that a and b name several classes, and the same one at times. Of three there are two versions
    with the same weights.
    """
    directory = tmp_path_factory.mktemp("server")
    volume = Volume(directory / "home")
    publish_classifier(volume, "a", "run-a", seed=12)
    publish_classifier(volume, "b", "run-b", seed=13, classes=CLASS_IDS[::-1])
    for run_id in ("run-three-1", "run-three-2"):
        publish_classifier(volume, "three", run_id, seed=2, classes=CLASS_IDS[:3], arch="shufflenet_v2_x0_5")
    for model in MODELS:
        publish_language_model(volume, model, f"run-{model}", model)
    write_image_dataset(volume, "shapes", 70, BROKEN_PLACES)
    server = start_server(directory, volume)
    try:
        yield server
        assert server.stop() == 0
    finally:
        server.kill()
    assert "Traceback" not in server.log.read_text()


@pytest.fixture(scope="session")
def client(server: ServerProcess) -> Iterator[Client]:
    """A client of the server; the models are loaded."""
    with Client(server.address) as client:
        client.wait_until_serving("Transformer", timeout_s=PATIENCE_S)
        client.wait_until_serving("a", timeout_s=PATIENCE_S)
        yield client
