"""Markers, which stand for locks where there are none."""

import errno
import fcntl
import json
import os
import platform
import subprocess
import time

import pytest

from lm_jax import files, marker, rundir
from lm_jax.config import ConfigError


class Place:
    """A marker in memory."""

    name = "there"

    def __init__(self, content=None):
        self.content = content

    def read(self):
        return self.content

    def write(self, content):
        self.content = content

    def remove(self):
        self.content = None


def sign(process=1, host="elsewhere", age=0.0, **more):
    found = {"process": process, "host": host, "since": "noon", "sign": time.time() - age, **more}
    return json.dumps({"token": "other", **found}).encode()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(marker, "REFRESH", 0.04)
    monkeypatch.setattr(marker, "SETTLE", 0.0)


class Taken(Exception):
    pass


def refuse(holder):
    raise Taken(holder)


def test_it_is_renewed_while_it_is_held_and_gone_after():
    place = Place()
    with marker.marked(place, refuse) as mine:
        first = json.loads(place.content)
        assert first["process"] == os.getpid() and mine()
        end = time.monotonic() + 5
        while json.loads(place.content)["sign"] == first["sign"]:
            assert time.monotonic() < end
            time.sleep(0.01)
        with pytest.raises(Taken, match=rf"^process {os.getpid()} on .*s ago; .* remove there\)$"):
            with marker.marked(place, refuse):
                pass
        assert mine()
    assert place.content is None


def dead():
    child = subprocess.Popen(["true"])
    child.wait()
    return child.pid


def test_one_whose_process_is_dead_is_taken_over_at_once(monkeypatch):
    monkeypatch.setattr(marker, "REFRESH", 60.0)
    with marker.marked(Place(sign(dead(), platform.node())), refuse) as mine:
        assert mine()


def test_one_of_this_number_before_a_restart_is_taken_over():
    place = Place(sign(os.getpid(), platform.node()))
    began = time.monotonic()
    with marker.marked(place, refuse) as mine:
        assert mine() and time.monotonic() - began >= 3 * marker.REFRESH


def test_one_of_this_number_that_moves_is_another_container(monkeypatch):
    class Moving(Place):
        def read(self):
            return sign(os.getpid(), platform.node(), age=-time.monotonic())

    with pytest.raises(Taken, match=f"process {os.getpid()} on "):
        with marker.marked(Moving(), refuse):
            pass


@pytest.mark.parametrize("skew", [-1e5, 0, 1e5])
def test_one_of_another_machine_is_taken_over_if_it_stands_still_whatever_its_clock(skew):
    place = Place(sign(age=skew))
    began = time.monotonic()
    with marker.marked(place, refuse) as mine:
        assert mine() and time.monotonic() - began >= 3 * marker.REFRESH


@pytest.mark.parametrize("skew", [-1e5, 1e5])
def test_one_of_another_machine_that_moves_is_not(skew):
    class Moving(Place):
        def read(self):
            self.content = sign(age=skew - time.monotonic())
            return self.content

    with pytest.raises(Taken, match="process 1 on elsewhere"):
        with marker.marked(Moving(), refuse):
            pass


def test_of_two_that_write_at_once_the_later_has_it(monkeypatch):
    place = Place()
    monkeypatch.setattr(marker.time, "sleep", lambda _: place.write(sign(age=-time.monotonic())))
    with pytest.raises(Taken, match="process 1 on elsewhere"):
        with marker.marked(place, refuse):
            pass


def test_who_lost_it_leaves_it_to_the_other(capsys):
    place = Place()
    with marker.marked(place, refuse) as mine:
        place.content = other = sign()
        end = time.monotonic() + 5
        while not (said := capsys.readouterr().err):
            assert time.monotonic() < end
            time.sleep(0.01)
        assert said == "there: taken over by another process\n" and not mine()
    assert place.content == other


@pytest.mark.parametrize("content", [b"", b"precious", b"{}", b'{"process": "x", "sign": 1}'])
def test_something_else_stays_as_it_is(content):
    place = Place(content)
    with pytest.raises(ValueError, match="there is no marker of lm_jax; move it away"):
        with marker.marked(place, refuse):
            pass
    assert place.content == content


@pytest.fixture
def no_locks(monkeypatch):
    def flock(file, how):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", flock)


def test_a_folder_without_locks_has_one_trainer(tmp_path, no_locks):
    with rundir.occupied(tmp_path):
        assert (tmp_path / ".lock.owner").exists()
        said = rf"process {os.getpid()} on .* remove {tmp_path}/\.lock\.owner\) is training there"
        with pytest.raises(ConfigError, match=said):
            with rundir.occupied(tmp_path):
                pass
    assert not (tmp_path / ".lock.owner").exists()
    with rundir.occupied(tmp_path):
        pass


def test_who_may_wait_waits_and_is_told_once(tmp_path, no_locks):
    lock, told = tmp_path / "lock", []
    owner = tmp_path / "lock.owner"
    owner.write_bytes(sign(os.getppid(), platform.node(), age=-0.3))
    with files.locked(lock, told.append):
        pass
    assert len(told) == 1 and not owner.exists()
