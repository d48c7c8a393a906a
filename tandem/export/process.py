"""An export in a process of its own, as the command line holds it. Free of torch."""

import json
import os
import subprocess
import sys

from pydantic import TypeAdapter

from tandem.errors import ExportFailed
from tandem.export.request import ExportReport, ExportRequest, LanguageExportReport, partial_file
from tandem.openmp import limit_spinning
from tandem.processes import how_it_ended, stop

Report = ExportReport | LanguageExportReport
_REPORT: TypeAdapter[Report] = TypeAdapter(Report)
# How long a process that is asked to stop gets to remove what it wrote.
_STOP_S = 5.0
# -P: a file called onnx.py in the directory where the command is run is not the package.
_COMMAND = (sys.executable, "-P", "-m", "tandem.export")


def run_export(request: ExportRequest, command: tuple[str, ...] = _COMMAND) -> Report:
    """Export in a new process and return its report; raise ExportFailed with the line that it failed with.

    Interrupted (Ctrl-C), the process is ended and nothing is left of the file.
    """
    environment = dict(os.environ)
    limit_spinning(environment)
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="replace",
        env=environment,
        # A terminal's Ctrl-C is ours alone: a library in the middle of its work would print a traceback.
        start_new_session=True,
    )
    try:
        out, err = process.communicate(request.model_dump_json())
    finally:
        stop(process, _STOP_S)
        partial_file(request.output, process.pid).unlink(missing_ok=True)
    return _answer(process.returncode, out, err)


def _answer(code: int, out: str, err: str) -> Report:
    try:
        document = json.loads(out)
    except ValueError:
        raise ExportFailed(f"the export's process {how_it_ended(code, err)}") from None
    if "error" in document:
        raise ExportFailed(document["error"])
    return _REPORT.validate_python(document["report"])
