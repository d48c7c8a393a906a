"""A quarter of an hour of mixed load, while models are loaded and unloaded: what the server holds of memory over it.

TANDEM_BENCH_SOAK_S (900) shortens it.
"""

import os
import threading
import time
from pathlib import Path

import grpc

from benchmarks.serving.client import Load, start
from benchmarks.serving.plant import Server, publish_classifier, publish_language_model, serving, volume, write_jpegs
from benchmarks.serving.text_client import TextLoad
from benchmarks.serving.text_client import start as start_texts
from tandem.wire.oip import grpc_service_pb2 as oip
from tandem.wire.oip import grpc_service_pb2_grpc as rpc

# Allocators and caches have their size by then.
WARM_UP_S = 90.0
EACH_S = 5.0
VISITORS = ("visitor-a", "visitor-b")


def main(rounds: int, seconds: float) -> None:
    """Print what the server held."""
    del rounds, seconds
    lasts_s = float(os.environ.get("TANDEM_BENCH_SOAK_S", "900"))
    with volume() as home:
        publish_classifier(home)
        for name in VISITORS:
            publish_classifier(home, name, run_id=name)
        for model in ("LSTM", "Transformer"):
            publish_language_model(home, model)
        images = write_jpegs(home.home / "jpegs")
        with serving(home.home, "resnet", "lstm", "transformer") as server:
            _soak(server, images, lasts_s)


class Visits(threading.Thread):
    """Loads two more classifiers in turns, asks each once, and unloads them, until `ends_at`."""

    def __init__(self, address: str, ends_at: float) -> None:
        super().__init__()
        self.count = 0
        self._address, self._ends_at = address, ends_at

    def run(self) -> None:
        """See the class."""
        with grpc.insecure_channel(self._address) as channel:
            stub = rpc.GRPCInferenceServiceStub(channel)  # type: ignore[no-untyped-call]
            while time.monotonic() < self._ends_at:
                name = VISITORS[self.count % len(VISITORS)]
                stub.RepositoryModelLoad(oip.RepositoryModelLoadRequest(model_name=name))
                stub.ModelMetadata(oip.ModelMetadataRequest(name=name))
                stub.RepositoryModelUnload(oip.RepositoryModelUnloadRequest(model_name=name))
                self.count += 1


def _soak(server: Server, images: Path, lasts_s: float) -> None:
    loads = [
        start(Load(server.address, str(images), lasts_s, in_flight=4)),
        start(Load(server.address, str(images), lasts_s, batch=32, in_flight=1)),
    ]
    texts = [start_texts(TextLoad(server.address, name, 3, lasts_s)) for name in ("lstm", "transformer")]
    visits = Visits(server.address, time.monotonic() + lasts_s)
    visits.start()
    held: list[tuple[float, float]] = []
    began = time.monotonic()
    while (passed := time.monotonic() - began) < lasts_s:
        time.sleep(min(EACH_S, lasts_s - passed))
        held.append((time.monotonic() - began, server.resident_mib))
    visits.join()
    seen, written = [load.result() for load in loads], [each.result() for each in texts]
    warm = next((mib for at, mib in held if at >= min(WARM_UP_S, lasts_s / 3)), held[0][1])
    calls, words = sum(len(each.latencies_ms) for each in seen), sum(each.words for each in written)
    failed = sum(count for each in seen for code, count in each.codes.items() if code != "OK")
    print(f"{lasts_s:g} s, {calls:,} calls of classify, {words:,} words, {visits.count} loads and unloads")
    print(f"failed calls: {failed} (target 0)")
    print(
        f"resident: {warm:.0f} MiB after warm-up, at most {max(mib for _, mib in held):.0f}, "
        f"{held[-1][1]:.0f} at the end"
    )
    print(f"end / after warm-up: {held[-1][1] / warm:.3f} (target 1.05)")
