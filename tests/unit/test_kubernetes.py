"""deploy/kubernetes: valid by schema, safe by default, and asking for nothing that the code does not have."""

import copy
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from exported_metrics import exported_metrics

from services.inference.listening import ALLOW_INSECURE_LISTEN
from services.trainer.slots import named_queues
from services.trainer.worker import parse_arguments
from tandem import settings as settings_module
from tandem.cli.main import COMMANDS
from tandem.jobs.queue import priority_keys, queue_for
from tandem.jobs.spec import make_spec
from tandem.settings import Settings, parse_listen

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import check_kubernetes  # noqa: E402
from kustomization import Document, build, containers, pod_spec  # noqa: E402

OVERLAYS = check_kubernetes.overlays()
GUIDE = (ROOT / "docs" / "operations" / "kubernetes.md").read_text()
# Of the environment that an object store's own libraries read.
FOREIGN = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
# The agent of EKS Pod Identity, and the metadata service of a node.
KEY_GIVERS = {"169.254.170.23", "169.254.169.254"}


@pytest.fixture(params=OVERLAYS, ids=lambda path: path.name)
def documents(request: pytest.FixtureRequest) -> list[Document]:
    return build(request.param)


def of_kind(documents: list[Document], kind: str) -> list[Document]:
    return [each for each in documents if each["kind"] == kind]


def named(documents: list[Document], kind: str, name: str) -> Document:
    (found,) = [each for each in of_kind(documents, kind) if each["metadata"]["name"] == name]
    return found


def workloads(documents: list[Document]) -> Iterator[tuple[Document, Document, Document]]:
    """Yield each workload with its pod's spec and its container; each has one."""
    for document in documents:
        if (pod := pod_spec(document)) is not None:
            (container,) = containers(document)
            yield document, pod, container


def ours(documents: list[Document]) -> Iterator[tuple[Document, Document, Document]]:
    return (each for each in workloads(documents) if each[2]["image"].startswith("tandem-"))


def pod_labels(document: Document) -> dict[str, str]:
    spec = document["spec"]
    labels: dict[str, str] = spec.get("jobTargetRef", spec)["template"]["metadata"]["labels"]
    return labels


def environment(documents: list[Document], container: Document) -> dict[str, str]:
    found: dict[str, str] = {}
    for source in container.get("envFrom", ()):
        if "configMapRef" in source:
            found |= named(documents, "ConfigMap", source["configMapRef"]["name"])["data"]
    return found | {each["name"]: each["value"] for each in container.get("env", ())}


def read_settings(documents: list[Document], container: Document, tmp_path: Path) -> Settings:
    """Read what a container has in its environment as the service does; the files of Secrets stand in a folder here."""
    found = environment(documents, container)
    mounted = {each["mountPath"] for each in container["volumeMounts"]}
    for name, path in found.items():
        if name.endswith("_FILE"):
            assert str(Path(path).parent) in mounted, name
            (tmp_path / name).write_text("a-token-of-sixteen-signs\n")
            found[name] = str(tmp_path / name)
    return Settings.from_environment(found)


def queues_of(container: Document) -> list[str]:
    return named_queues(container["args"][container["args"].index("--queues") + 1])


# By schema.


def test_there_are_the_overlays_that_the_guide_names() -> None:
    assert {path.name for path in OVERLAYS} == set(re.findall(r"overlays/([a-z0-9-]+)", GUIDE))


def test_all_is_valid_by_schema(documents: list[Document]) -> None:
    assert [line for document in documents for line in check_kubernetes.problems(document)] == []


