"""What `kustomize build` makes of deploy/kubernetes: resources, components, JSON patches, namespaces and images.

So that manifests are checked where there is no kustomize; where there is one, a test compares the two.
"""

import copy
from pathlib import Path
from typing import Any

import yaml

Document = dict[str, Any]
_KNOWN = {"apiVersion", "kind", "namespace", "resources", "components", "patches", "images"}
_CLUSTER_WIDE = {"Namespace"}


def build(directory: Path) -> list[Document]:
    """Return the documents of a kustomization; raise ValueError for what this can't resolve."""
    return _apply([], directory)


def _apply(documents: list[Document], directory: Path) -> list[Document]:
    plan = yaml.safe_load((directory / "kustomization.yaml").read_text())
    if unknown := plan.keys() - _KNOWN:
        raise ValueError(f"{directory}: {sorted(unknown)} is more than scripts/kustomization.py knows")
    found = copy.deepcopy(documents)
    for name in plan.get("resources", ()):
        path = directory / name
        found += build(path) if path.is_dir() else [each for each in yaml.safe_load_all(path.read_text()) if each]
    for name in plan.get("components", ()):
        found = _apply(found, directory / name)
    for patch in plan.get("patches", ()):
        _patch_all(found, patch, directory)
    for document in found:
        _finish(document, plan)
    return found


def _patch_all(documents: list[Document], patch: Document, directory: Path) -> None:
    target = patch["target"]
    chosen = [each for each in documents if _is_target(each, target)]
    if not chosen:
        raise ValueError(f"{directory}: nothing is {target}")
    for document in chosen:
        for operation in yaml.safe_load(patch["patch"]):
            _patch(document, operation)


def _is_target(document: Document, target: Document) -> bool:
    name: str = document["metadata"]["name"]
    return bool(document["kind"] == target["kind"] and target.get("name", name) == name)


def _patch(document: Document, operation: Document) -> None:
    *way, last = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]]
    place: Any = document
    for part in way:
        place = place[int(part)] if isinstance(place, list) else place[part]
    value = copy.deepcopy(operation["value"])
    if isinstance(place, list):
        if last == "-":
            place.append(value)
        else:
            place[int(last)] = value
    elif operation["op"] == "replace" and last not in place:
        raise ValueError(f"{operation['path']} is not there to be replaced")
    else:
        place[last] = value


def _finish(document: Document, plan: Document) -> None:
    if "namespace" in plan and document["kind"] not in _CLUSTER_WIDE:
        document["metadata"]["namespace"] = plan["namespace"]
    for image in plan.get("images", ()):
        for container in containers(document):
            if container["image"].partition(":")[0] == image["name"]:
                container["image"] = f"{image['name']}:{image['newTag']}"


def pod_spec(document: Document) -> Document | None:
    """Return the pod's spec of a workload, None of what has no pods."""
    spec = document.get("spec", {})
    template = spec.get("jobTargetRef", spec).get("template") if isinstance(spec, dict) else None
    return None if template is None else template["spec"]


def containers(document: Document) -> list[Document]:
    """Return the containers of a workload, none of what has no pods."""
    pod = pod_spec(document)
    return [] if pod is None else [*pod.get("initContainers", ()), *pod["containers"]]
