"""Headless Chromium: what a page becomes once its scripts have run."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from waiting import PATIENCE_S

_NAMES = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome")
CHROMIUM = next((path for path in map(shutil.which, _NAMES) if path), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason=f"needs a browser, one of {', '.join(_NAMES)}")

# As root in a container it has no sandbox; and it is not to look for its maker's hosts.
_OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic",
)  # fmt: skip
# The page's clock runs ahead while pictures are decoded in real time: where others use the cores, it ends too soon for
# them now and then (3 of 20), and the page is opened again.
_BUDGETS_MS = (20_000, 100_000, 500_000, 500_000, 500_000)
# Told by the page itself, before its own scripts: what goes wrong in it.
_LISTENING = """<script>
window.problems = [];
addEventListener("error", event => problems.push(event.message || `${event.target.tagName} failed to load`), true);
addEventListener("unhandledrejection", event => problems.push(String(event.reason)));
document.addEventListener("securitypolicyviolation", event => problems.push(`refused ${event.blockedURI}`));
</script>"""
_ASKING = """<script>
(async () => {
  const found = await (async () => { %s })().catch(error => ({ failed: String(error) }));
  const answer = document.createElement("pre");
  answer.id = "answer";
  answer.textContent = JSON.stringify({ problems, ...found });
  document.body.append(answer);
})();
</script>"""


def ask(page: str, script: str, folder: Path, width: int = 1280) -> dict[str, Any]:
    """Open a copy of `page` in a window of `width` pixels, and return what the body of an async function, `script`,
    returns in it; `problems` are the errors of its scripts, what failed to load, and what its policy refused."""
    file = folder / "page.html"
    asked = page.replace("<head>", "<head>" + _LISTENING, 1).replace("</body>", _ASKING % script + "</body>", 1)
    file.write_text(asked, "utf-8")
    answer = None
    for budget_ms in _BUDGETS_MS:
        sizes = (f"--window-size={width},900", f"--user-data-dir={folder / 'profile'}")
        done = subprocess.run(
            [str(CHROMIUM), *_OPTIONS, *sizes, f"--virtual-time-budget={budget_ms}", "--dump-dom", file.as_uri()],
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=PATIENCE_S,
        )
        if answer := re.search(r'<pre id="answer">(.*?)</pre>', done.stdout, re.DOTALL):
            break
    assert answer, f"the page gave no answer: {done.stderr[-2000:]}"
    found: dict[str, Any] = json.loads(html.unescape(answer[1]))
    assert "failed" not in found, found
    return found
