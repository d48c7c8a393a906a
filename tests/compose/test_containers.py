"""The real images under the real compose.yaml on a real engine, step by step as a person would use them.

All in one file, so that one process of several has it: an engine is started, and images are built, once.
"""

import json
import re
import shutil
import subprocess
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from brokers import Certificates
from compose_project import ROOT, SERVICES, Project, current_compose, old_compose
from shell import Shell
from waiting import wait_for

from tandem.client import Client
from tandem.errors import ServerUnavailable, TandemError

# From nothing it takes minutes, and beside other tests some more.
pytestmark = pytest.mark.timeout(1800)

LM = ("--model", "LSTM", "--data", "words", "--emsize", "16", "--nhid", "16", "--bptt", "8", "--batch-size", "4")
USER = 10001
# They take half a minute, in which a trainer is stopped once and killed once.
EPOCHS = 60


# Before anything is up


def test_without_a_password_nothing_starts_and_the_file_is_named(built: Project, tmp_path: Path) -> None:
    bare = Project(built.engine, built.command, f"{built.name}-bare", dict(built.variables))
    try:
        bare.variables["TANDEM_REDIS_PASSWORD_FILE"] = str(tmp_path / "nothing")
        assert str(tmp_path / "nothing") in bare.compose("up", "--detach", "redis", code=1).stderr
        (tmp_path / "empty").touch()
        bare.variables["TANDEM_REDIS_PASSWORD_FILE"] = str(tmp_path / "empty")
        bare.compose("up", "--detach", "redis")
        wait_for(lambda: "secrets/redis_password is empty" in bare.logs("redis"), "the line")
    finally:
        bare.compose("down", "--volumes", "--timeout", "1")


def test_an_image_holds_no_compiler_no_cache_and_nothing_of_the_checkout(built: Project) -> None:
    script = "for each in gcc g++ cc c++ clang uv; do ! command -v $each || exit 1; done; "
    # Where something was mounted in a build, an older BuildKit leaves an empty file or directory.
    script += "find /installer /root/.cache /opt/tandem/bin/pip -type f 2>/dev/null; "
    script += "ls -A /opt/tandem/source; find / -xdev -name .git"
    for image in ("trainer", "inference", "cli"):
        name = f"tandem-{image}:{built.variables['TANDEM_TAG']}"
        found = built.engine.run(
            "run", "--rm", "--network", "none", "--user", "0", "--entrypoint", "sh", name, "-c", script
        )
        assert found.split() == ["services", "tandem"], image
        about = json.loads(built.engine.run("inspect", name))[0]["Config"]
        assert about["User"] == "tandem"
        assert about["Labels"]["org.opencontainers.image.title"].startswith("Tandem ")
        assert {"NVIDIA_VISIBLE_DEVICES=all", "NVIDIA_DRIVER_CAPABILITIES=compute,utility"} <= set(about["Env"])


