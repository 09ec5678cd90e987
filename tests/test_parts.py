"""Tokenising in several processes: the same bytes for any number of them and after any kill."""

import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from lm_jax.data import parts, shards
from lm_jax.data.corpora import Corpus, open_corpus
from lm_jax.data.store import prepare
from lm_jax.data.tokenizers.kinds import ByteTokenizer, CharTokenizer


def content(path):
    """Every file of a folder."""
    return {
        str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()
    }


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """JSONL of a dozen pieces in two splits."""
    monkeypatch.setattr(shards, "PIECE", 2000)
    lines = [json.dumps({"text": f"document {i} " * (i % 7)}) for i in range(400)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    options = {"source_dir": str(tmp_path), "files": "a.jsonl", "document": "jsonl:text"}
    return open_corpus("text", **options, cache_dir=str(tmp_path / "cache"))


@pytest.mark.parametrize(("kind", "vocab_size"), [("char", 0), ("bpe", 280)])
def test_any_number_of_processes_writes_the_same_bytes(
    tmp_path, monkeypatch, corpus, kind, vocab_size
):
    def run(workers):
        cache = str(tmp_path / f"{workers}")
        options = {"tokenizer_kind": kind, "vocab_size": vocab_size, "cache_dir": cache}
        path = prepare(corpus, **options, workers=workers).path
        assert [found.name for found in path.parent.iterdir()] == [path.name]
        return content(path)

    started, popen = [], subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda *a, **options: started.append(0) or popen(*a, **options)
    )
    assert len(corpus.splits["train"]) > 10
    one = run(1)
    assert not started
    assert run(3) == one
    assert len(started) == 3
    assert len(one) == 6
    # In one piece, without processes:
    monkeypatch.setattr(shards, "PIECE", 1 << 25)
    options = {"source_dir": str(tmp_path), "files": "a.jsonl", "document": "jsonl:text"}
    corpus = open_corpus("text", **options, cache_dir=str(tmp_path))
    assert len(corpus.splits["train"]) == 1
    assert run(4) == one
    assert len(started) == 3


def gated(folder, number):
    """Texts of a piece: from the third on they come only once the file `open` is there."""
    print("what a library prints", flush=True)
    while number > 2 and not (folder / "open").exists():
        time.sleep(0.01)
    yield f"piece {number} " * 3


def one_way(folder, number):
    """A piece whose process dies if it is the third and the file `open` is not there."""
    if number == 3 and not (folder / "open").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    yield f"piece {number} " * 3


def faulty(folder, number):
    """A piece that cannot be read if it is the third."""
    if number == 3:
        raise ValueError(f"{folder}, line 3 is broken.")
    yield "text"


def unexpected(folder, number):
    """A piece whose third fails as no reader should."""
    if number == 3:
        raise RuntimeError("what no one expected")
    yield "text"


class Strange(Exception):
    """An error that pickle cannot make again."""

    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


def strange(folder, number):
    """A piece whose third fails with such an error."""
    if number == 3:
        raise Strange("one", "two")
    yield "text"


def gives_up(folder, number):
    """A piece whose process ends by itself if it is the third."""
    if number == 3:
        os._exit(7)
    yield "text"


def first_is_broken(folder, number):
    """Pieces that are slow once the first has failed, and say that they were read."""
    if number == 0:
        (folder / "broken").touch()
        raise ValueError(f"{folder}, line 0 is broken.")
    wait_for((folder / "broken").exists)
    time.sleep(0.3)
    (folder / f"read-{number}").touch()
    yield "text"


def of_pieces(texts, folder):
    train = [functools.partial(texts, folder, number) for number in range(6)]
    return Corpus("c", "f", {"train": train, "valid": train[:1]})


def prepare_pieces(texts, folder, workers, cache=None):
    return prepare(
        of_pieces(texts, folder),
        tokenizer_kind="byte",
        vocab_size=0,
        workers=workers,
        cache_dir=str(cache or folder),
    )


