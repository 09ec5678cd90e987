"""Files of a corpus: found once each, hashed once, and refused when they change or are equal."""

import json
import os

import pytest

from lm_jax.data import files


def hashes(paths, cache, text=True):
    return [file.sha256 for file in files.hash_files(paths, cache, text=text)]


def mark(memory):
    """Puts marks for the remembered hashes: a file that gets its mark was not hashed again."""
    known = json.loads(memory.read_text())
    marked = {path: [*entry[:-1], f"mark of {path}"] for path, entry in known.items()}
    memory.write_text(json.dumps(marked))


def test_hashes_of_unchanged_files_are_remembered(tmp_path, monkeypatch):
    path, cache = tmp_path / "a.txt", tmp_path / "cache"
    path.write_text("one")
    first = hashes([path], cache)
    assert not cache.exists()  # changed a moment ago: it may change again within a clock tick
    monkeypatch.setattr(files, "SETTLED", -1)
    assert hashes([path], cache) == first
    mark(cache / "file_hashes.json")
    assert hashes([path], cache) == [f"mark of {path}"]
    monkeypatch.undo()
    assert hashes([path], cache, text=False) == first
    path.write_text("two")
    assert hashes([path], cache) != first
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8 at byte 0"):
        hashes([path], cache)


def test_files_hashed_at_another_time_are_remembered_too(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SETTLED", -1)
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for path in paths:
        path.write_text(path.name)
        hashes([path], tmp_path / "cache")
    mark(tmp_path / "cache" / "file_hashes.json")
    assert hashes(paths, tmp_path / "cache") == [f"mark of {path}" for path in paths]


def test_a_change_is_seen_that_keeps_size_and_time_of_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SETTLED", -1)
    path = tmp_path / "a.txt"
    path.write_text("one")
    os.utime(path, (1e9, 1e9))
    first = hashes([path], tmp_path)
    before = path.stat().st_ctime_ns
    while path.stat().st_ctime_ns == before:
        path.write_text("two")
    os.utime(path, (1e9, 1e9))
    assert hashes([path], tmp_path) != first


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"a": 1}', "\x00" * 50, None])
def test_a_damaged_memory_of_hashes_is_an_empty_one(tmp_path, monkeypatch, damage):
    monkeypatch.setattr(files, "SETTLED", -1)
    path, memory = tmp_path / "a.txt", tmp_path / "file_hashes.json"
    path.write_text("one")
    first = hashes([path], tmp_path)
    whole = memory.read_text()
    memory.write_text(json.dumps({str(path): 3}) if damage is None else damage)
    assert hashes([path], tmp_path) == first
    assert json.loads(whole).items() <= json.loads(memory.read_text()).items()
    assert sorted(tmp_path.iterdir()) == [path, memory]


@pytest.mark.parametrize("settled", [-1, 1 << 62])
def test_a_file_that_changed_since_it_was_hashed_is_refused(tmp_path, monkeypatch, settled):
    monkeypatch.setattr(files, "SETTLED", settled)  # by its stamp, or by its content
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for path in paths:
        path.write_text(path.name)
    hashed = files.hash_files(paths, tmp_path / "cache", text=True)
    files.refuse_changed(hashed)
    if settled > 0:
        monkeypatch.setattr(files, "stamp", lambda path: (5, hashed[paths.index(path)].stamp[1]))
    paths[1].write_text("other")
    with pytest.raises(ValueError, match=r"b\.txt has changed since it was hashed: .*again\.$"):
        files.refuse_changed(hashed)


def test_a_file_with_several_names_is_found_once_by_the_first(tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("b.txt", "a.txt"):
        (tmp_path / "data" / name).write_text(name)
    (tmp_path / "c.txt").symlink_to(tmp_path / "data" / "a.txt")
    (tmp_path / "data" / "up").symlink_to(tmp_path)
    once = [tmp_path / "c.txt", tmp_path / "data" / "b.txt"]
    assert files.find_files("**/*.txt", "files", tmp_path) == once
    assert (
        files.find_files(f"{tmp_path}/data/b.txt, c.txt,data/../c.txt", "files", tmp_path) == once
    )
    assert len(files.find_files("b.txt,../data/b.txt", "files", tmp_path / "data")) == 1


def test_many_files_may_be_named(tmp_path):
    """Their names together are longer than one may be."""
    names = [f"shard-{n:05}-of-00030.txt" for n in range(30)]
    for name in names:
        (tmp_path / name).write_text(name)
    found = files.find_files(",".join(names), "files", tmp_path)
    assert [path.name for path in found] == names


@pytest.mark.parametrize("name", ["set[1]", "a*", "what?", "**"])
def test_only_the_pattern_is_one_and_not_the_folder(tmp_path, name):
    for folder in (name, "set1", "ab", "whatt"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.txt").write_text("x")
    found = files.find_files("*.txt", "files", tmp_path / name)
    assert found == [tmp_path / name / "x.txt"]


@pytest.mark.parametrize("patterns", ["", ",", " , "])
def test_no_pattern_is_an_error(patterns):
    with pytest.raises(ValueError, match=r"data\.valid_files is empty: .*\.valid_files=PATH.*\.$"):
        files.find_files(patterns, "valid_files", None)


@pytest.mark.parametrize("block", range(1, 9))
def test_the_first_byte_that_is_not_utf8_is_named(tmp_path, monkeypatch, block):
    monkeypatch.setattr(files, "BLOCK", block)
    path = tmp_path / "a.txt"
    for good in ("", "é👩 abc", "👩👩"):
        for bad in (b"\xff tail", b"\xc3", b"\xf0\x9f\x91", b"\xc3(", b"\x80"):
            path.write_bytes(good.encode() + bad)
            at = len(good.encode())
            with pytest.raises(ValueError, match=f"a.txt is not UTF-8 at byte {at} "):
                files.hash_files([path], tmp_path, text=True)
        path.write_bytes(good.encode() + b".")
        files.hash_files([path], tmp_path, text=True)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError("Corrupted Riegeli/records file\n at byte 9"), ValueError),
        (RecursionError("maximum recursion depth exceeded"), ValueError),
        (ValueError("Expected 3 but got 4"), ValueError),
        (OSError("Corrupt snappy compressed data."), OSError),
    ],
)
def test_an_error_of_a_library_is_told_with_the_name_of_the_file(error, kind):
    with pytest.raises(kind) as raised, files.naming("dir/a.data"):
        raise error
    assert type(raised.value) is kind
    assert raised.value.__cause__ is error
    what = f"{type(error).__name__}: {error}".replace("\n", "")
    assert str(raised.value) == (f"dir/a.data cannot be read ({what}): replace it or leave it out.")


@pytest.mark.parametrize(
    "error", [ValueError("dir/a.data, line 3"), MemoryError(), KeyboardInterrupt(), GeneratorExit()]
)
def test_an_error_that_needs_no_name_stays_as_it_is(error):
    with pytest.raises(type(error)) as raised, files.naming("dir/a.data"):
        raise error
    assert raised.value is error
