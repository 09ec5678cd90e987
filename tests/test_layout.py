"""The package's modules import in one direction only."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
# From DESIGN: a module may import only what stands above it (or beside it, inside a package).
ORDER = (
    "kernels config files data models loss optim sharding step metrics checkpoint "
    "workdir evaluate generate writers signals distill doctor preflight train compare main"
).split()


def imports(path: pathlib.Path) -> set[str]:
    """Names of the lm_jax modules a file imports, at any depth of the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{a.name}" for a in node.names}
    return {name for name in found if name.startswith("lm_jax.")}


@pytest.mark.parametrize("path", sorted((ROOT / "lm_jax").rglob("*.py")), ids=lambda p: p.name)
def test_imports_go_one_way(path):
    own = path.relative_to(ROOT / "lm_jax").parts[0].removesuffix(".py")
    if own == "__init__":
        assert not imports(path)
        return
    if path.parts[-2:] == ("doctor", "__main__.py"):
        own = "preflight"  # the command alone hands over to it
    for name in imports(path):
        other = name.split(".")[1]
        assert ORDER.index(other) <= ORDER.index(own), f"{path}: imports {name}"


def test_import_is_light():
    code = (
        "import sys, time; began = time.perf_counter(); import lm_jax; "
        "heavy = [m for m in ('jax', 'grain', 'tensorflow_datasets', 'tokenizers') "
        "if m in sys.modules]; assert not heavy, heavy; "
        "assert time.perf_counter() - began < 1"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
