"""Hugging Face checkpoints as users hand them over: scored on a corpus, and continued."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from lm_jax import console, evaluate, generate
from lm_jax.compilations import keep_compilations
from lm_jax.config import ConfigError, rules
from lm_jax.config.resolve import resolve
from lm_jax.data import files as data_files
from lm_jax.data import open as data_open
from lm_jax.data.open import open_data
from lm_jax.data.references import references
from lm_jax.distill.opening import open_teacher, score_teacher
from lm_jax.environment import check_environment
from lm_jax.pretrained import open_model
from tests.helpers import read_only_folder, small
from tests.hugging_face import LONGEST, save_pretrained


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_pretrained(tmp_path_factory.mktemp("pretrained"))


@pytest.fixture(scope="module")
def corpus(text):
    """The flags that name the fixture `text`."""
    fields = {
        "corpus": "text",
        "source_dir": text,
        "files": "*.txt",
        "valid_fraction": 0.2,
        "test_fraction": 0.2,
        "cache_dir": text / "cache",
    }
    return [f"--config.data.{name}={value}" for name, value in fields.items()]


@pytest.fixture
def scored(corpus, tmp_path, monkeypatch):
    """A function from a folder and flags to what `evaluate` writes of it."""
    monkeypatch.chdir(tmp_path)

    def score(folder, *flags, out=None):
        evaluate.main(["evaluate", str(folder), *corpus, *flags])
        out = out or tmp_path / "scores" / f"{folder.name}-text"
        with np.load(out / "documents_test.npz") as arrays:
            return json.loads((out / "eval_test.json").read_text()), dict(arrays)

    return score


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(["evaluate", *map(str, arguments)])
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_a_checkpoint_is_scored_as_its_teacher_is(folders, text, scored):
    for name, folder in folders.items():
        before = sorted(folder.iterdir())
        result, documents = scored(folder, "--config.eval.batch_size=3")
        assert sorted(folder.iterdir()) == before  # nothing is written there
        assert result["stride"] == result["config"]["data"]["seq_len"] == LONGEST, name
        assert documents["nats"].sum() == pytest.approx(result["loss"] * result["token_count"])
        cfg = small(text, data__seq_len=LONGEST, distill__teachers=str(folder))
        store = open_data(rules.validate(cfg))
        (teacher,) = open_teacher(resolve(cfg, windows=50), store).runs
        found = score_teacher(teacher, store, "test")
        assert found["bits_per_byte"] == pytest.approx(result["bits_per_byte"], rel=1e-5)


def pieces(split, length):
    """The stretches of one document that a window holds, each with the document's number."""
    starts = split.document_starts
    texts = np.split(np.asarray(split.tokens, np.int64), starts[1:-1])
    stream = np.concatenate([np.append(split.separator, text) for text in texts])
    owner = np.repeat(np.arange(len(texts)), [len(text) + 1 for text in texts])
    for first in range(0, len(stream) - 1, length):
        here = slice(first, first + length + 1)
        for number in np.unique(owner[here]):
            yield number, stream[here][owner[here] == number]


