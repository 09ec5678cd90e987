"""What is shipped: the wheel holds the package and its configs, the sdist all that tests need."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

from tests.helpers import CONFIGS, ROOT

pytest.importorskip("setuptools", minversion="77", reason="setuptools >= 77 builds the wheel")
BUILD = """
import sys
from setuptools import build_meta

_, folder = sys.argv
build_meta.build_wheel(folder)
build_meta.build_sdist(folder)
"""
NOT_SOURCE = shutil.ignore_patterns(
    *("__pycache__", "*.egg-info", "build", "dist", "runs", "site"),
    *(".git", ".venv*", ".*_cache"),
)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder: `source`, a copy of the repository, and `dist`, what was built from it."""
    folder = tmp_path_factory.mktemp("built")
    shutil.copytree(ROOT, folder / "source", ignore=NOT_SOURCE)
    command = [sys.executable, "-W", "ignore", "-c", BUILD, str(folder / "dist")]
    subprocess.run(command, cwd=folder / "source", check=True, capture_output=True)
    return folder


def files(folder, pattern="*"):
    """Paths of files below a folder, relative to it, but what a build leaves there."""
    found = (path for path in folder.rglob(pattern) if path.is_file())
    left = ("build/", "lm_jax.egg-info/")
    names = {path.relative_to(folder).as_posix() for path in found}
    return {name for name in names if not name.startswith(left)}


def test_the_wheel_holds_the_package_its_data_and_the_configs(built):
    (path,) = (built / "dist").glob("*.whl")
    names = {name for name in zipfile.ZipFile(path).namelist() if ".dist-info/" not in name}
    expected = {f"lm_jax/{name}" for name in files(built / "source" / "lm_jax", "*.py")}
    expected |= {f"lm_jax/configs/{name}.py" for name in CONFIGS}
    assert names == expected | {"lm_jax/py.typed", "lm_jax/doctor/FAULTS.md"}


def test_the_sdist_holds_all_that_the_repository_does(built):
    (path,) = (built / "dist").glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert files(built / "source") <= names


def test_an_installed_package_finds_its_configs_from_an_empty_folder(built, tmp_path):
    (path,) = (built / "dist").glob("*.whl")
    zipfile.ZipFile(path).extractall(tmp_path / "site")
    (tmp_path / "empty").mkdir()
    code = (
        "from lm_jax.config import flags, manual\n"
        "print(flags.find_config('configs/quickstart.py'), *manual.shipped())\n"
        "print(flags.load_config('distill:teacher').data.corpus)"
    )
    run = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=tmp_path / "empty",
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=True,
    )
    configs = tmp_path / "site" / "lm_jax" / "configs"
    assert run.stdout.split() == [str(configs / "quickstart.py"), *CONFIGS, "wikitext2"]
