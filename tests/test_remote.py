"""Corpora and runs in an object store, for which a store in memory stands."""

import json
import os
import secrets
import shutil
import sys
import time

import pytest

from lm_jax import config, evaluate, main, marker, mirror, places, signals
from lm_jax.config import Config, ConfigError
from lm_jax.data.corpora import open_corpus
from lm_jax.files import user_path
from lm_jax.mirror import Mirror
from lm_jax.places import pulled, put_back, trained_in
from lm_jax.remote import Bucket
from lm_jax.signals import Interrupted
from tests.helpers import rows, small

pytest.importorskip("fsspec", reason="fsspec opens the stores")


@pytest.fixture
def url():
    """Of a run that is not there yet."""
    return f"memory://{secrets.token_hex(8)}/run"


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setattr(marker, "SETTLE", 0.0)
    monkeypatch.setattr(places, "POLL", 0.01)
    monkeypatch.setattr(places, "PAUSE", 0.01)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(os, "fsync", lambda _: None)  # no machine dies here


def put(bucket_url, files):
    for name, text in files.items():
        Bucket(bucket_url).put_content(name, text.encode())


def contents(bucket_url):
    bucket = Bucket(bucket_url)
    return {name: bucket.content(name).decode() for name in bucket.find()}


# Corpora


def opened(pattern, cache, **options):
    return open_corpus("text", files=pattern, cache_dir=str(cache), **options)


def test_a_corpus_in_a_store_is_that_of_its_files(tmp_path, url):
    # In the order of paths; as text "a/b" comes after "a-b".
    texts = {name: f"text {name}" for name in ("a/b.txt", "a-b.txt", "a/a.txt", "c.txt", "d.md")}
    put(url, texts)
    for name, text in texts.items():
        (tmp_path / "here" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "here" / name).write_text(text)
    here = opened("**/*.txt", tmp_path / "cache", source_dir=str(tmp_path / "here"))
    for cache in ("one", "two"):
        there = opened(f"{url}/**/*.txt", tmp_path / cache)
        assert there.fingerprint == here.fingerprint
        assert [*there.documents("train")] == [*here.documents("train")]
    several = opened(f"{url}/c.txt, {url}/a/*.txt,{url}/a-b.txt,{url}/c.txt", tmp_path / "one")
    assert several.fingerprint == here.fingerprint


def test_a_file_is_fetched_once_and_again_when_it_changes(tmp_path, url, monkeypatch):
    put(url, {"a.txt": "one", "b.txt": "two"})
    got, copy = [], Bucket.copy

    def count(self, *arguments):
        got.append(arguments[0].rpartition("/")[2])
        copy(self, *arguments)

    monkeypatch.setattr(Bucket, "copy", count)
    first = opened(f"{url}/*.txt", tmp_path)
    assert opened(f"{url}/*.txt", tmp_path).fingerprint == first.fingerprint and len(got) == 2
    put(url, {"b.txt": "TWO"})
    assert opened(f"{url}/*.txt", tmp_path).fingerprint != first.fingerprint
    assert got[2:] == ["b.txt"]


def test_what_a_record_names_is_not_fetched(tmp_path, url):
    put(url, {"a.txt": "one"})
    with pytest.raises(FileNotFoundError, match=r"was not fetched here, .*source_dir .*\.$"):
        opened(f"{url}/*.txt", tmp_path, fetch=False)
    first = opened(f"{url}/*.txt", tmp_path)
    Bucket(url).drop("a.txt")
    assert opened(f"{url}/*.txt", tmp_path, fetch=False).fingerprint == first.fingerprint


