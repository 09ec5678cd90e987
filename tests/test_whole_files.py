"""Files that are written whole or not at all."""

import math
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from lm_jax import files


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


def test_json_is_readable_and_has_null_for_what_is_not_finite(tmp_path):
    files.write_json(tmp_path / "a.json", {"é": [1.5, math.inf], "b": {"c": math.nan}})
    assert (tmp_path / "a.json").read_bytes() == (
        b'{\n  "\\u00e9": [\n    1.5,\n    null\n  ],\n  "b": {\n    "c": null\n  }\n}\n'
    )
    assert files.read_json(tmp_path / "a.json") == {"é": [1.5, None], "b": {"c": None}}
