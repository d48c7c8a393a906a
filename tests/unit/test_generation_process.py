"""The process that generates on this machine: what is said when it ends as it should not."""

import sys
from pathlib import Path

import pytest

from tandem.errors import InvalidRequest, Unavailable
from tandem.generation.process import run_generation
from tandem.generation.request import GenerationRequest, SamplingRequest
from tandem.wire.results import TextPiece

PIECE = '{"piece": {"text": "a b", "words": ["a", "b"]}}'


@pytest.fixture
def request_(tmp_path: Path) -> GenerationRequest:
    sampling = SamplingRequest(
        temperature=1.0, top_k=0, top_p=0.0, seed=1, min_p=0.0, repetition_penalty=1.0, stop=(), random_start=False
    )
    return GenerationRequest(
        checkpoint=tmp_path,
        digest=None,
        name="",
        version=0,
        run_id="r",
        device="cpu",
        prompt=None,
        max_words=3,
        sampling=sampling,
    )


@pytest.mark.parametrize(
    ("program", "line"),
    [
        ("import os; os.kill(os.getpid(), 9)", "was killed; the machine may be out of memory"),
        ("raise RuntimeError('out of cheese')", "failed: RuntimeError: out of cheese"),
        (f"print('{PIECE}')", "ended with 0 and said nothing"),
        ("print('{\"piece\"')", "ended with"),
    ],
)
def test_a_process_that_gives_no_summary(program: str, line: str, request_: GenerationRequest) -> None:
    with pytest.raises(Unavailable, match=line):
        list(run_generation(request_, (sys.executable, "-c", program)))


def test_its_error_is_told_after_the_words(request_: GenerationRequest) -> None:
    program = f"print('{PIECE}'); print('{{\"error\": \"one line\"}}')"
    steps = run_generation(request_, (sys.executable, "-c", program))
    assert next(steps) == TextPiece("a b", ("a", "b"))
    with pytest.raises(InvalidRequest, match=r"^one line$"):
        next(steps)


def test_who_stops_listening_ends_it(request_: GenerationRequest, tmp_path: Path) -> None:
    program = (
        "import time, os, sys\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
        f"print('{PIECE}', flush=True); time.sleep(60)"
    )
    steps = run_generation(request_, (sys.executable, "-c", program))
    next(steps)
    pid = int((tmp_path / "pid").read_text())
    assert Path(f"/proc/{pid}").exists()
    steps.close()  # type: ignore[attr-defined]
    assert not Path(f"/proc/{pid}").exists()