def test_half_a_file_is_none(tmp_path, url):
    put(url, {"a.txt": "one"})
    with pytest.raises(OSError, match=r"a\.txt has 3 bytes instead of 4; give the same command"):
        Bucket(url).get("a.txt", tmp_path / "a.txt", 4)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("memory://nothing/*.txt", r"memory://nothing/\*\.txt names no file: correct it in"),
        (
            "what://bucket/*.txt",
            r"what://bucket/\*\.txt: Protocol not known: what; give a path, or",
        ),
        (
            "s3://bucket/*.txt",
            r"s3://bucket/\*\.txt: .*s3fs.*; run `pip install 'lm_jax\[remote\]'",
        ),
    ],
)
def test_what_cannot_be_read_is_told(tmp_path, monkeypatch, pattern, said):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises((ValueError, OSError), match=said):
        opened(pattern, tmp_path)


def test_without_fsspec_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(ConfigError, match=r"^s3://b/c: .*fsspec.*pip install 'lm_jax\[remote\]'"):
        Bucket("s3://b/c")


def test_a_url_is_no_source_dir(tmp_path):
    with pytest.raises(ValueError, match=r"data\.source_dir='s3://b' is no folder: leave it out"):
        opened("*.txt", tmp_path, source_dir="s3://b")


# Runs


def checkpoint(folder, kind, update):
    """A file with a name of its own, as orbax gives them, and one that tells it."""
    for path in folder.glob(f"{kind}/{update}"):
        shutil.rmtree(path)
    own = secrets.token_hex(8)
    for name in ("metadata", f"state/{own}"):
        path = folder / kind / str(update) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{kind} {update} {own}")


def begun(folder):
    """A run of 4 updates that is finished."""
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text("ids")
    (folder / "config.json").write_text("4")
    (folder / "metrics.jsonl").write_text("1234")
    checkpoint(folder, "best", 4)
    checkpoint(folder, "checkpoints", 4)
    (folder / "eval_valid.json").write_text("4")


def longer(folder):
    """The same, lengthened to 8 updates and finished again."""
    (folder / "eval_valid.json").unlink()
    (folder / "config.json").write_text("8")
    (folder / "metrics.jsonl").write_text("12345678")
    for kind in ("best", "checkpoints"):
        checkpoint(folder, kind, 8)
        shutil.rmtree(folder / kind / "4")
    (folder / "eval_valid.json").write_text("8")


def lengthened(folder):
    """To 8 updates, of which none is made."""
    (folder / "eval_valid.json").unlink()
    (folder / "config.json").write_text("8")


def made_anew(folder):
    """The newest checkpoint was damaged, and its updates are made again."""
    checkpoint(folder, "checkpoints", 4)


def opening(url, cache, keep=1):
    found = Mirror(url, str(cache), "train", keep)
    found.open(lambda: True)
    return found


def files(folder):
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }


class Killed(BaseException):
    pass


def push_killed(here, last):
    """Push, and be killed after write number `last`; whether it came so far."""
    left = [last]

    def counted(method):
        def write(*arguments):
            method(*arguments)
            left[0] -= 1
            if not left[0]:
                raise Killed

        return write

    with pytest.MonkeyPatch.context() as patch:
        for name in ("put", "put_content", "drop"):
            patch.setattr(Bucket, name, counted(getattr(Bucket, name)))
        try:
            here.push()
        except Killed:
            return True
    return False


def whole_run(folder):
    """Asserts that the folder holds a run to go on with, and returns its newest update."""
    there = files(folder)
    newest = {}
    for kind in ("best", "checkpoints"):
        (path,) = (folder / kind).iterdir()
        (state,) = (path / "state").iterdir()
        assert {*files(path).values()} == {f"{kind} {path.name} {state.name}"}
        newest[kind] = int(path.name)
    assert there["tokenizer/tokenizer.json"] == "ids"
    assert len(there["metrics.jsonl"]) >= newest["checkpoints"]
    # It is finished only by the scores of its own end.
    end = str(newest["checkpoints"])
    assert there.get("eval_valid.json", end) == end
    return newest["checkpoints"]


def elsewhere(url, tmp_path):
    """The folder of a copy of the store, as another machine opens it."""
    copy = f"memory://{secrets.token_hex(8)}/run"
    put(copy, contents(url))
    return opening(copy, tmp_path / "elsewhere").folder


