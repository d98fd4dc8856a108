"""The chart, rendered: by Helm itself, in process, offline.

Owns the list of values files, rendering, and the ways to find something in what was rendered. Judges nothing.
"""

import functools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import helm_python
import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy" / "k8s" / "collegium"
GOLDEN = Path(__file__).parent / "golden"
RELEASE, NAMESPACE = "moe", "collegium"
# By name: the files of values that are tried. `default` is none; `everything` switches on what no other one does.
VALUES: Mapping[str, Path | None] = {
    "default": None,
    "cpu": CHART / "values-cpu.yaml",
    "one-node-gpus": CHART / "values-one-node-gpus.yaml",
    "multi-node": CHART / "values-multi-node.yaml",
    "everything": Path(__file__).parent / "everything.yaml",
}
RENEW = os.environ.get("COLLEGIUM_RENEW") == "1"  # write golden files and the settings in the schema anew

Object = dict[str, Any]
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's, where there is one: ten times as quick


def read_objects(text: str) -> list[Object]:
    """Read the documents of a YAML stream that are not empty."""
    return [document for document in yaml.load_all(text, Loader=_Loader) if document]


def in_order(objects: list[Object]) -> list[Object]:
    """Sort objects as every comparison has them."""
    return sorted(objects, key=lambda one: (one["kind"], one["metadata"]["name"]))


def chart() -> helm_python.Chart:
    """Load the chart: anew each time, for rendering with a dependency switched off takes it out of a loaded one."""
    return helm_python.Chart.load(CHART)


def values_of(name: str) -> dict[str, Any]:
    """Read a values file by its name."""
    path = VALUES[name]
    return {} if path is None else yaml.safe_load(path.read_text())


def render_values(values: Mapping[str, Any], *, release: str = RELEASE) -> list[Object]:
    """Render for values that are given; every object, in a stable order."""
    files = chart().render(dict(values), name=release, namespace=NAMESPACE)
    return in_order([one for name, text in files.items() if not name.endswith(".txt") for one in read_objects(text)])


@functools.cache
def render(name: str) -> list[Object]:
    """Render a values file by its name; not to be modified."""
    return render_values(values_of(name))


def notes(values: Mapping[str, Any]) -> str:
    """Render what an installation prints."""
    files = chart().render(dict(values), name=RELEASE, namespace=NAMESPACE)
    return files["collegium/templates/NOTES.txt"]


def of_kind(objects: list[Object], *kinds: str) -> list[Object]:
    """Pick objects by kind."""
    return [one for one in objects if one["kind"] in kinds]


def find(objects: list[Object], kind: str, name: str) -> Object:
    """Give the one object of a kind and a name (without the release's)."""
    (found,) = [one for one in of_kind(objects, kind) if one["metadata"]["name"] == f"{RELEASE}-{name}"]
    return found


def pods(objects: list[Object]) -> Iterator[tuple[str, dict[str, str], Object]]:
    """Give (name, labels, spec) of every pod that the objects bring about."""
    for one in objects:
        if one["kind"] == "Pod":
            yield one["metadata"]["name"], one["metadata"]["labels"], one["spec"]
        elif "template" in one.get("spec", {}):
            template = one["spec"]["template"]
            yield one["metadata"]["name"], template["metadata"]["labels"], template["spec"]


def containers(spec: Object) -> list[Object]:
    """Give all containers of a pod, init containers first."""
    return [*spec.get("initContainers", []), *spec["containers"]]


def selects(selector: Object, labels: Mapping[str, str]) -> bool:
    """Say whether a label selector with matchLabels matches."""
    assert not selector.get("matchExpressions"), "only matchLabels are understood"
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())