def test_the_check_of_make_lint_passes_and_needs_no_network() -> None:
    done = subprocess.run([sys.executable, "scripts/check_kubernetes.py"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "scripts/check_kubernetes.py" in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize(
    ("kind", "name", "path", "value"),
    [
        ("Deployment", "inference", ("spec", "template", "spec", "containers", 0, "redinessProbe"), {}),
        ("Deployment", "inference", ("spec", "replicas"), "two"),
        ("ScaledJob", "trainer", ("spec", "scalingStrategy", "strategy"), "acurate"),
        ("ScaledJob", "trainer", ("spec", "maxReplicas"), 3),
        ("ScaledJob", "trainer", ("spec", "jobTargetRef", "backofLimit"), 1),
        ("ScaledJob", "trainer", ("spec", "triggers", 0, "metadata", "listLength"), 1),
        ("ScaledObject", "inference", ("spec", "scaleTargetRef"), {}),
        ("NetworkPolicy", "redis", ("spec", "ingres"), []),
        ("PodMonitor", "tandem", ("spec", "endpoints"), []),
    ],
)
def test_a_mistake_is_found(kind: str, name: str, path: tuple[Any, ...], value: object) -> None:
    document = copy.deepcopy(named(build(OVERLAYS[0]), kind, name))
    place: Any = document
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    assert list(check_kubernetes.problems(document))


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
def test_kustomize_itself_makes_the_same(overlay: Path) -> None:
    commands = [["kustomize", "build"], ["kubectl", "kustomize"]]
    command = next((each for each in commands if shutil.which(each[0])), None)
    if command is None:
        pytest.skip("neither kustomize nor kubectl is here")
    done = subprocess.run([*command, str(overlay)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    theirs = sorted(yaml.safe_load_all(done.stdout), key=_place)
    mine = sorted(build(overlay), key=_place)
    assert [_place(each) for each in mine] == [_place(each) for each in theirs]
    for one, other in zip(mine, theirs, strict=True):
        assert one == other


def _place(document: Document) -> tuple[str, str]:
    return document["kind"], document["metadata"]["name"]


# What they ask the code for.


def test_every_variable_is_one_that_the_code_reads(documents: list[Document], tmp_path: Path) -> None:
    known = set(re.findall(r"\bTANDEM_[A-Z_]+\b", settings_module.__doc__ or "")) | {ALLOW_INSECURE_LISTEN}
    for _, _, container in ours(documents):
        assert environment(documents, container).keys() <= known
        assert read_settings(documents, container, tmp_path).home == Path("/tandem")


def test_every_command_is_a_module_that_takes_its_arguments(documents: list[Document]) -> None:
    modules = set()
    for document, _, container in ours(documents):
        if document["metadata"]["name"] == "cli":
            continue
        python, flag, module = container["command"]
        assert (python, flag) == ("python", "-m")
        assert importlib.util.find_spec(module) is not None
        modules.add(module)
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            if "exec" in container.get(probe, {}):
                assert container[probe]["exec"]["command"] == ["python", "-m", "services.trainer.health"]
        if module == "services.trainer.worker":
            assert parse_arguments(container["args"]).one_run
    assert modules == {"services.trainer.worker", "services.trainer.keeper", "services.inference.server"}


def test_every_image_is_one_of_ours_or_redis(documents: list[Document]) -> None:
    for _, _, container in workloads(documents):
        image, _, tag = container["image"].partition(":")
        assert image in ("tandem-trainer", "tandem-inference", "tandem-cli", "redis")
        assert tag not in ("", "latest")
        if "services.inference.server" in container["command"]:
            assert image == "tandem-inference"


def test_the_command_of_the_guide_is_there_and_reaches_what_it_calls(documents: list[Document]) -> None:
    called = re.findall(r"exec -it? (\S+) -- tandem (\w+)", GUIDE)
    assert {"data", "train"} <= {noun for _, noun in called} <= COMMANDS.keys()
    assert {target for target, _ in called} == {"deploy/cli"}
    cli = named(documents, "Deployment", "cli")
    (container,) = containers(cli)
    # Of the images only this one has the command.
    assert container["image"].partition(":")[0] == "tandem-cli"
    variables = environment(documents, container)
    service, _, port = variables["TANDEM_INFERENCE_ADDRESS"].partition(":")
    (offered,) = named(documents, "Service", service)["spec"]["ports"]
    assert int(port) == offered["port"]
    # Both ends of each way are open: out of its pod, and into that of the server.
    labels = pod_labels(cli)
    policies = {each["metadata"]["name"]: each["spec"] for each in of_kind(documents, "NetworkPolicy")}
    assert policies["uses-redis"]["podSelector"]["matchLabels"].items() <= labels.items()
    way_out, way_in = policies["calls-inference"], policies["inference"]
    assert way_out["podSelector"]["matchLabels"].items() <= labels.items()
    assert way_out["egress"][0]["to"][0]["podSelector"] == way_in["podSelector"]
    assert way_out["egress"][0]["ports"] == way_in["ingress"][0]["ports"]
    (caller,) = way_in["ingress"][0]["from"]
    (namespace,) = of_kind(documents, "Namespace")
    assert caller["podSelector"]["matchLabels"].items() <= labels.items()
    assert caller["namespaceSelector"]["matchLabels"].items() <= namespace["metadata"]["labels"].items()


def test_a_trainer_looks_at_each_list_of_each_queue_that_it_takes_from(documents: list[Document]) -> None:
    taken: list[str] = []
    for document in of_kind(documents, "ScaledJob"):
        queues = queues_of(containers(document)[0])
        watched = [trigger["metadata"]["listName"] for trigger in document["spec"]["triggers"]]
        assert sorted(watched) == sorted(key for queue in queues for key in priority_keys(queue))
        assert len(watched) == len(set(watched))
        taken += queues
    # What the keeper makes known, so that it is not refused at submit, is what somebody takes.
    assert sorted(queues_of(containers(named(documents, "Deployment", "keeper"))[0])) == sorted(taken)


def test_pods_of_eight_gpus_differ_from_those_of_one_in_size_and_queues_alone() -> None:
    documents = build(check_kubernetes.KUBERNETES / "overlays" / "gpu-x8")
    jobs = [copy.deepcopy(named(documents, "ScaledJob", name)) for name in ("trainer", "trainer-x8")]
    for job in jobs:
        (container,) = containers(job)
        container["args"][container["args"].index("--queues") + 1] = "-"
        for amounts in container["resources"].values():
            amounts.update(dict.fromkeys(amounts, "-"))
        for volume in job["spec"]["jobTargetRef"]["template"]["spec"]["volumes"]:
            if volume["name"] == "shared-memory":
                volume["emptyDir"]["sizeLimit"] = "-"
        for trigger in job["spec"]["triggers"]:
            trigger["metadata"]["listName"] = "-"
        job["metadata"]["name"] = job["spec"]["maxReplicaCount"] = "-"
    assert jobs[0] == jobs[1]


@pytest.mark.parametrize(
    ("overlay", "device", "num_devices", "name", "gpus"),
    [
        ("cpu", "cpu", 1, "trainer", None),
        ("cpu", "auto", 1, "trainer", None),
        ("gpu", "cuda", 1, "trainer", 1),
        ("gpu", "auto", 1, "trainer", 1),
        ("gpu-x8", "cuda", 8, "trainer-x8", 8),
        ("gpu-x8", "auto", 8, "trainer-x8", 8),
        ("gpu-x8", "cuda", 1, "trainer", 1),
    ],
)
def test_a_job_finds_a_pod_with_its_devices(
    overlay: str, device: str, num_devices: int, name: str, gpus: int | None
) -> None:
    job = {"kind": "train_classifier", "dataset": "d", "model_name": "m", "arch": "resnet18", "epochs": 1}
    queue = queue_for(make_spec({**job, "device": device, "num_devices": num_devices}), None)
    jobs = of_kind(build(check_kubernetes.KUBERNETES / "overlays" / overlay), "ScaledJob")
    (found,) = [each for each in jobs if queue in queues_of(containers(each)[0])]
    assert found["metadata"]["name"] == name
    assert containers(found)[0]["resources"]["limits"].get("nvidia.com/gpu") == gpus


def test_every_port_is_where_somebody_listens(documents: list[Document], tmp_path: Path) -> None:
    listening: dict[str, dict[str, int]] = {"redis": {"redis": 6379}}
    for document, _, container in ours(documents):
        settings = read_settings(documents, container, tmp_path)
        ports = {}
        if document["metadata"]["name"] == "inference":
            ports["grpc"] = parse_listen(settings.listen)[1]
            probed = {container[probe]["grpc"]["port"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")}
            assert probed == {ports["grpc"]}
        if settings.metrics_listen is not None:
            ports["metrics"] = settings.metrics_listen[1]
        assert {each["name"]: each["containerPort"] for each in container.get("ports", ())} == ports
        listening[pod_labels(document)["app.kubernetes.io/name"]] = ports
    for service in of_kind(documents, "Service"):
        there = listening[service["spec"]["selector"]["app.kubernetes.io/name"]]
        assert all(port["port"] == there[port["name"]] for port in service["spec"]["ports"])
    for policy in of_kind(documents, "NetworkPolicy"):
        for rule in policy["spec"].get("ingress", ()):
            opened = {port["port"] for port in rule["ports"]}
            assert opened <= {port for each in listening.values() for port in each.values()}


def test_every_metric_of_the_autoscaler_is_one_that_the_server_tells(
    documents: list[Document], tmp_path_factory: pytest.TempPathFactory
) -> None:
    told = exported_metrics(tmp_path_factory.mktemp("metrics"))
    queries = [
        trigger["metadata"]["query"]
        for document in of_kind(documents, "ScaledObject")
        for trigger in document["spec"]["triggers"]
    ]
    assert any("queue_duration" in query for query in queries), "it scales by the age of the queue"
    for query in queries:
        names = set(re.findall(r"\btandem_\w+", query))
        assert names
        assert names <= told.keys()
        assert 'namespace="tandem"' in query


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not here: apt-get install prometheus")
@pytest.mark.parametrize(
    ("buckets", "wait_s"),
    [
        pytest.param({}, 0, id="no-server"),
        pytest.param({"0.05": "7+0x9", "0.1": "9+0x9", "+Inf": "9+0x9"}, 0, id="no-calls"),
        pytest.param({"0.05": "0+0x9", "0.1": "0+60x9", "+Inf": "0+60x9"}, 0.0975, id="calls-that-wait"),
    ],
)
def test_the_autoscaler_is_told_how_long_calls_wait_and_0_without_any(
    buckets: dict[str, str], wait_s: float, tmp_path: Path
) -> None:
    scaled = named(build(OVERLAYS[0]), "ScaledObject", "inference")
    metric = "tandem_inference_queue_duration_seconds_bucket"
    (query,) = [each["metadata"]["query"] for each in scaled["spec"]["triggers"] if metric in each["metadata"]["query"]]
    series = [
        {"series": f'{metric}{{namespace="tandem", pod="a", le="{le}"}}', "values": values}
        for le, values in buckets.items()
    ]
    asked = {"expr": query, "eval_time": "8m", "exp_samples": [{"labels": "{}", "value": wait_s}]}
    case = {"interval": "1m", "input_series": series, "promql_expr_test": [asked]}
    (tmp_path / "query.test.yml").write_text(yaml.safe_dump({"tests": [case]}))
    command = ["promtool", "test", "rules", "query.test.yml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_secret_is_one_that_the_guide_says_how_to_make(documents: list[Document]) -> None:
    asked = set(re.findall(r'"(?:secretName|secretRef)": (?:\{"name": )?"([a-z-]+)"', json.dumps(documents)))
    asked |= {
        reference["name"]
        for each in of_kind(documents, "TriggerAuthentication")
        for reference in each["spec"]["secretTargetRef"]
    }
    made = set(re.findall(r"create secret generic ([a-z-]+)", GUIDE))
    assert asked <= made
    assert not of_kind(documents, "Secret"), "no password lies in the repository"


# Safe by default.


def test_nothing_runs_as_root_or_may_more_than_it_needs(documents: list[Document]) -> None:
    found = list(workloads(documents))
    assert len(found) >= 4
    for _, pod, container in found:
        security = pod["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] >= 999
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
        assert "memory" in container["resources"]["limits"]
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        assert not any("hostPath" in volume for volume in pod["volumes"])
    assert {pod["securityContext"]["runAsUser"] for _, pod, _ in ours(documents)} == {10001}


def test_what_asks_for_a_gpu_and_nothing_else_goes_to_nodes_kept_for_it(documents: list[Document]) -> None:
    for _, pod, container in workloads(documents):
        has_gpu = "nvidia.com/gpu" in container["resources"]["limits"]
        kept = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
        assert pod.get("tolerations", []) == (kept if has_gpu else [])


def test_every_mount_has_its_volume_and_secrets_are_read_only(documents: list[Document]) -> None:
    for document, pod, container in workloads(documents):
        claimed = {each["metadata"]["name"] for each in document["spec"].get("volumeClaimTemplates", ())}
        volumes = {each["name"]: each for each in pod["volumes"]}
        for mount in container["volumeMounts"]:
            assert mount["name"] in volumes.keys() | claimed
            if "secret" in volumes.get(mount["name"], {}):
                assert mount["readOnly"] is True
        for volume in pod["volumes"]:
            if "emptyDir" in volume:
                assert "sizeLimit" in volume["emptyDir"]


def test_a_stop_gets_the_time_it_takes(documents: list[Document], tmp_path: Path) -> None:
    for document, pod, container in ours(documents):
        settings, grace_s = read_settings(documents, container, tmp_path), pod["terminationGracePeriodSeconds"]
        if document["kind"] == "ScaledJob":
            # To save, and to upload.
            assert grace_s > 2 * settings.stop_grace_s
        elif document["metadata"]["name"] == "inference":
            assert settings.drain_delay_s
            assert grace_s > settings.drain_delay_s + settings.drain_grace_s + 3


def test_a_job_is_one_run_and_no_change_ends_it(documents: list[Document]) -> None:
    for document in of_kind(documents, "ScaledJob"):
        spec, job = document["spec"], document["spec"]["jobTargetRef"]
        assert (job["parallelism"], job["completions"], job["backoffLimit"]) == (1, 1, 0)
        assert job["template"]["spec"]["restartPolicy"] == "Never"
        assert "activeDeadlineSeconds" not in job
        assert spec["rollout"]["strategy"] == "gradual"
        assert spec["scalingStrategy"]["strategy"] == "accurate"
        assert spec["minReplicaCount"] == 0
        assert "--one-run" in containers(document)[0]["args"]


def test_a_rollout_takes_one_server_at_a_time_and_no_gpu_that_is_not_there(documents: list[Document]) -> None:
    server = named(documents, "Deployment", "inference")
    has_gpu = "nvidia.com/gpu" in containers(server)[0]["resources"]["limits"]
    in_place, beside = {"maxUnavailable": 1, "maxSurge": 0}, {"maxUnavailable": 0, "maxSurge": 1}
    assert server["spec"]["strategy"]["rollingUpdate"] == (in_place if has_gpu else beside)
    budget = named(documents, "PodDisruptionBudget", "inference")
    scaled = named(documents, "ScaledObject", "inference")
    for selector in (server["spec"]["selector"], budget["spec"]["selector"]):
        assert selector["matchLabels"].items() <= pod_labels(server).items()
    assert scaled["spec"]["scaleTargetRef"]["name"] == "inference"
    assert scaled["spec"]["minReplicaCount"] > budget["spec"]["maxUnavailable"]


def test_the_network_is_closed_but_for_what_is_needed(documents: list[Document]) -> None:
    policies = {each["metadata"]["name"]: each["spec"] for each in of_kind(documents, "NetworkPolicy")}
    assert policies["default-deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    assert all(rule.get("from") for policy in policies.values() for rule in policy.get("ingress", ()))
    for document, _, container in ours(documents):
        if "TANDEM_REDIS_URL" in environment(documents, container):
            assert pod_labels(document)["tandem/uses"] == "redis"
    shared = named(documents, "ConfigMap", "tandem-settings")["data"]
    host = re.fullmatch(r"redis://([a-z]+):6379/0", shared["TANDEM_REDIS_URL"])
    assert host is not None
    assert named(documents, "Service", host[1])["spec"]["selector"] == {"app.kubernetes.io/name": "redis"}


def test_redis_forgets_nothing_and_evicts_nothing(documents: list[Document]) -> None:
    lines = named(documents, "ConfigMap", "redis")["data"]["redis.conf"].splitlines()
    assert {"appendonly yes", "appendfsync everysec", "maxmemory-policy noeviction"} <= set(lines)
    (megabytes,) = re.findall(r"maxmemory (\d+)mb", "\n".join(lines))
    server = named(documents, "StatefulSet", "redis")
    (container,) = containers(server)
    assert int(container["resources"]["limits"]["memory"].removesuffix("Mi")) >= 2 * int(megabytes)
    assert server["spec"]["volumeClaimTemplates"][0]["metadata"]["name"] == "data"
    # Neither in its arguments nor in its environment.
    assert "/run/secrets/redis/password" in container["command"][2]
    assert "env" not in container


def test_with_an_object_store_a_server_needs_no_shared_volume() -> None:
    documents = build(check_kubernetes.KUBERNETES / "overlays" / "object-store")
    server = named(documents, "Deployment", "inference")
    pod = pod_spec(server)
    assert pod is not None
    assert not any("persistentVolumeClaim" in volume for volume in pod["volumes"])
    variables = environment(documents, containers(server)[0])
    assert variables["TANDEM_CHECKPOINT_STORE"].startswith("s3://")
    (volume,) = [each for each in pod["volumes"] if each["name"] == "volume"]
    # While new versions come, what they take the place of is there too.
    room = int(volume["emptyDir"]["sizeLimit"].removesuffix("Gi"))
    assert room >= 2 * int(variables["TANDEM_CHECKPOINT_CACHE"].removesuffix("GiB"))
    for document in (server, named(documents, "Deployment", "cli"), *of_kind(documents, "ScaledJob")):
        assert pod_labels(document)["tandem/store"] == "true"
        assert {"secretRef": {"name": "tandem-store", "optional": True}} in containers(document)[0]["envFrom"]
    egress = named(documents, "NetworkPolicy", "object-store")["spec"]["egress"]
    # In the clear to nobody but those that give pods the keys of their identity.
    assert [each for each in egress if "to" not in each] == [{"ports": [{"protocol": "TCP", "port": 443}]}]
    assert {to["ipBlock"]["cidr"].split("/")[0] for each in egress for to in each.get("to", ())} == KEY_GIVERS
    secret = re.search(r"tandem-store[^\n]*\\\n[^\n]*", GUIDE)
    assert secret is not None
    assert set(re.findall(r"AWS_[A-Z_]+", secret[0])) == FOREIGN
