"""Stand-ins for the images that ours are built on and beside: of Debian packages, for hosts that reach no registry.

They are no part of the product. What is proven with them is what Dockerfile.cuda and compose.yaml make of a Debian with
Python, of a redis-server and of a Prometheus, in versions that Debian has.
"""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from engine import Engine

_SUITE = "bookworm"
_PACKAGES = "python3,python3-venv,ca-certificates,redis-server,prometheus"
_AUTHORITIES = "etc/ssl/certs/ca-certificates.crt"
# How this host reaches its packages, where that is other than by default.
_PASSED_ON = ("PIP_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
_LABEL = 'LABEL org.opencontainers.image.title="Stand-in of Debian packages, for tests alone"'


@dataclass(frozen=True)
class BaseImages:
    """Names of images, as compose.yaml takes them."""

    system: str
    prometheus: str

    @property
    def variables(self) -> dict[str, str]:
        return {
            "TANDEM_PYTHON_IMAGE": self.system,
            "TANDEM_REDIS_IMAGE": self.system,
            "TANDEM_PROMETHEUS_IMAGE": self.prometheus,
        }


def make_base_images(engine: Engine, directory: Path, tag: str) -> BaseImages:
    """Make them, in about a minute; skip the test where that is not possible."""
    if not shutil.which("debootstrap") or os.geteuid() != 0:
        pytest.skip("base images are made of Debian packages, by root with debootstrap: apt-get install debootstrap")
    root, log = directory / "root", directory / "debootstrap.log"
    command = ["debootstrap", "--variant=minbase", f"--include={_PACKAGES}", _SUITE, str(root)]
    with open(log, "wb") as output:
        # What dpkg writes need not survive a crash of this machine.
        environment = {**os.environ, "DPKG_FORCE": "unsafe-io"}
        done = subprocess.run(command, stdout=output, stderr=output, env=environment)
    if done.returncode:
        pytest.skip(f"debootstrap made no base image: {log.read_text().strip().splitlines()[-1:]}")
    _prepare(root)
    images = BaseImages(f"tandem-test-system:{tag}", f"tandem-test-prometheus:{tag}")
    _import(engine, root, images.system)
    entrypoint = f'FROM {images.system}\nUSER nobody\nENTRYPOINT ["/usr/bin/prometheus"]\n'
    engine.run("build", "--quiet", "--tag", images.prometheus, "-", stdin=entrypoint.encode())
    shutil.rmtree(root)
    return images


def _prepare(root: Path) -> None:
    for name, owner in (("data", "redis"), ("prometheus", "nobody")):
        (root / name).mkdir()
        subprocess.run(["chroot", root, "chown", owner, f"/{name}"], check=True)
    if Path("/", _AUTHORITIES).is_file():
        shutil.copyfile(Path("/", _AUTHORITIES), root / _AUTHORITIES)


def _import(engine: Engine, root: Path, name: str) -> None:
    variables = [f"ENV {each}={os.environ[each]}" for each in _PASSED_ON if each in os.environ]
    changes = [_LABEL, f"ENV SSL_CERT_FILE=/{_AUTHORITIES}", *variables]
    options = [word for change in changes for word in ("--change", change)]
    command = ["tar", "-C", str(root), "--exclude=./var/cache/apt", "--exclude=./var/lib/apt/lists/*", "-c", "."]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as packed:
        done = subprocess.run(
            ["docker", "import", *options, "-", name], stdin=packed.stdout, env=engine.environment, capture_output=True
        )
    assert done.returncode == 0, done.stderr
