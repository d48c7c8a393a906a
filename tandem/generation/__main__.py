"""`python -m tandem.generation`: a request (JSON) on stdin; JSON lines on stdout.

Each is {"piece": …}, and the last {"summary": …} or {"error": line}.
"""

import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from tandem.errors import TandemError
from tandem.generation.request import GenerationRequest
from tandem.processes import end_with_parent


def main() -> None:
    """Serve one request; exit 0 with a summary, 1 with an error that is explained."""
    # Where the command is killed, nobody reads the words: the kernel ends this process too.
    end_with_parent(signal.SIGKILL)
    # Libraries print; stdout is for the answer alone.
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    document: dict[str, Any] = {}
    for document in _documents(sys.stdin.buffer.read()):
        answer.write(json.dumps(document) + "\n")
        answer.flush()
    answer.close()
    sys.exit(1 if "error" in document else 0)


def _documents(request: bytes) -> Iterator[dict[str, Any]]:
    try:
        parsed = GenerationRequest.model_validate_json(request)
        # What is imported here takes seconds.
        from tandem.generation.run import generate
        from tandem.wire.results import TextPiece

        for step in generate(parsed):
            yield {"piece" if isinstance(step, TextPiece) else "summary": asdict(step)}
    except TandemError as error:
        yield {"error": str(error)}


if __name__ == "__main__":
    main()
