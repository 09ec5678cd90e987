"""Stores that several machines write in parts: the bytes that one machine writes."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from lm_jax import config
from lm_jax.config import Config
from lm_jax.data import parts, prepare, shards
from lm_jax.data.open import open_data
from lm_jax.data.prepare import begin, join_shares, main, write_share
from lm_jax.data.references import references
from lm_jax.files import locked


@pytest.fixture
def cfg(tmp_path, monkeypatch):
    """A config of a dozen pieces of JSONL in three splits."""
    monkeypatch.setattr(shards, "PIECE", 2000)
    for name in "ab":
        lines = [json.dumps({"text": f"document {name} {i} " * (i % 7)}) for i in range(60)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return config.replace(
        Config(),
        data__corpus="text",
        data__source_dir=str(tmp_path),
        data__files="*.jsonl",
        data__document="jsonl:text",
        data__valid_fraction=0.2,
        data__test_fraction=0.2,
        data__cache_dir=str(tmp_path / "many"),
        data__workers=1,
    )


def stores(cfg):
    return sorted(path.name for path in pathlib.Path(cfg.data.cache_dir).glob("stores/*"))


def content(path):
    """Every file of a folder."""
    return {
        str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()
    }


def of_one_machine(cfg, tmp_path):
    store = open_data(config.replace(cfg, data__cache_dir=str(tmp_path / "one")))
    for name in ("valid", "test"):
        references(store, name)
    return store.path.name, content(store.path)


def check_same(store, cfg, tmp_path):
    assert (store.path.name, content(store.path)) == of_one_machine(cfg, tmp_path)
    assert stores(cfg) == [store.path.name]


@pytest.mark.parametrize(("kind", "vocab_size"), [("char", 0), ("bpe", 280)])
def test_parts_make_the_store_of_one_machine(tmp_path, cfg, kind, vocab_size):
    cfg = config.replace(cfg, tokenizer__kind=kind, tokenizer__vocab_size=vocab_size)
    for number in (2, 0, 1):
        write_share(cfg, number, 3)
    check_same(join_shares(cfg, 3), cfg, tmp_path)


def test_corpora_of_one_piece_are_shared_too(tmp_path, cfg, capsys):
    for split in ("train", "valid", "test"):
        (tmp_path / f"wiki.{split}.tokens").write_text(f" \n = Title = \n \n of {split} . \n")
    cfg = config.replace(cfg, data__corpus="wikitext2", tokenizer__kind="byte")
    begin(cfg)
    assert "has 3 pieces, which up to 3 parts can share" in capsys.readouterr().out
    for number in range(5):
        write_share(cfg, number, 5)
    assert "part 4/5: its 0 of 3 pieces are written" in capsys.readouterr().out
    check_same(join_shares(cfg, 5), cfg, tmp_path)


def test_the_tokenizer_is_learned_once(cfg, monkeypatch):
    begin(cfg)
    monkeypatch.setattr("lm_jax.data.recipe.train_tokenizer", lambda *_: pytest.fail("again"))
    write_share(cfg, 0, 1)
    join_shares(cfg, 1)


def test_a_join_names_the_parts_that_are_missing(cfg):
    write_share(cfg, 1, 4)
    with pytest.raises(FileNotFoundError, match=r"shared lacks parts 0,2,3 of 4: .*--part=0/4\.$"):
        join_shares(cfg, 4)
    write_share(cfg, 0, 2)  # of another number of parts, 0 and 2 of 4
    with pytest.raises(FileNotFoundError, match=r"shared lacks parts 3 of 4: .*--part=3/4\.$"):
        join_shares(cfg, 4)


def test_parts_of_another_config_are_named(tmp_path, cfg):
    write_share(cfg, 0, 1)
    other = config.replace(cfg, tokenizer__kind="bpe", tokenizer__vocab_size=280)
    fields = r"config\.tokenizer\.kind and config\.tokenizer\.vocab_size\.$"
    with pytest.raises(FileNotFoundError, match=rf"lacks parts 0 of 1: .* another {fields}"):
        join_shares(other, 1)
    (tmp_path / "c.jsonl").write_text('{"text": "more"}')
    with pytest.raises(FileNotFoundError, match=r"parts of a config with another config\.data\.$"):
        join_shares(cfg, 1)


def test_a_run_does_not_prepare_what_is_prepared_in_parts(cfg):
    write_share(cfg, 0, 2)
    with pytest.raises(FileExistsError, match=r"several machines write: join them by .* here\.$"):
        open_data(cfg)
    write_share(cfg, 1, 2)
    joined = join_shares(cfg, 2)
    assert open_data(cfg).path == joined.path


def test_a_killed_part_goes_on_from_what_is_there(tmp_path, cfg, monkeypatch):
    real, written = parts.write_part, []

    def write_two(part, tokenizer, folder):
        if len(written) == 2:
            (folder / "partial-of-the-kill").mkdir()
            raise KeyboardInterrupt
        real(part, tokenizer, folder)
        written.append(part.name)

    monkeypatch.setattr(parts, "write_part", write_two)
    with pytest.raises(KeyboardInterrupt):
        write_share(cfg, 0, 2)
    monkeypatch.setattr(
        parts, "write_part", lambda part, *rest: real(part, *rest) or written.append(part.name)
    )
    write_share(cfg, 0, 2)
    write_share(cfg, 0, 2)
    write_share(cfg, 1, 2)
    assert len(written) == len({*written}) > 8
    check_same(join_shares(cfg, 2), cfg, tmp_path)


def test_what_other_machines_write_is_left_alone(cfg):
    begin(cfg)
    (shared,) = pathlib.Path(cfg.data.cache_dir).glob("stores/*.shared")
    (shared / "partial-abc").mkdir()
    write_share(cfg, 0, 1)
    assert (shared / "partial-abc").is_dir()


def test_a_slow_twin_of_a_part_is_harmless(tmp_path, cfg, monkeypatch):
    """Its folder is gone because a faster one let all be joined."""
    real = parts.write_part

    def write_late(*task):
        monkeypatch.setattr(parts, "write_part", real)
        write_share(cfg, 0, 1)
        join_shares(cfg, 1)
        real(*task)

    monkeypatch.setattr(parts, "write_part", write_late)
    write_share(cfg, 0, 1)
    write_share(cfg, 0, 1)
    check_same(join_shares(cfg, 1), cfg, tmp_path)


def test_of_two_that_join_the_later_waits_until_all_is_done(cfg, monkeypatch):
    def refuse(holder):
        raise BlockingIOError

    def references(store, name):
        with pytest.raises(BlockingIOError):
            with locked(pathlib.Path(cfg.data.cache_dir, "lock"), refuse):
                pass
        scored.append(name)

    scored = []
    monkeypatch.setattr(prepare, "references", references)
    write_share(cfg, 0, 1)
    join_shares(cfg, 1)
    assert scored == ["valid", "test"]


def test_a_damaged_part_is_removed_and_named(tmp_path, cfg):
    for number in range(3):
        write_share(cfg, number, 3)
    second = sorted(pathlib.Path(cfg.data.cache_dir).glob("stores/*/train.000001-*"))[0]
    os.truncate(second / "ids", 4)
    with pytest.raises(FileNotFoundError, match="lacks parts 1 of 3"):
        join_shares(cfg, 3)
    write_share(cfg, 1, 3)
    check_same(join_shares(cfg, 3), cfg, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--part=3/3"], r"--part=3/3: is none of 0/N to N-1/N .*\.\n"),
        (["--part=2"], r"--part=2: is none of 0/N"),
        (["--part=-1/3"], r"--part=-1/3: is none of 0/N"),
        (["--join=0"], r"--join=0: is no number of parts"),
        (["--begin", "--join=2"], r"give one of --begin, --part=I/N and --join=N"),
        ([], r"give one of --begin, --part=I/N and --join=N"),
    ],
)
def test_the_command_refuses_what_makes_no_sense(capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        main(["prepare", "quickstart", *arguments])
    assert re.match(message, capsys.readouterr().err)


@pytest.mark.slow
def test_the_command_without_a_first_step(tmp_path):
    """Two parts at once, of which one learns the tokenizer."""
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text(f"file {number} " * 200)

    def started(step):
        fields = {
            "source_dir": tmp_path,
            "files": "*.txt",
            "valid_fraction": 0.4,
            "cache_dir": tmp_path,
        }
        words = [f"--config.data.{name}={value}" for name, value in fields.items()]
        words += ["--config.tokenizer.kind=byte", "--config.tokenizer.vocab_size=0", step]
        program = [sys.executable, "-m", "lm_jax.data.prepare", "text"]
        return subprocess.Popen([*program, *words], stdout=subprocess.DEVNULL)

    both = [started(f"--part={number}/2") for number in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert started("--join=2").wait() == 0
    assert [path.suffix for path in (tmp_path / "stores").iterdir()] == [""]