def finished(folder):
    return [path.name for path in folder.glob("stores/*.parts/*-of-*")]


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("all_at_once", [False, True])
def test_a_killed_preparation_goes_on_from_its_finished_parts(tmp_path, monkeypatch, all_at_once):
    program = (
        "import pathlib, sys; from tests.test_parts import gated, prepare_pieces\n"
        "prepare_pieces(gated, pathlib.Path(sys.argv[1]), workers=2)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[1])},
        stderr=subprocess.DEVNULL,
    )
    # Pieces 0 to 2 can be finished; two processes wait in pieces 3 and 4.
    wait_for(lambda: len(finished(tmp_path)) == 3)
    wait_for(lambda: len(list(tmp_path.glob("stores/*.parts/partial-*/part"))) == 2)
    tasks = pathlib.Path(f"/proc/{process.pid}/task").glob("*/children")
    children = [int(pid) for task in tasks for pid in task.read_text().split()]
    assert len(children) == 2
    process.kill()
    process.wait()
    assert not list(tmp_path.glob("stores/*/manifest.json"))
    for child in children if all_at_once else ():
        os.kill(child, signal.SIGKILL)
    (tmp_path / "open").touch()

    def ended(pid):
        stat = pathlib.Path(f"/proc/{pid}/stat")
        return not stat.exists() or stat.read_text().rsplit(")")[1].split()[0] == "Z"

    wait_for(lambda: all(map(ended, children)))  # unless killed, with the part that it was at
    kept = finished(tmp_path)
    assert len(kept) == (3 if all_at_once else 5)
    written, write = [], parts.write_part
    monkeypatch.setattr(
        parts, "write_part", lambda part, *rest: written.append(part.name) or write(part, *rest)
    )
    resumed = prepare_pieces(gated, tmp_path, workers=1)
    names = [part.name for part in parts.plan(of_pieces(gated, tmp_path).splits)]
    assert written == [name for name in names if name not in kept]
    assert not list(tmp_path.glob("stores/*.parts"))
    whole = prepare_pieces(gated, tmp_path, workers=1, cache=tmp_path / "other")
    assert content(resumed.path) == content(whole.path)


def test_a_kill_while_parts_are_joined_loses_none(tmp_path, monkeypatch, corpus):
    (tmp_path / "open").touch()
    join = parts.join

    def breaks_off(folders, tokenizer, tokens_path, starts_path):
        found = join(folders, tokenizer, tokens_path, starts_path)
        if tokens_path.name == "valid.tokens.npy":
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(parts, "join", breaks_off)
    with pytest.raises(KeyboardInterrupt):
        prepare_pieces(gated, tmp_path, workers=1)
    assert len(finished(tmp_path)) == 7
    monkeypatch.undo()
    monkeypatch.setattr(parts, "write_part", lambda *_: pytest.fail("tokenised again"))
    resumed = prepare_pieces(gated, tmp_path, workers=1)
    monkeypatch.undo()
    whole = prepare_pieces(gated, tmp_path, workers=1, cache=tmp_path / "other")
    assert content(resumed.path) == content(whole.path)


def test_a_killed_process_is_one_sentence_and_loses_only_its_part(tmp_path):
    with pytest.raises(ChildProcessError, match=r"was killed.*--config\.data\.workers.*\.$"):
        prepare_pieces(one_way, tmp_path, workers=2)
    assert "train.000002-of-000006" in finished(tmp_path)
    (tmp_path / "open").touch()
    resumed = prepare_pieces(one_way, tmp_path, workers=2)
    whole = prepare_pieces(gated, tmp_path, workers=1, cache=tmp_path / "other")
    assert content(resumed.path) == content(whole.path)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_preparation_says_how_far_it_is(tmp_path, capsys, workers):
    (tmp_path / "open").touch()
    prepare_pieces(gated, tmp_path, workers)
    lines = capsys.readouterr().out.splitlines()
    assert "tokenising" in lines and lines[-1].startswith("tokenising  100%  7 of 7 parts")


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_in_a_process_arrives_as_it_is(tmp_path, workers):
    with pytest.raises(ValueError) as raised:
        prepare_pieces(faulty, tmp_path, workers)
    assert type(raised.value) is ValueError
    assert str(raised.value) == f"{tmp_path}, line 3 is broken."
    assert not list((tmp_path / "stores").iterdir())


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_that_no_one_expected_arrives_with_its_text(tmp_path, workers):
    with pytest.raises(RuntimeError, match="what no one expected") as raised:
        prepare_pieces(unexpected, tmp_path, workers)
    if workers == 2:
        assert 'in unexpected\n    raise RuntimeError("' in "".join(raised.value.__notes__)
    assert "train.000002-of-000006" in finished(tmp_path)


def test_an_error_that_cannot_be_sent_arrives_as_text(tmp_path):
    with pytest.raises(RuntimeError, match="^Strange: one and two$"):
        prepare_pieces(strange, tmp_path, workers=2)


def test_a_process_that_ends_otherwise_gives_its_return_code(tmp_path):
    with pytest.raises(ChildProcessError, match=r"ended with return code 7, .*parts\.$") as raised:
        prepare_pieces(gives_up, tmp_path, workers=2)
    assert "memory" not in str(raised.value)


def test_a_part_that_cannot_be_sent_is_told_as_it_is(tmp_path):
    pieces = [lambda: iter(["text"])] * 500  # the first fails while others are handed out
    corpus = Corpus("c", "f", {"train": pieces})
    options = {"tokenizer_kind": "byte", "vocab_size": 0, "cache_dir": str(tmp_path)}
    with pytest.raises(Exception, match="pickle.*lambda"):
        prepare(corpus, **options, workers=2)


def test_an_error_stops_the_other_processes(tmp_path):
    with pytest.raises(ValueError, match="line 0 is broken"):
        prepare_parts(first_is_broken, tmp_path)
    assert len(list(tmp_path.glob("read-*"))) <= 1  # of five: the other process finishes its own