def test_nats_of_transformers(folders, text, scored):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    for folder in folders.values():
        _, documents = scored(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        given = small(text).data
        run = open_model(folder, data=given, data__seq_len=LONGEST)
        expected = np.zeros(len(documents["nats"]))
        for number, ids in pieces(run.store.split("test"), LONGEST):
            ids_1T = torch.from_numpy(ids)[None]
            with torch.no_grad():
                log_p_TV = model(ids_1T[:, :-1]).logits[0].log_softmax(-1)
            expected[number] -= log_p_TV.gather(1, ids_1T[0, 1:, None]).sum().item()
        np.testing.assert_allclose(documents["nats"], expected, rtol=1e-4)


def test_what_cannot_be_scored(folders, corpus, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for flags, said in (
        (["--config.data.seq_len=49"], "config.data.seq_len: 49 is above the 48 positions"),
        (["--checkpoint=last"], "holds one state; leave it out."),
        (["--stride=49"], "config.eval.stride"),
        (["--config.data.test_fraction=0"], "--split=test: there are no such data"),
    ):
        assert said in refused(capsys, folders["llama"], *corpus, *flags)
    assert "name the corpus on which" in refused(capsys, folders["llama"])
    assert not list(tmp_path.iterdir())
    (tmp_path / "config.json").write_text("{broken")
    assert "config.json: not as a run writes it" in refused(capsys, tmp_path)


def test_out_names_where_the_results_lie(folders, scored, tmp_path):
    result, _ = scored(folders["gpt2"], f"--out={tmp_path / 'here'}", out=tmp_path / "here")
    assert result["data"]["tokenizer_kind"] == "hf" and not (tmp_path / "scores").exists()


def test_samples_leave_the_folder_as_it_is(folders, capsys):
    before = sorted(folders["gpt2"].iterdir())
    flags = ["--prompt=low", "--tokens=20", "--temperature=0"]
    generate.main(["generate", str(folders["gpt2"]), *flags])
    run = open_model(folders["gpt2"])
    (made,) = generate.generate(run, "low", tokens=20, temperature=0)
    assert capsys.readouterr().out == f"low{made.text}\n"
    assert sorted(folders["gpt2"].iterdir()) == before


def test_rows_of_the_table_beyond_the_tokenizer_are_no_text(folders):
    """They take part in the softmax, as in transformers, and stand for no bytes."""
    run = open_model(folders["gpt2"])
    ids = len(json.loads((folders["gpt2"] / "tokenizer.json").read_text())["model"]["vocab"])
    assert ids < run.tokenizer.vocab_size == 320
    padded = np.arange(ids, 320)
    assert run.tokenizer.decode(padded) == "" and set(run.tokenizer.token_bytes(padded)) == {b""}
    padded_are_likely = jax.tree_util.tree_map_with_path(
        lambda path, x: x.at[ids:].mul(50) if "embedding" in str(path) else x, run.params
    )
    run = dataclasses.replace(run, params=padded_are_likely)
    (made,) = generate.generate(run, "low", tokens=30, temperature=5.0)
    assert isinstance(made.text, str)


def test_a_run_refuses_other_data_before_it_learns_a_tokenizer(text, tmp_path, monkeypatch):
    store = open_data(rules.validate(small(text)))
    (tmp_path / "other.txt").write_text("not to be\n")
    monkeypatch.setattr(data_open, "prepare", lambda *_, **__: pytest.fail("it was prepared"))
    other = small(text, data__source_dir=str(tmp_path), data__cache_dir=str(tmp_path))
    with pytest.raises(ConfigError, match="is another corpus or has another tokenizer"):
        open_data(other, store.manifest)


def test_a_cache_of_somebody_else_is_read_where_it_is(text, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(console, "say", said.append)
    monkeypatch.setattr(data_files, "SETTLED", -1)
    before = jax.config.jax_compilation_cache_dir
    with read_only_folder() as (folder, as_nobody):
        shutil.copytree(text, folder / "text", ignore=shutil.ignore_patterns("cache"))
        cfg = small(folder / "text")
        store = open_data(cfg)
        (folder / "text" / "cache" / "file_hashes.json").unlink()
        there = sorted(folder.rglob("*"))
        with as_nobody():
            check_environment(cfg, folder.parent / "runs" / "new")
            again = open_data(cfg, store.manifest)
            found = references(again, "test")
            try:
                jax.config.update("jax_compilation_cache_dir", None)
                for _ in range(2):
                    keep_compilations(cfg)
                assert jax.config.jax_compilation_cache_dir is None
            finally:
                jax.config.update("jax_compilation_cache_dir", before)
        assert sorted(folder.rglob("*")) == there
        assert again.manifest == store.manifest and found == references(store, "test")
    (line,) = said
    assert "what XLA compiles is not kept, for " in line