def test_an_inference_server_alone_refuses_to_listen_in_the_clear(built: Project) -> None:
    name = f"tandem-inference:{built.variables['TANDEM_TAG']}"
    command = ["docker", "run", "--rm", "--network", "none", name]
    done = subprocess.run(command, env=built.engine.environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "0.0.0.0 is not a loopback address, and calls are not encrypted" in done.stderr


def test_a_change_of_the_source_leaves_the_packages_as_they_are(built: Project, tmp_path: Path) -> None:
    for name in ("Dockerfile.cuda", ".dockerignore", "requirements", "tandem", "services"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        copy(ROOT / name, tmp_path / name)
    with open(tmp_path / "tandem" / "__init__.py", "a") as file:
        file.write("# Another version.\n")
    arguments = ("--build-arg", f"PYTHON_IMAGE={built.variables['TANDEM_PYTHON_IMAGE']}", "--target", "trainer")
    dockerfile = str(tmp_path / "Dockerfile.cuda")
    image = built.engine.run("build", "--quiet", "--network", "host", "--file", dockerfile, *arguments, str(tmp_path))
    before, after = (
        json.loads(built.engine.run("inspect", name))[0]["RootFS"]["Layers"]
        for name in (f"tandem-trainer:{built.variables['TANDEM_TAG']}", image)
    )
    built.engine.run("rmi", "--force", image)
    # Three copies of source make the end of the image.
    assert before[:-3] == after[:-3]
    assert before[-3] != after[-3]


# Up


def test_data_models_and_answers_by_the_command_line_in_its_container(trained: Project) -> None:
    findings = {finding["name"]: finding["state"] for finding in trained.json("doctor")}
    assert {findings[name] for name in ("PyTorch", "volume", "broker", "trainer", "inference")} == {"ok"}
    models = {model["name"]: model["kind"] for model in trained.json("models", "list")}
    assert models == {"a": "classifier", "b": "classifier", "lm": "language_model"}
    (answer,) = trained.json("classify", "a", "shapes/val/circle/circle_0.png")["results"]
    assert answer["top_k"]
    compared = trained.json("compare", "a", "b", "--data", "shapes")
    assert compared["num_images"] == 15
    assert len(trained.cli("generate", "lm", "--words", "20").split()) > 10
    assert trained.cli("classify", "nothing", "shapes/val/circle/circle_0.png", code=1).startswith("tandem: ")


def test_tandem_on_the_host_talks_to_it(trained: Project, tmp_path: Path) -> None:
    shell = Shell(tmp_path, {"TANDEM_INFERENCE_ADDRESS": f"127.0.0.1:{trained.variables['TANDEM_PORT']}"})
    image = str(next(Path(trained.variables["TANDEM_WORK"]).glob("shapes/val/*/*.png")))
    assert shell.json("classify", "a", image)["results"][0]["top_k"]
    words = ("generate", "lm", "--words", "20", "--seed", "1")
    assert shell(*words).stdout == trained.cli(*words)
    page = f"http://127.0.0.1:{trained.variables['TANDEM_TENSORBOARD_PORT']}/data/runs"
    wait_for(lambda: len(json.load(urllib.request.urlopen(page))) >= 3, "the runs in TensorBoard")


def test_a_report_comes_out_by_a_directory_of_the_hosts(trained: Project, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    out.chmod(0o777)
    compare = ("compare", "a", "b", "--data", "shapes", "--report", "/out/page.html")
    trained.compose("run", "--rm", "-T", "--volume", f"{out}:/out", "cli", *compare)
    assert "</html>" in (out / "page.html").read_text()


def test_the_check_of_a_gpu_runs_in_a_container(trained: Project) -> None:
    check = ("-m", "services.gpu_check", "--device", "cpu", "--timeout", "900")
    done = trained.compose("run", "--rm", "-T", "--entrypoint", "python3", "cli", *check, code=None)
    # Some CPUs have no bfloat16 to serve in.
    assert "all of it works" in done.stdout or "cpu has no instructions for it" in done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()][:2] == ["bfloat16", "training"]


# Closed


@pytest.mark.parametrize("service", SERVICES)
def test_nothing_runs_as_root_or_may_become_it(project: Project, service: str) -> None:
    pids = project.pids(service)
    assert len(pids) >= 2
    for pid in pids:
        status = dict(re.findall(r"^(\w+):\s*(.*)$", Path(f"/proc/{pid}/status").read_text(), re.M))
        users = {int(each) for each in status["Uid"].split()}
        assert users == {USER} if service != "redis" else 0 not in users
        assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
        assert status["NoNewPrivs"] == "1"


@pytest.mark.parametrize("service", SERVICES)
def test_a_root_is_read_only_and_what_it_may_use_is_bounded(project: Project, service: str) -> None:
    container = project.container(service)
    host = container["HostConfig"]
    assert host["ReadonlyRootfs"]
    assert host["Memory"] > 0
    assert host["PidsLimit"] > 0
    assert host["LogConfig"]["Config"] == {"max-size": "10m", "max-file": "5"}
    done = project.compose("exec", "-T", service, "sh", "-c", "echo > /opt/file", code=None)
    assert done.returncode != 0
    assert "Read-only file system" in done.stderr
    if service in ("inference", "tensorboard"):
        mounts = [mount for mount in container["Mounts"] if mount["Destination"].startswith("/var/lib/tandem/")]
        assert mounts
        assert not any(mount["RW"] for mount in mounts)


@pytest.mark.parametrize(
    ("service", "ports"),
    [("redis", {6379}), ("trainer", {9464}), ("inference", {8500, 9465}), ("tensorboard", {6006})],
)
def test_nothing_listens_that_should_not(project: Project, service: str, ports: set[int]) -> None:
    pid = project.pids(service)[0]
    rows = [
        line.split()
        for name in ("tcp", "tcp6")
        for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]
    ]
    # Docker's resolver of names and TensorBoard's reader of files are on loopback, which is the container's own.
    listening = {
        int(port, 16)
        for address, port in (row[1].split(":") for row in rows if row[3] == "0A")
        if not (address.endswith("7F") if len(address) == 8 else address == "0" * 24 + "01000000")
    }
    assert listening == ports
    published = project.container(service)["HostConfig"]["PortBindings"] or {}
    assert set(published) == {"inference": {"8500/tcp"}, "tensorboard": {"6006/tcp"}}.get(service, set())
    assert all(binding["HostIp"] == "127.0.0.1" for bindings in published.values() for binding in bindings)


def test_the_broker_is_out_of_reach_without_its_network_or_its_password(project: Project) -> None:
    assert not reaches(project, "tensorboard", "redis", 6379)
    broker = address_of(project, "redis", "backend")
    assert not reaches(project, "tensorboard", broker, 6379)
    assert reaches(project, "inference", broker, 6379)
    assert "NOAUTH" in project.compose("exec", "-T", "redis", "redis-cli", "get", "x").stdout


def test_a_full_broker_says_so_and_goes_on(project: Project) -> None:
    ask = "REDISCLI_AUTH=$(cat /run/secrets/redis_password) redis-cli "
    limit = project.compose("exec", "-T", "redis", "sh", "-c", f"{ask} config get maxmemory").stdout.split()[-1]
    assert 0 < int(limit) <= project.container("redis")["HostConfig"]["Memory"] // 2
    fill = f"{ask} config set maxmemory 1mb; {ask} set filler x; {ask} config set maxmemory {limit}; {ask} ping"
    said = project.compose("exec", "-T", "redis", "sh", "-c", fill).stdout
    assert "OOM command not allowed" in said
    assert said.split()[-1] == "PONG"


def test_a_trainer_reaches_nothing_but_what_is_on_its_network(project: Project) -> None:
    outside = address_of(project, "tensorboard", "edge")
    assert urllib.request.urlopen(f"http://{outside}:6006/").status == 200
    assert not reaches(project, "trainer", outside, 6006)
    assert reaches(project, "trainer", "inference", 8500)


def reaches(project: Project, service: str, host: str, port: int) -> bool:
    connect = f"import socket; socket.create_connection(({host!r}, {port}), 3)"
    return project.compose("exec", "-T", service, "python3", "-c", connect, code=None).returncode == 0


def address_of(project: Project, service: str, network: str) -> str:
    networks = project.container(service)["NetworkSettings"]["Networks"]
    return str(networks[f"{project.name}_{network}"]["IPAddress"])


def test_no_secret_shows(trained: Project) -> None:
    password = Path(trained.variables["TANDEM_REDIS_PASSWORD_FILE"]).read_text().strip()
    said = trained.compose("logs").stdout + trained.compose("config").stdout
    for service in SERVICES:
        container = trained.container(service)
        said += json.dumps(container) + trained.engine.run("top", container["Id"], "-eo", "pid,args")
        said += "".join(Path(f"/proc/{pid}/environ").read_text() for pid in trained.pids(service))
        said += trained.engine.run("history", "--no-trunc", container["Image"])
    assert "redis_password" in said
    assert password not in said


# Ended


def test_whatever_is_stopped_or_killed_a_run_goes_on_and_nothing_is_lost(trained: Project) -> None:
    run_id = trained.json("train", "lm", *LM, "--epochs", str(EPOCHS), "--name", "long")["run_id"]
    waiting = trained.json("train", "lm", *LM, "--epochs", "1", "--name", "waits", "--after", run_id)["run_id"]
    wait_for(lambda: trained.json("runs", "show", run_id)["step"] > 0, "the first step")

    trained.compose("stop", "trainer")
    assert trained.container("trainer")["State"]["ExitCode"] == 0
    stopped = trained.json("runs", "show", run_id)
    assert stopped["state"] == "QUEUED"
    trained.compose("start", "trainer")
    wait_for(lambda: trained.json("runs", "show", run_id)["step"] > stopped["step"], "a further step")

    # What was submitted a moment ago is in no file of redis yet.
    fresh = trained.json("train", "lm", *LM, "--epochs", "1", "--name", "fresh")["run_id"]
    for service in ("redis", "trainer", "tensorboard"):
        before = {run["run_id"] for run in trained.json("runs", "list")}
        trained.kill(service)
        trained.wait_until_healthy(service)
        assert {run["run_id"] for run in trained.json("runs", "list")} == before

    wait_while_it_goes_on(trained, run_id)
    for other in (waiting, fresh):
        wait_for(lambda other=other: trained.json("runs", "show", other)["state"] == "SUCCEEDED", "the other runs")  # type: ignore[misc]
    ended = trained.json("runs", "show", run_id)
    assert (ended["state"], ended["epoch"]) == ("SUCCEEDED", EPOCHS)
    # Stopped once, killed once; the broker's end alone interrupts nothing.
    assert ended["attempt"] == 3


def wait_while_it_goes_on(project: Project, run_id: str) -> None:
    """Return when a run has ended, however long that takes on a busy machine; fail if it makes no more steps."""
    step, state = -1, ""

    def goes_on() -> bool:
        nonlocal state
        shown = project.json("runs", "show", run_id)
        state = shown["state"]
        return shown["step"] > step or state not in ("QUEUED", "RUNNING")

    while state not in ("SUCCEEDED", "FAILED", "CANCELED"):
        wait_for(goes_on, "a further step")
        step = project.json("runs", "show", run_id)["step"]


@pytest.mark.parametrize("way", ["replaced", "killed"])
def test_when_inference_is_replaced_no_call_fails_beyond_the_swap(trained: Project, way: str) -> None:
    caller = Caller(f"127.0.0.1:{trained.variables['TANDEM_PORT']}")
    with caller:
        wait_for(lambda: len(caller.answered_at) >= 5, "calls")
        began = time.monotonic()
        if way == "replaced":
            trained.compose("up", "--detach", "--force-recreate", "--no-deps", "inference")
        else:
            trained.kill("inference")
        trained.wait_until_healthy("inference")
        healthy = time.monotonic()
        wait_for(lambda: sum(at > healthy for at in caller.answered_at) >= 5, "calls after it")
    assert caller.failures, "the swap was not seen"
    assert {type(error) for _, error in caller.failures} == {ServerUnavailable}
    assert all(began < at < healthy for at, _ in caller.failures)


class Caller:
    """Calls without a pause while its context lasts, and notes when calls were answered, and which were not."""

    def __init__(self, address: str) -> None:
        self.answered_at: list[float] = []
        self.failures: list[tuple[float, TandemError]] = []
        self._address, self._is_over = address, threading.Event()
        self._thread = threading.Thread(target=self._call)

    def __enter__(self) -> "Caller":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _call(self) -> None:
        with Client(self._address, timeout_s=5.0) as client:
            while not self._is_over.wait(0.05):
                began = time.monotonic()
                try:
                    client.score("lm", "the cat sees rain .")
                    self.answered_at.append(time.monotonic())
                except TandemError as error:
                    self.failures.append((began, error))


# More of it


def test_prometheus_finds_both_services_and_takes_the_rules(project: Project) -> None:
    project.compose("--profile", "metrics", "up", "--detach", "--no-deps", "prometheus")
    api = f"http://127.0.0.1:{project.variables['TANDEM_PROMETHEUS_PORT']}/api/v1"

    def up() -> dict[str, str]:
        try:
            answer = json.load(urllib.request.urlopen(f"{api}/targets"))
        except OSError:
            return {}
        return {target["labels"]["job"]: target["health"] for target in answer["data"]["activeTargets"]}

    wait_for(lambda: up() == {"tandem-trainer": "up", "tandem-inference": "up"}, "the targets")
    groups = json.load(urllib.request.urlopen(f"{api}/rules"))["data"]["groups"]
    assert {Path(group["file"]).name for group in groups} == {"inference.rules.yml", "trainer.rules.yml"}


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl: apt-get install openssl")
def test_with_tls_and_tokens_it_is_healthy_and_lets_in_who_has_one(trained: Project) -> None:
    folder = Path(trained.variables["TANDEM_SECRETS"])
    crt, key = Certificates(folder).sign("server", "DNS:inference,IP:127.0.0.1")
    (folder / "token").write_text("a-token-of-the-test\n")
    digest = subprocess.run(["sha256sum"], input=b"a-token-of-the-test", capture_output=True).stdout.decode().split()[0]
    (folder / "tokens").write_text(f"predict sha256:{digest}\n")
    for path in (crt, key, folder / "ca.crt", folder / "token", folder / "tokens"):
        path.chmod(0o444)
    files = (trained.files[0], ROOT / "deploy" / "compose" / "tls.yaml", *trained.files[1:])
    secured = Project(trained.engine, trained.command, trained.name, trained.variables, files)
    secured.compose("up", "--detach", "--no-deps", "inference")
    secured.wait_until_healthy("inference")
    assert secured.cli("generate", "lm", "--words", "5")
    # As the command line is without the second file: neither TLS nor a token.
    assert "TANDEM_TLS_CA_FILE" in trained.cli("generate", "lm", "--words", "5", code=1)


@pytest.mark.skipif(not (current_compose() and old_compose()), reason="needs both generations of Compose")
def test_the_other_generation_takes_the_project_over_with_all_that_is_in_it(trained: Project) -> None:
    models = {model["name"] for model in trained.json("models", "list")}
    trained.compose("--profile", "metrics", "down", "--timeout", "1")
    other = old_compose()
    assert other is not None
    heir = Project(trained.engine, other, trained.name, trained.variables)
    heir.compose("up", "--detach", "--no-build")
    heir.wait_until_healthy(*SERVICES)
    assert {model["name"] for model in heir.json("models", "list")} == models
    assert heir.cli("generate", "lm", "--words", "5")