@pytest.mark.parametrize("change", [longer, lengthened, made_anew])
def test_a_kill_between_any_two_writes_leaves_a_run(tmp_path, change):
    for last in range(1, 100):
        url, cache = f"memory://{secrets.token_hex(8)}/run", tmp_path / f"{last}"
        here = opening(url, cache)
        begun(here.folder)
        here.push()
        change(here.folder)
        want = files(here.folder)
        killed = push_killed(here, last)
        there = elsewhere(url, tmp_path)
        whole_run(there)
        if not killed:
            break
        # The machine itself has all of it, and goes on.
        again = opening(url, cache)
        assert files(again.folder) == want
        again.push()
        assert files(elsewhere(url, tmp_path)) == want
        known = json.loads(contents(url)[mirror.INDEX])["checkpoints"]
        named = {f"{one['at']}/{name}" for one in known.values() for name in one["files"]}
        stored = {name for name in contents(url) if name.startswith(("checkpoints/", "best/"))}
        assert named == stored
    assert last >= 2 and files(there) == want


def test_a_kill_in_the_first_push_leaves_a_new_run(tmp_path):
    for last in range(1, 100):
        url = f"memory://{secrets.token_hex(8)}/run"
        here = opening(url, tmp_path / f"{last}")
        begun(here.folder)
        killed = push_killed(here, last)
        there = elsewhere(url, tmp_path)
        if (there / "checkpoints").exists():
            whole_run(there)
        if not killed:
            break
    assert last > 8 and files(there) == files(here.folder)


def test_the_store_is_right_where_another_machine_went_on(tmp_path, url):
    one = opening(url, tmp_path / "one")
    begun(one.folder)
    one.push()
    two = opening(url, tmp_path / "two")
    assert files(two.folder) == files(one.folder)
    longer(two.folder)
    two.push()
    (one.folder / "late.json").write_text("old")
    again = opening(url, tmp_path / "one")
    assert files(again.folder) == files(two.folder) and whole_run(again.folder) == 8


def test_a_run_that_was_removed_from_the_store_begins_anew(tmp_path, url):
    here = opening(url, tmp_path)
    begun(here.folder)
    here.push()
    for name in contents(url):
        Bucket(url).drop(name)
    assert not files(opening(url, tmp_path).folder)


def checkpoints_there(url):
    return sorted(json.loads(contents(url)[mirror.INDEX])["checkpoints"])


def test_old_checkpoints_that_are_not_here_stay_as_long_as_they_would(tmp_path, url):
    one = opening(url, tmp_path / "one", keep=2)
    for update in (2, 4):
        checkpoint(one.folder, "checkpoints", update)
    one.push()
    two = opening(url, tmp_path / "two", keep=2)
    assert [path.name for path in (two.folder / "checkpoints").iterdir()] == ["4"]
    two.push()
    assert checkpoints_there(url) == ["checkpoints/2", "checkpoints/4"]
    checkpoint(two.folder, "checkpoints", 6)
    two.push()
    assert checkpoints_there(url) == ["checkpoints/4", "checkpoints/6"]
    assert not [name for name in contents(url) if name.startswith("checkpoints/2")]
    # Damaged and set aside, both of them, and made anew from the best one.
    shutil.rmtree(two.folder / "checkpoints")
    checkpoint(two.folder, "checkpoints", 3)
    two.push()
    assert checkpoints_there(url) == ["checkpoints/3"]


def test_a_checkpoint_that_is_being_removed_is_not_pushed(tmp_path, url):
    here = opening(url, tmp_path, keep=1)
    begun(here.folder)
    here.push()
    for kind in ("best", "checkpoints"):
        checkpoint(here.folder, kind, 8)
        (here.folder / kind / "4" / "metadata").unlink()
    here.push()
    assert checkpoints_there(url) == ["best/8", "checkpoints/8"]
    assert not [name for name in contents(url) if name.partition("/")[2].startswith("4/")]


