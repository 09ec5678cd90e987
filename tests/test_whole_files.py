"""Files that are written whole or not at all."""

import fcntl
import math
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from lm_jax import files
from tests.helpers import read_only_folder


def test_a_file_gets_its_content_all_at_once(tmp_path):
    path = tmp_path / "a.txt"
    files.write_text(path, "old é")
    with files.whole(path) as file:
        file.write(b"ne")
        file.flush()
        assert path.read_text(encoding="utf-8") == "old é"
        file.write(b"w")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_and_nothing_beside_it(tmp_path, error):
    path = tmp_path / "a.npy"
    files.write_text(path, "old")
    with pytest.raises(error), files.whole(path) as file:
        np.save(file, np.arange(9))
        raise error
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_an_error_of_something_else_keeps_its_words(tmp_path):
    """Of what is read meanwhile."""
    with pytest.raises(OSError, match=r"^a page differs$"), files.whole(tmp_path / "a"):
        raise OSError("a page differs")


def test_a_kill_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    files.write_text(path, "old")
    program = (
        "import os, pathlib, signal, sys; from lm_jax import files\n"
        "with files.whole(pathlib.Path(sys.argv[1])) as file:\n"
        "    file.write(b'new'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.run([sys.executable, "-c", program, str(path)], env=environment)
    assert process.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    assert [other.name[0] for other in tmp_path.iterdir() if other != path] == ["."]
    (tmp_path / "run.1-0a1b2c3d").touch()
    living = tmp_path / f".b.txt.{os.getpid()}-0a1b2c3d"
    living.touch()
    files.remove_halves(tmp_path)
    assert {*tmp_path.iterdir()} == {path, living, tmp_path / "run.1-0a1b2c3d"}


def test_json_is_readable_and_has_null_for_what_is_not_finite(tmp_path):
    files.write_json(tmp_path / "a.json", {"é": [1.5, math.inf], "b": {"c": math.nan}})
    assert (tmp_path / "a.json").read_bytes() == (
        b'{\n  "\\u00e9": [\n    1.5,\n    null\n  ],\n  "b": {\n    "c": null\n  }\n}\n'
    )
    assert files.read_json(tmp_path / "a.json") == {"é": [1.5, None], "b": {"c": None}}


def test_no_link_that_waits_is_followed(tmp_path, monkeypatch):
    (tmp_path / "target").write_text("precious")
    monkeypatch.setattr("secrets.token_hex", lambda _: "known")
    for name in (f".a.txt.{os.getpid()}", f".a.txt.{os.getpid()}-known"):
        (tmp_path / name).symlink_to(tmp_path / "target")
    with pytest.raises(FileExistsError):
        files.write_text(tmp_path / "a.txt", "new")
    monkeypatch.undo()
    files.write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "target").read_text() == "precious"
    assert (tmp_path / "a.txt").read_text() == "new" and not (tmp_path / "a.txt").is_symlink()


def wait_for_none(holder):
    pytest.fail(f"{holder} has it")


@pytest.mark.parametrize("kind", ["link", "hard link", "link to nothing", "pipe", "folder", "text"])
def test_what_is_no_lock_stays_as_it_is(tmp_path, kind):
    target, lock = tmp_path / "target", tmp_path / "lock"
    target.write_text("precious")
    match kind:
        case "link":
            lock.symlink_to(target)
        case "hard link":
            lock.hardlink_to(target)
        case "link to nothing":
            lock.symlink_to(tmp_path / "nothing")
        case "pipe":
            os.mkfifo(lock)
        case "folder":
            lock.mkdir()
        case "text":
            lock.write_text("precious")
    with (
        pytest.raises(ValueError, match=r"lock is no lock of lm_jax; move it away, or .*\.$"),
        files.locked(lock, wait_for_none),
    ):
        pytest.fail("it was held")
    assert target.read_text() == "precious" and not (tmp_path / "nothing").exists()
    assert kind != "text" or lock.read_text() == "precious"


def test_a_lock_says_who_has_it(tmp_path):
    for _ in range(2):
        with files.locked(tmp_path / "lock", wait_for_none):
            assert (tmp_path / "lock").read_text().startswith(f"process {os.getpid()} on ")
            with (tmp_path / "lock").open() as other, pytest.raises(BlockingIOError):
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_without_write_permission_needs_no_lock(there):
    with read_only_folder() as (folder, as_nobody):
        lock = folder / "lock"
        if there:
            with files.locked(lock, wait_for_none):
                pass
        before = [(path, path.read_text()) for path in folder.iterdir()]
        with as_nobody():
            assert not files.can_write(folder) and not files.can_write(folder / "new")
            with files.locked(lock, wait_for_none):
                pass
            with pytest.raises(PermissionError):
                files.write_text(folder / "a.txt", "new")
        assert [(path, path.read_text()) for path in folder.iterdir()] == before
