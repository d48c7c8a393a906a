"""A generation in a process of its own, as the command line holds it. Free of torch."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

from pydantic import TypeAdapter

from tandem.errors import InvalidRequest, Unavailable
from tandem.generation.request import GenerationRequest
from tandem.openmp import limit_spinning
from tandem.processes import how_it_ended, stop
from tandem.wire.results import GenerationSummary, TextPiece

# It has nothing to save.
_STOP_S = 1.0
# -P: a file called torch.py in the directory where the command is run is not the package.
_COMMAND = (sys.executable, "-P", "-m", "tandem.generation")
_PIECE, _SUMMARY = TypeAdapter(TextPiece), TypeAdapter(GenerationSummary)


def run_generation(
    request: GenerationRequest, command: tuple[str, ...] = _COMMAND
) -> Iterator[TextPiece | GenerationSummary]:
    """Yield the text as a new process draws it, then the summary; raise InvalidRequest with the line it failed with.

    Leaving the loop, or Ctrl-C, ends the process. Raises Unavailable where it ends without a summary.
    """
    step: TextPiece | GenerationSummary | None = None
    with tempfile.TemporaryFile() as complaints, _started(command, complaints) as process:
        for step in _steps(process, request):
            yield step
        if not isinstance(step, GenerationSummary):
            # It is about to end by itself, and says how.
            with suppress(subprocess.TimeoutExpired):
                process.wait(_STOP_S)
            stop(process, _STOP_S)
            complaints.seek(0)
            said = complaints.read().decode(errors="replace")
            raise Unavailable(f"the generating process {how_it_ended(process.returncode, said)}")


@contextmanager
def _started(command: tuple[str, ...], complaints: IO[bytes]) -> Iterator["subprocess.Popen[bytes]"]:
    environment = dict(os.environ)
    limit_spinning(environment)
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=complaints,
        env=environment,
        # A terminal's Ctrl-C is ours alone: torch in the middle of its work would print a traceback.
        start_new_session=True,
    )
    try:
        yield process
    finally:
        stop(process, _STOP_S)
        for stream in (process.stdin, process.stdout):
            # What a process that has gone did not read can't be flushed.
            with suppress(BrokenPipeError):
                assert stream is not None
                stream.close()


def _steps(process: "subprocess.Popen[bytes]", request: GenerationRequest) -> Iterator[TextPiece | GenerationSummary]:
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(BrokenPipeError):
        process.stdin.write(request.model_dump_json().encode())
        process.stdin.close()
    for line in process.stdout:
        if (step := _parse(line)) is None:
            return
        yield step


def _parse(line: bytes) -> TextPiece | GenerationSummary | None:
    """Return what a line says, None for half a line; raise InvalidRequest for an error."""
    try:
        document: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    if "error" in document:
        raise InvalidRequest(document["error"])
    if "piece" in document:
        return _PIECE.validate_python(document["piece"])
    return _SUMMARY.validate_python(document["summary"])