def test_a_folder_that_was_emptied_empties_no_store(tmp_path, url):
    here = opening(url, tmp_path)
    begun(here.folder)
    here.push()
    shutil.rmtree(here.folder / "checkpoints")
    here.push()
    assert "checkpoints/4" in checkpoints_there(url)
    assert whole_run(opening(url, tmp_path).folder) == 4


def test_something_else_is_left_alone(tmp_path, url):
    put(url, {"photo.jpg": "x"})
    with pytest.raises(ConfigError, match=r"run: holds photo\.jpg and no run .* new or empty\.$"):
        opening(url, tmp_path)
    assert [*contents(url)] == ["photo.jpg"]


def test_an_index_that_is_none_is_named(tmp_path, url):
    put(url, {mirror.INDEX: "{"})
    with pytest.raises(ConfigError, match=r"run/\.lm_jax\.json: is not as lm_jax writes it; rest"):
        opening(url, tmp_path)


def test_who_lost_the_run_pushes_nothing(tmp_path, url):
    here = Mirror(url, str(tmp_path), "train")
    here.open(lambda: False)
    begun(here.folder)
    with pytest.raises(RuntimeError, match=r"another process has taken the run over.*alone\.$"):
        here.push()
    assert [*contents(url)] == [mirror.INDEX]


def tiny(tmp_path):
    return config.replace(Config(), data__cache_dir=str(tmp_path / "cache"), train__keep=1)


def test_a_checkpoint_is_pushed_while_the_run_goes_on(tmp_path, url):
    with trained_in(url, tiny(tmp_path)) as folder:
        begun(folder)
        end = time.monotonic() + 20
        while '"checkpoints/4"' not in contents(url).get(mirror.INDEX, ""):
            assert time.monotonic() < end
            time.sleep(0.01)
        with pytest.raises(ConfigError, match=rf"process {os.getpid()} on .* is training there"):
            with trained_in(url, tiny(tmp_path / "other")):
                pass
        (folder / "metrics.jsonl").write_text("12345")
    assert contents(url)["metrics.jsonl"] == "12345"
    assert not [name for name in contents(url) if name.endswith(".owner")]


def test_a_push_that_fails_is_told_and_tried_again(tmp_path, url, monkeypatch, capsys):
    fails, real = [True], Bucket.put

    def sometimes(self, name, path):
        if fails[0]:
            raise OSError("no network.")
        real(self, name, path)

    with trained_in(url, tiny(tmp_path)) as folder:
        monkeypatch.setattr(Bucket, "put", sometimes)
        begun(folder)
        end = time.monotonic() + 20
        while "tried again" not in (said := capsys.readouterr().out):
            assert time.monotonic() < end
            time.sleep(0.01)
        assert "not pushed, tried again in " in said and said.endswith(": no network.\n")
        fails[0] = False
    assert whole_run(opening(url, tmp_path / "other").folder) == 4
    fails[0] = True
    with pytest.raises(OSError, match=rf"^no network; it goes on from {folder}, which holds all"):
        with trained_in(url, tiny(tmp_path)) as folder:
            longer(folder)
    with pytest.raises(KeyError, match="of the run"):  # which is what ended it
        with trained_in(url, tiny(tmp_path)):
            raise KeyError("of the run")
    fails[0] = False
    with trained_in(url, tiny(tmp_path)):
        pass
    assert whole_run(opening(url, tmp_path / "third").folder) == 8


def test_a_run_that_another_trainer_took_over_is_stopped(tmp_path, url, capsys):
    with signals.handled(), pytest.raises(Interrupted, match="stopped by SIGTERM"):
        with trained_in(url, tiny(tmp_path)) as folder:
            other = {"process": 1, "host": "elsewhere", "sign": 0.0, "token": "other"}
            Bucket(url).write(json.dumps(other).encode())
            begun(folder)
            for _ in range(2000):
                time.sleep(0.01)
    assert "another process has taken the run over" in capsys.readouterr().out
    assert mirror.INDEX in contents(url) and "checkpoints/4" not in contents(url)[mirror.INDEX]


