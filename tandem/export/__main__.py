"""`python -m tandem.export`: a request (JSON) on stdin, one JSON line on stdout: {"report": …} or {"error": line}."""

import json
import os
import signal
import sys
from types import FrameType
from typing import Any

from tandem.errors import TandemError
from tandem.export.request import ExportRequest, check_packages
from tandem.processes import end_with_parent


def main() -> None:
    """Serve one request; exit 0 with a report, 1 with an error that is explained."""
    signal.signal(signal.SIGTERM, _stop)
    # Where the command is killed, nobody waits for the file: the kernel ends this process too.
    end_with_parent(signal.SIGTERM)
    # Libraries print; stdout is for the answer alone.
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    document = _serve(sys.stdin.buffer.read())
    answer.write(json.dumps(document) + "\n")
    answer.close()
    sys.exit(1 if "error" in document else 0)


def _serve(request: bytes) -> dict[str, Any]:
    try:
        parsed = ExportRequest.model_validate_json(request)
        check_packages(parsed.format)
        # After the packages are known to be there: what is imported here takes seconds.
        from tandem.export.run import export_any

        return {"report": export_any(parsed).model_dump(mode="json")}
    except TandemError as error:
        return {"error": str(error)}


def _stop(_signal: int, _frame: FrameType | None) -> None:
    # An exception, so that the half-written file goes.
    sys.exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    main()
