"""Imports leave the garbage collector alone; what comes later is collected as ever. In processes of their own."""

import subprocess
import sys

CIRCLE = """
class Circle:
    def __init__(self):
        self.own = self

def is_collected():
    gone = weakref.ref(Circle())
    gc.collect()
    return gone() is None
"""


def run(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_what_was_imported_is_not_gone_through_and_what_comes_later_is_collected() -> None:
    script = f"""
import gc, sys, weakref
from services.inference.collection import freeze_imports
{CIRCLE}
freeze_imports(("wave", "no_such_module"))
assert "wave" in sys.modules
assert gc.get_freeze_count() > 1000
assert is_collected()
print(len(gc.get_objects()))
"""
    assert int(run(script)) < 1000


def test_circles_that_were_left_before_are_not_kept_for_ever() -> None:
    script = f"""
import gc, weakref
from services.inference.collection import freeze_imports
{CIRCLE}
gc.disable()
gone = weakref.ref(Circle())
assert gone() is not None
freeze_imports()
print(gone() is None)
"""
    assert run(script) == "True"


def test_a_server_imports_openvino_only_where_it_would_try_it() -> None:
    script = """
import sys
from services.inference.collection import freeze_imports
from services.inference.server import _imported_later
from tandem.settings import Settings
for environment in ({"TANDEM_ENGINE": "eager"}, {"TANDEM_DEVICE": "nonsense"}, {}):
    settings = Settings.from_environment({"TANDEM_DEVICE": "cpu", **environment})
    freeze_imports(_imported_later(settings))
    print("openvino" in sys.modules)
"""
    assert run(script).split() == ["False", "False", "True"]
