"""The tests stand on what is shared, and on what lm_jax shows."""

import ast
import re

import pytest

from tests.helpers import ROOT

TESTS = sorted((ROOT / "tests").rglob("test_*.py"))
PATCHES = re.compile(r"""(?:setattr|patch\.object)\(\s*[\w.]+,\s*"_[a-z]""")


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_no_test_module_imports_another(path):
    imported = {
        f"{node.module}.{alias.name}"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert not [name for name in imported if re.match(r"tests\b.*\.test_", name)]


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_no_private_name_is_patched(path):
    assert not PATCHES.findall(path.read_text())
