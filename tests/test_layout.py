"""The package's modules import in one direction only."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
# From DESIGN: a module may import only what stands above it (or beside it, inside a package).
ORDER = (
    "cuda kernels config files data models loss optim sharding step metrics checkpoint "
    "workdir evaluate generate writers signals distill doctor run preflight train compare main "
    "__main__"
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
        return  # its names are imported when used, see test_face
    if path.parts[-2:] == ("doctor", "__main__.py"):
        own = "preflight"  # the command alone hands over to it
    for name in imports(path):
        other = name.split(".")[1]
        assert ORDER.index(other) <= ORDER.index(own), f"{path}: imports {name}"