def test_a_path_is_itself(tmp_path):
    with trained_in(str(tmp_path), tiny(tmp_path)) as folder:
        assert folder == pulled(str(tmp_path)) == tmp_path
    (tmp_path / "a").write_text("a")
    put_back(tmp_path, "a")


def test_several_processes_need_a_folder(tmp_path, url, monkeypatch):
    for name, value in ("JAX_NUM_PROCESSES", "2"), ("JAX_PROCESS_ID", "1"):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    with pytest.raises(
        ConfigError, match=r"--workdir=memory.*: several processes .*mount the buck"
    ):
        with trained_in(url, tiny(tmp_path)):
            pass
    assert not contents(url)


def test_the_first_process_alone_puts_back(tmp_path, url, monkeypatch):
    with trained_in(url, tiny(tmp_path)) as folder:
        begun(folder)
    (folder := pulled(url, "best")).joinpath("eval_train.json").write_text("{}")
    several = {"JAX_NUM_PROCESSES": "2", "JAX_COORDINATOR_ADDRESS": "127.0.0.1:1"}
    for rank in "10":
        for name, value in (several | {"JAX_PROCESS_ID": rank}).items():
            monkeypatch.setenv(name, value)
        put_back(folder, "eval_train.json")
        assert ("eval_train.json" in contents(url)) == (rank == "0")


def test_a_flag_that_takes_no_url_refuses_it():
    with pytest.raises(ValueError, match=r"^gs://b/out is a URL; mount the bucket, and give a pa"):
        user_path("gs://b/out")


def test_a_run_is_read_beside_who_trains_it(tmp_path, url):
    with pytest.raises(FileNotFoundError, match=r"run: no run is there; correct the URL\.$"):
        pulled(url)
    one = opening(url, tmp_path / "one", keep=2)
    begun(one.folder)
    checkpoint(one.folder, "checkpoints", 2)
    one.push()
    folder = pulled(url)
    assert folder.name == "run" and not (folder / "checkpoints").exists()
    assert (folder / "metrics.jsonl").read_text() == "1234"
    assert sorted(path.name for path in (pulled(url, "best") / "checkpoints").iterdir()) == ["4"]
    pulled(url, 2)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["2", "4"]
    longer(one.folder)
    shutil.rmtree(one.folder / "checkpoints" / "2")
    one.push()
    pulled(url, "last")
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["4", "8"]
    there = files(folder)
    assert {name: there.get(name) for name in files(one.folder)} == files(one.folder)
    (folder / "eval_test.json").write_text("scores")
    put_back(folder, "eval_test.json")
    assert contents(url)["eval_test.json"] == "scores"


@pytest.mark.slow
def test_train_go_on_elsewhere_and_evaluate(text, tmp_path, url):
    put(f"{url}-text", {path.name: path.read_text() for path in text.glob("*.txt")})
    given = dict(data__source_dir="", data__files=f"{url}-text/*.txt", train__checkpoint_every="3")
    one, two = (str(tmp_path / name) for name in ("one", "two"))
    cfg = small(text, **given, data__cache_dir=one, train__steps="6", optim__schedule="constant")
    main.train(cfg, url)
    run = main.train(config.replace(cfg, train__steps="12", data__cache_dir=two), url)
    assert run.workdir.is_relative_to(two) and [row["step"] for row in rows(run.workdir)][-1] == 12
    whole = main.train(config.replace(cfg, train__steps="12"), tmp_path / "whole")
    assert run.scores["valid"]["loss"] == whole.scores["valid"]["loss"]
    evaluate.main(["evaluate", url, "--split=train", f"--config.data.cache_dir={one}"])
    assert json.loads(Bucket(url).content("eval_train.json"))["step"] == 12
