"""What an import costs, and which file may import which."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXTRAS = [
    "PIL",
    "array_record",
    "grain",
    "matplotlib",
    "ot",
    "ott",
    "sklearn",
    "tensorboardX",
    "tensorflow",
    "tensorflow_datasets",
    "torch",
    "tqdm",
    "tyro",
    "safetensors",
    "sentencepiece",
    "tokenizers",
    "transformers",
    "diffusers",
]
# A file imports from its own layer and those below.
LAYERS = [
    ["types", "_version"],
    ["checks", "shapes"],
    ["parts", "draws"],
    ["nfe", "manifolds", "sources", "schedules", "conditions", "latents"],
    ["times", "couplings", "oracles", "paths", "rates", "parameterization", "logits", "self_conditioning"],
    ["losses", "guidance", "samplers"],
    ["likelihood", "fewstep"],
]
CORE = {name: height for height, names in enumerate(LAYERS) for name in names}
# Each may import the core, which imports none of them, and what is named.
LEAVES: dict[str, list[str]] = {
    "models": [],
    "data": [],
    "metrics": [],
    "train": [],
    "text": ["models"],
    "weights": ["models", "text"],
    "pretrained": ["models", "text", "weights"],
}


def python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return result.stdout


def imports(path: Path) -> list[tuple[int, str]]:
    """Every module that a file imports, also inside functions: (line, dotted name)."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def package_of(path: Path) -> str:
    """The file or folder of fm_jax that a path belongs to: "schedules", "losses"."""
    return path.relative_to(ROOT / "fm_jax").parts[0].removesuffix(".py")


@pytest.mark.slow
def test_works_without_the_extras():
    """Losses, models, samplers and training, with everything of the extras out of reach."""
    python(f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {EXTRAS}:
            raise ImportError(f"{{name}} is blocked")

sys.meta_path.insert(0, Blocker())
import fm_jax
from fm_jax.losses import flow_matching
import fm_jax.metrics, fm_jax.models, fm_jax.samplers, fm_jax.train
import fm_jax.text, fm_jax.weights, fm_jax.pretrained
import fm_jax.train.checkpoint, fm_jax.train.loop, fm_jax.train.log, fm_jax.train.parallel
""")


@pytest.mark.slow
def test_importing_fm_jax_imports_jax_and_little_else():
    """Beyond JAX there are fm_jax, jaxtyping and the standard library; slow packages wait until they are called."""
    before, after = json.loads(
        python("""
import json, sys
import jax, jax.numpy
before = sorted(sys.modules)
import fm_jax
print(json.dumps([before, sorted(sys.modules)]))
""")
    )
    new = set(after) - set(before)
    packages = {name.partition(".")[0] for name in new} - {name.partition(".")[0] for name in before}
    assert packages - sys.stdlib_module_names == {"fm_jax", "jaxtyping", "wadler_lindig"}
    assert not set(after) & {"flax", "optax", "diffrax", "equinox", "orbax", "scipy.optimize", "fm_jax.models"}
    assert len([name for name in new if not name.startswith("fm_jax")]) < 40


@pytest.mark.parametrize("path", files("fm_jax"), ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_point_one_way(path):
    package = package_of(path)
    if package == "__init__":
        allowed = set(CORE)
    elif package in LEAVES:
        allowed = {*CORE, package, *LEAVES[package]}
    else:
        assert package in CORE, f"fm_jax/{package} is new: give it a place in LAYERS"
        allowed = {name for name in CORE if CORE[name] <= CORE[package]}
    for line, name in imports(path):
        top, _, rest = name.partition(".")
        assert top not in ("experiments", "benchmarks", "tests"), f"line {line}: a library file imports {name}"
        if top == "fm_jax":
            assert rest.partition(".")[0] in allowed, f"line {line}: {package} may not import {name}"


@pytest.mark.slow
def test_one_file_names_pmap():
    naming = [
        str(path.relative_to(ROOT))
        for path in [*files("fm_jax"), *files("experiments"), *files("benchmarks")]
        for node in ast.walk(ast.parse(path.read_text()))
        if "pmap" in (getattr(node, "attr", None), getattr(node, "id", None))
    ]
    assert naming == ["fm_jax/train/parallel.py"]
