"""What is installed, what it says about itself, and what must not be in it."""

import ast
import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import fm_jax

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SOURCES = [path for folder in ("fm_jax", "experiments", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]
TEXTS = [
    path
    for folder in ("fm_jax", "experiments", "benchmarks", "notebooks", "tests", ".ci", ".")
    for path in sorted((ROOT / folder).glob("*" if folder == "." else "**/*"))
    if path.is_file()
    and not {"__pycache__", ".git"} & {*path.parts}
    and path.suffix in ("", ".cff", ".ipynb", ".json", ".md", ".py", ".toml", ".txt", ".yaml", ".yml")
]


def relative(path):
    return str(path.relative_to(ROOT))


def test_dependencies_are_those_of_requirements():
    assert {"version", "dependencies"} <= set(PROJECT["project"]["dynamic"])
    assert PROJECT["tool"]["setuptools"]["dynamic"]["dependencies"] == {"file": "requirements.txt"}
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    required = {Requirement(line).name for line in lines}
    installed = [Requirement(line) for line in importlib.metadata.requires("fm_jax") or []]
    assert {each.name for each in installed if each.marker is None} == required


def test_version_is_stated_once():
    """In `_version.py`; the metadata read it, and the citation and the changelog follow."""
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "fm_jax._version.__version__"}
    assert importlib.metadata.version("fm_jax") == fm_jax.__version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == fm_jax.__version__
    released = f"## [{fm_jax.__version__}] - {citation['date-released']}"
    assert released in (ROOT / "CHANGELOG.md").read_text().splitlines()


def test_the_wheel_holds_fm_jax_only():
    """Every folder of the library is a package, so that none is left out; experiments and tests are not installed."""
    assert PROJECT["tool"]["setuptools"]["packages"] == {"find": {"include": ["fm_jax*"]}}
    assert PROJECT["tool"]["setuptools"]["package-data"] == {"fm_jax": ["py.typed"]}
    folders = {path.parent for path in SOURCES if path.is_relative_to(ROOT / "fm_jax")}
    assert [relative(folder) for folder in folders if not (folder / "__init__.py").exists()] == []
    assert (ROOT / "fm_jax" / "py.typed").exists()


def test_extras_are_declared():
    """Each extra that an error message asks to install."""
    asked = {name for path in SOURCES for name in re.findall(r"fm[_-]jax\[(\w+)\]", path.read_text())}
    assert asked <= set(PROJECT["project"]["optional-dependencies"])


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_public_names_have_docstrings(path):
    module = ast.parse(path.read_text())
    assert ast.get_docstring(module), "the file has no docstring"
    kinds = (ast.FunctionDef, ast.ClassDef)
    public = [node for node in module.body if isinstance(node, kinds) and not node.name.startswith("_")]
    assert [node.name for node in public if not ast.get_docstring(node)] == []


def test_no_path_of_a_machine():
    """Nothing that exists on one computer only; the system's own folders, as in `/usr/bin/env`, are everywhere."""
    pattern = re.compile(r"(?<![\w.~$}])/(?:home|Users|root|work|tmp|mnt|private)/|[A-Z]:\\Users")
    found = [
        f"{relative(path)}:{number}: {line.strip()}"
        for path in TEXTS
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.search(line)
    ]
    assert found == []