def prepare_parts(texts, folder):
    ByteTokenizer().save(folder)
    all_parts = parts.plan({"train": of_pieces(texts, folder).splits["train"]})
    parts.write_all(all_parts, ByteTokenizer(), folder, workers=2)


def test_what_a_killed_process_was_at_is_removed(tmp_path):
    (tmp_path / "partial-abc" / "part").mkdir(parents=True)
    (tmp_path / "partial-abc" / "part" / "ids").write_bytes(b"1")
    part = parts.Part("train", 0, 1, functools.partial(iter, ["text"]))
    parts.write_all([part], ByteTokenizer(), tmp_path, workers=1)
    assert [path.name for path in tmp_path.iterdir()] == [part.name]


def stop(*_):
    raise KeyboardInterrupt


def edit_record(part, **changes):
    """Alters counts, and the sizes of the files with them."""
    record = json.loads((part / "counts.json").read_text())
    (part / "counts.json").write_text(json.dumps(record | changes))


def flip(path, place=3):
    content = path.read_bytes()
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])


DAMAGE = {
    "other ids": lambda part: flip(part / "ids"),
    "fewer ids": lambda part: os.truncate(part / "ids", 4),
    "more ids": lambda part: os.truncate(part / "ids", 60),
    "other lengths": lambda part: flip(part / "lengths", 0),
    "fewer lengths": lambda part: os.truncate(part / "lengths", 0),
    "more lengths": lambda part: os.truncate(part / "lengths", 11),
    "both": lambda part: (flip(part / "ids"), flip(part / "lengths", 0)),
    "no counts": lambda part: (part / "counts.json").write_bytes(b""),
    "zeros for counts": lambda part: (part / "counts.json").write_bytes(bytes(80)),
    "other counts": lambda part: edit_record(part, words=1),
    "a list of counts": lambda part: (part / "counts.json").write_text("[]"),
    "no ids": lambda part: (part / "ids").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_part_is_tokenised_again_and_no_other(tmp_path, monkeypatch, capsys, damage):
    (tmp_path / "open").touch()
    whole = prepare_pieces(gated, tmp_path, workers=1, cache=tmp_path / "other")
    with monkeypatch.context() as patch:
        patch.setattr(parts, "join", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare_pieces(gated, tmp_path, workers=1)
    (unfinished,) = tmp_path.glob("stores/*.parts")
    part = unfinished / "train.000004-of-000006"
    damage(part)
    written, write = [], parts.write_part
    monkeypatch.setattr(
        parts, "write_part", lambda part, *rest: written.append(part.name) or write(part, *rest)
    )
    resumed = prepare_pieces(gated, tmp_path, workers=1)
    assert written == [part.name]
    assert f"{part.name} is damaged and is tokenised again" in capsys.readouterr().out
    assert content(resumed.path) == content(whole.path)
    assert not unfinished.exists()


def test_a_part_knows_its_tokenizer(tmp_path):
    tokenizers = [CharTokenizer("etx"), CharTokenizer("etxy")]
    part = parts.Part("train", 0, 1, functools.partial(iter, ["text"]))
    parts.write_part(part, tokenizers[0], tmp_path)
    records = [parts.read_part_record(tmp_path / part.name, tokenizer) for tokenizer in tokenizers]
    assert records[0] is not None and records[0]["tokens"] == 4 and records[1] is None


def test_a_part_that_is_damaged_whenever_it_is_written_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "open").touch()
    write = parts.write_part

    def write_badly(part, tokenizer, folder):
        write(part, tokenizer, folder)
        flip(folder / part.name / "ids")

    monkeypatch.setattr(parts, "write_part", write_badly)
    with pytest.raises(OSError, match=r"does not come back from the disk .*cache_dir.*again\.$"):
        prepare_pieces(gated, tmp_path, workers=1)


def test_the_cores_are_those_that_the_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 1000)
    assert parts._cores() == len(os.sched_getaffinity(0))


def test_the_tokenizer_learns_from_equal_shares_of_the_pieces(tmp_path):
    pieces = [functools.partial(iter, [letter * 6, letter * 6]) for letter in "abc"]
    assert list(shards.heads(pieces, 24)) == [t for x in "abc" for t in (x * 6, x * 2)]
    assert list(shards.heads(pieces, 1)) == list("abc")
    corpus = Corpus("c", "f", {"train": [*pieces, lambda: iter(["z y x w v"])]})
    words = {"tokenizer_kind": "word", "vocab_size": 0, "cache_dir": str(tmp_path)}
    with pytest.raises(ValueError, match="Word 'aaaaaa'.* does not occur"):
        prepare(corpus, **words, sample=12, workers=1)
    everything = prepare(corpus, **words, sample=1000, workers=1)
    assert everything.tokenizer.vocab_size == 9
    assert prepare(corpus, **words, workers=1).tokenizer.vocab_size == 9
    assert len(list((tmp_path / "stores").iterdir())) == 2
