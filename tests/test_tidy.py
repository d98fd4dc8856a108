"""What a reviewer would otherwise have to look for: style, import contracts, fresh stubs, true paths in the docs."""

import ast
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
PACKAGES = ("balancer_svc", "collegium", "expert_svc", "gateway", "router_svc")
PATH_OF_ONE_MACHINE = re.compile(r"(?<![\w.~-])/(?:home|root|Users|work|mnt|media)/[\w.]")
REPOSITORY_PATH = re.compile(r"^[\w.-]+(?:/[\w.-]+)*/?$")


def run(*command: str | Path) -> str:
    """Run a tool in the repository; fail with what it printed."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@cache
def repository_files() -> list[Path]:
    """List the files that git tracks or would track."""
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z").split("\0")
    return [path for name in listed if name and (path := ROOT / name).is_file()]


def documents() -> list[Path]:
    return [path for path in repository_files() if path.suffix == ".md"]


def test_ruff_finds_nothing() -> None:
    run(BIN / "ruff", "check", ".")


def test_sources_are_formatted() -> None:
    run(BIN / "ruff", "format", "--check", ".")


def test_imports_point_down_and_no_service_imports_another() -> None:
    run(BIN / "lint-imports", "--no-cache")


def package_sources(package: str) -> list[Path]:
    return [path for path in repository_files() if path.suffix == ".py" and path.is_relative_to(ROOT / package)]


def test_every_channel_is_opened_in_one_place() -> None:
    # There it gets our limits, and no proxy of the shell; so does what asks for a page.
    opens = re.compile(r"\b(?:in)?secure_channel\(|\burlopen\(|\bHTTPS?Connection\(")
    sources = [
        path
        for package in (*PACKAGES, "benchmarks", "deploy")
        for path in repository_files()
        if path.is_relative_to(ROOT / package) and path.suffix in (".py", ".yaml", ".tpl")
    ]
    found = {path.relative_to(ROOT).as_posix() for path in sources if opens.search(path.read_text())}
    assert found == {"collegium/fabric/channels.py"}


def test_stubs_are_what_the_protos_generate(tmp_path: Path) -> None:
    protos = sorted((ROOT / "protos").rglob("*.proto"))
    assert protos
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    run(sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'protos'}", *outputs, *protos)
    fresh = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*.py*")}
    assert len(fresh) == 3 * len(protos)
    stale = [str(name) for name, text in fresh.items() if (ROOT / name).read_text() != text]
    assert not stale, f"run `make protos`: {stale}"
    committed = {path.relative_to(ROOT) for path in (ROOT / "collegium" / "v1").glob("*_pb2*")}
    assert committed == fresh.keys()


def test_every_module_says_what_it_owns() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for package in (*PACKAGES, "tests", "benchmarks")
        for path in package_sources(package)
        if "collegium/v1/" not in path.as_posix()
        and path.stat().st_size
        and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert not silent, f"modules without a docstring: {silent}"


def test_paths_named_in_documents_exist() -> None:
    top = {path.relative_to(ROOT).parts[0] for path in repository_files()}
    names = {path.name for path in repository_files()}
    missing: list[str] = []
    for document in documents():
        text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.DOTALL | re.MULTILINE)
        for match in re.finditer(r"`([^`\n]+)`|\]\(([^)#\s]+)", text):
            name = match[1] or match[2]
            is_link = match[2] is not None
            if not REPOSITORY_PATH.match(name):
                continue
            if is_link:
                is_there = (document.parent / name).exists()
            elif "/" in name.rstrip("/") or name.endswith("/"):
                if name.split("/")[0] not in top:
                    continue
                is_there = (ROOT / name).exists() or (document.parent / name).exists()
            elif Path(name).suffix in {".py", ".md", ".proto", ".toml", ".lock"}:
                is_there = name in names
            else:
                continue
            if not is_there:
                missing.append(f"{document.relative_to(ROOT)}: {name}")
    assert not missing, missing


def test_commands_named_in_documents_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = {name for path in documents() for name in re.findall(r"`make ([a-z-]+)", path.read_text())}
    assert named <= targets


def test_no_file_names_a_path_of_one_machine() -> None:
    found: list[str] = []
    for path in repository_files():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        found += [
            f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
            for number, line in enumerate(text.splitlines(), 1)
            if PATH_OF_ONE_MACHINE.search(line)
        ]
    assert not found, found


def test_the_lock_pins_every_requirement_without_hash_or_local_version() -> None:
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    pinned = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    for requirement in map(Requirement, wanted):
        if requirement.name != project["name"]:
            version = pinned[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version), f"{requirement} is not met by {version}"


@pytest.mark.parametrize("folder", ["home/me", "root", "work/x"])
def test_the_search_for_machine_paths_can_fail(folder: str) -> None:
    assert PATH_OF_ONE_MACHINE.search(f"cd '/{folder}/y'")
