"""Check deploy/kubernetes by schema, offline: `python scripts/check_kubernetes.py`; a line for each mistake.

Kubernetes' own kinds by the strict schemas that the package kubernetes-validate brings, for the oldest and the newest
version that is meant; others by the schemas beside the manifests. Overlays are built by scripts/kustomization.py.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import kubernetes_validate
from kustomization import Document, build

KUBERNETES = Path(__file__).parents[1] / "deploy" / "kubernetes"
# gRPC probes are stable since 1.27.
VERSIONS = ("1.29", "1.36")


def overlays() -> list[Path]:
    """Return what can be applied."""
    return sorted(path.parent for path in KUBERNETES.glob("overlays/*/kustomization.yaml"))


def problems(document: Document) -> Iterator[str]:
    """Yield a line for each thing that is wrong with a document."""
    where = f"{document['kind']} {document['metadata']['name']}"
    own = KUBERNETES / "schemas" / f"{document['kind']}.json"
    if own.exists():
        validator = jsonschema.Draft202012Validator(json.loads(own.read_text()))
        for error in validator.iter_errors(document):
            yield f"{where}: {error.json_path}: {error.message}"
        if (job := document["spec"].get("jobTargetRef")) is not None:
            job_document = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}, "spec": job}
            yield from (f"{where}: {line}" for line in _by_kubernetes(job_document))
        return
    yield from (f"{where}: {line}" for line in _by_kubernetes(document))


def _by_kubernetes(document: Document) -> Iterator[str]:
    for version in VERSIONS:
        try:
            kubernetes_validate.validate(document, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            path = ".".join(str(part) for part in error.path)
            yield f"Kubernetes {version}: {path}: {error.message}"
        except kubernetes_validate.SchemaNotFoundError as error:
            yield f"Kubernetes {version} knows no {document['apiVersion']} {document['kind']}: {error}"


def main() -> None:
    """Check every overlay; exit 1 with the lines if something is wrong."""
    found = []
    for overlay in overlays():
        documents = build(overlay)
        names = [(each["kind"], each["metadata"]["name"]) for each in documents]
        twice = sorted({each for each in names if names.count(each) > 1})
        found += [f"{overlay.name}: {kind} {name} is there twice" for kind, name in twice]
        found += [f"{overlay.name}: {line}" for document in documents for line in problems(document)]
    for line in found:
        print(line, file=sys.stderr)
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
