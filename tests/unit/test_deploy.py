"""What deploy/ holds for Prometheus and Grafana: it can be read, and asks for nothing that no service tells."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from exported_metrics import exported_metrics

DEPLOY = Path(__file__).parents[2] / "deploy"
PROMETHEUS = DEPLOY / "prometheus"
DASHBOARDS = sorted((DEPLOY / "grafana" / "dashboards").glob("*.json"))
RULES = sorted(PROMETHEUS.glob("*.rules.yml"))
ADDED_BY_PROMETHEUS = {"job", "instance"}
_NAME = re.compile(r"\b(?:tandem|process|node)_[a-z0-9_]+\b|\bup\b")
_STRING = re.compile(r'"[^"]*"')


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    return exported_metrics(tmp_path_factory.mktemp("metrics"))


def expressions(path: Path) -> list[str]:
    """Return all PromQL in a dashboard or a file of rules."""
    if path.suffix == ".json":
        dashboard = json.loads(path.read_text())
        asked = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
        variables = [each["definition"] for each in dashboard["templating"]["list"] if "definition" in each]
        return asked + variables
    return [rule["expr"] for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]]


@pytest.mark.parametrize("path", [*RULES, *DASHBOARDS], ids=lambda path: path.name)
def test_every_metric_is_one_that_a_service_tells(path: Path, exported: dict[str, set[str]]) -> None:
    found = expressions(path)
    assert found
    for expression in found:
        names = set(_NAME.findall(_STRING.sub('""', expression)))
        assert names, expression
        assert names <= exported.keys(), expression


@pytest.mark.parametrize("path", [*RULES, *DASHBOARDS], ids=lambda path: path.name)
def test_every_label_is_one_of_its_metrics(path: Path, exported: dict[str, set[str]]) -> None:
    for expression in expressions(path):
        bare = _STRING.sub('""', expression)
        known = set.union(*(exported[name] for name in _NAME.findall(bare))) | ADDED_BY_PROMETHEUS
        grouped = {
            label.strip() for group in re.findall(r"\b(?:by|on) \(([^)]*)\)", bare) for label in group.split(",")
        }
        chosen = set(re.findall(r'([a-z_]+)(?:=|=~|!=|!~)""', bare))
        assert grouped | chosen <= known, expression


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.name)
def test_a_dashboard_has_whole_panels(path: Path) -> None:
    dashboard = json.loads(path.read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
    assert len(places) == len(panels)
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in panels)
    asked = " ".join(expressions(path))
    variables = {each["name"] for each in dashboard["templating"]["list"]} | {"__rate_interval"}
    assert set(re.findall(r"\$(\w+)", asked)) <= variables


def test_the_rest_can_be_read() -> None:
    paths = [*PROMETHEUS.glob("*.yml"), *(DEPLOY / "grafana").rglob("*.yml")]
    assert len(paths) >= 6
    documents = {path.relative_to(DEPLOY).as_posix(): yaml.safe_load(path.read_text()) for path in paths}
    named = documents["prometheus/prometheus.yml"]["rule_files"]
    assert sorted(named) == [path.name for path in RULES]
    for path in RULES:
        for group in documents[f"prometheus/{path.name}"]["groups"]:
            assert all(rule["annotations"]["summary"] for rule in group["rules"])


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not here: apt-get install prometheus")
@pytest.mark.parametrize(
    "command", [("check", "config", "prometheus.yml"), ("test", "rules", "rules.test.yml")], ids=lambda each: each[0]
)
def test_prometheus_itself_takes_the_rules_and_they_fire_when_they_should(command: tuple[str, ...]) -> None:
    done = subprocess.run(["promtool", *command], cwd=PROMETHEUS, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
