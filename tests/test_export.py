"""Exported folders: their tokenizers, their figures, and what transformers computes of them."""

import dataclasses
import importlib.util
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from lm_jax import config, export, loop, proof
from lm_jax.data.tokenizers.hf import HfTokenizer
from lm_jax.data.tokenizers.load import train_tokenizer
from lm_jax.models.families import create_model
from lm_jax.workdir import open_trained
from tests.helpers import TEXTS, randomise, small, thirds
from tests.hugging_face import CORPUS, byte_level, save_tokenizer

FAMILIES = {
    "llama": {},
    "qwen3": dict(model__qk_norm=True, model__kv_heads=1, model__tied=False),
    "gpt2": dict(
        model__norm="layernorm", model__positions="learned", model__mlp="gelu", model__bias=True
    ),
}
there = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
needs_transformers = pytest.mark.skipif(not there, reason="needs torch and transformers")


@pytest.fixture(scope="module")
def workdir(text, tmp_path_factory):
    """The folder of a run with a test split, and its data."""
    folder = tmp_path_factory.mktemp("exported") / "run"
    cfg = small(text, train__steps="4", train__eval_every="0", eval__splits="test")
    loop.train_and_evaluate(cfg, folder)
    return folder


@pytest.fixture
def run(workdir):
    return open_trained(workdir)


def variant(run, **changes):
    """A run of another architecture with random parameters, after update 99."""
    cfg = config.replace(run.cfg, **changes)
    graphdef, init = create_model(cfg, run.tokenizer.vocab_size, "reference")
    params = randomise(jax.eval_shape(init, jax.random.key(0)), 1)
    return dataclasses.replace(run, cfg=cfg, graphdef=graphdef, params=params, step=99)


def command(capsys, *arguments):
    """Output, errors and exit code of the command."""
    code = 0
    try:
        export.main(["lm-jax export", *map(str, arguments)])
    except SystemExit as stopped:
        code = stopped.code
    return *capsys.readouterr(), code


KINDS = {"byte": 0, "char": 0, "bpe": 400, "word": 0}


@pytest.mark.parametrize("kind", [*KINDS, "unknown words", "hf"])
def test_the_library_has_the_ids_and_texts_of_every_kind(kind, tmp_path):
    texts = TEXTS
    if kind == "hf":
        texts = [*CORPUS, " <|endoftext|> low", "café\n"]
        own = HfTokenizer.from_folder(save_tokenizer(tmp_path, byte_level(), "<|endoftext|>"))
    elif kind == "unknown words":
        own = train_tokenizer("word", texts * 2, 50)
    else:
        own = train_tokenizer(kind, texts * 2, KINDS[kind])
    library = own.to_library().from_str(own.to_library().to_str())
    library.encode_special_tokens = True
    for text in texts:
        ids = own.encode(text)
        assert library.encode(text).ids == [own.separator, *ids]
        assert library.encode(text, add_special_tokens=False).ids == ids.tolist()
        assert library.decode(ids.tolist()) == own.decode(ids)
        assert library.decode([own.separator, *ids]) == own.decode(ids)
    rng = np.random.default_rng(0)
    for ids in rng.integers(0, own.vocab_size, (50, 30)):
        assert library.decode(ids.tolist()) == own.decode(ids)


@pytest.mark.parametrize(("kind", "text"), [("char", "aXb"), ("word", "two words")])
def test_what_has_no_id_is_an_error_for_the_library_too(kind, text):
    own = train_tokenizer(kind, ["a b words"], 0)
    with pytest.raises(ValueError):
        own.encode(text)
    with pytest.raises(Exception, match="Missing .UNK. token"):
        own.to_library().encode(text)


def test_a_word_may_be_spelt_like_the_separator():
    own = train_tokenizer("word", ["a <|endoftext|> b"], 0)
    library = own.to_library()
    assert library.encode("<|endoftext|> a").ids == [0, *own.encode("<|endoftext|> a")]


def test_the_folder_and_its_card(workdir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    to = tmp_path / "made" / "small"
    out, err, code = command(capsys, workdir, f"--to={to}")
    assert code == 0, err
    assert "becomes a llama model" in out and "pip install torch transformers" in out
    assert sorted(path.name for path in to.iterdir()) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert [path.name for path in to.parent.iterdir()] == ["small"]
    assert len({path.stat().st_mode for path in to.iterdir()}) == 1
    card, result = (
        (to / "README.md").read_text(),
        json.loads((workdir / "eval_test.json").read_text()),
    )
    assert card.startswith("---\nlibrary_name: transformers\n") and "licen" not in card
    assert f"| {result['loss']:.4f} | {result['token_ppl']:.2f} |" in card
    record = json.loads((workdir / "config.json").read_text())
    assert record["hash"] in card and "Valid split" not in card
    assert json.loads((to / "generation_config.json").read_text())["eos_token_id"] == 0


def test_figures_of_another_checkpoint_are_not_on_the_card(workdir, run, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "prove", lambda *_, **__: [])
    export.export(dataclasses.replace(run, step=2), workdir, tmp_path / "to")
    card = (tmp_path / "to" / "README.md").read_text()
    assert "No split was scored after update 2" in card and "Compared" not in card


def test_refusals_leave_nothing(workdir, run, tmp_path, capsys, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    _, err, code = command(capsys, workdir, f"--to={tmp_path / 'full'}")
    assert code == 2 and f"{tmp_path / 'full'} holds files already" in err
    _, err, code = command(capsys, workdir)
    assert code == 2 and err == "--to is missing; give it.\n"
    monkeypatch.chdir(tmp_path / "full")
    (tmp_path / "full" / "empty").mkdir()
    monkeypatch.chdir("empty")
    assert ". is the folder in which you are" in command(capsys, workdir, "--to=.")[1]
    other = dataclasses.replace(run, cfg=config.replace(run.cfg, model__mlp="relu2"))
    with pytest.raises(config.ConfigError, match="config.model.mlp"):
        export.export(other, workdir, tmp_path / "to")
    monkeypatch.setattr(type(run.tokenizer), "decode", lambda *_: "ba du")
    _, err, code = command(capsys, workdir, f"--to={tmp_path / 'to'}")
    assert code == 1 and "does not give the ids of document 0 of test" in err
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


SCORE = """
import json, math, pathlib, sys
import torch, transformers
assert not any(name.partition(".")[0] == "lm_jax" for name in sys.modules)
documents, T = json.loads(sys.argv[1]), int(sys.argv[2])
for folder in sys.argv[3:]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    stream = [i for text in documents for i in tokenizer(text)["input_ids"]]
    nats, count = 0.0, 0
    for start in range(0, len(stream) - 1, T):
        window = stream[start : start + T + 1]
        cuts = [0, *(t for t in range(1, len(window)) if window[t] == tokenizer.bos_token_id)]
        for first, end in zip(cuts, [*cuts[1:], len(window)]):
            if end - first > 1:
                ids = torch.tensor(window[first:end])
                with torch.no_grad():
                    logits = model(ids[None, :-1]).logits[0]
                nats += float(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum"))
                count += end - first - 1
    print(json.dumps([type(model).__name__, math.exp(nats / count), count]))
"""


@needs_transformers
def test_transformers_alone_gives_the_same_perplexity(workdir, run, tmp_path, capsys):
    split = run.store.split("test")
    documents = np.split(split.tokens, split.document_starts[1:-1])
    texts = [run.tokenizer.decode(ids) for ids in documents]
    runs = {"llama": run} | {
        name: variant(run, **changes) for name, changes in FAMILIES.items() if changes
    }
    for name, one in runs.items():
        export.export(one, workdir, tmp_path / name)
    said = capsys.readouterr().out
    assert said.count("same logits of 4 windows of test") == 3
    assert said.count("is not of update 99, so test is scored anew") == 2
    script = tmp_path / "score.py"
    script.write_text(SCORE)
    command = [sys.executable, "-I", str(script), json.dumps(texts), str(run.cfg.data.seq_len)]
    scored = subprocess.run(
        [*command, *(str(tmp_path / name) for name in runs)],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    found = [json.loads(line) for line in scored.stdout.splitlines()]
    kinds = ["LlamaForCausalLM", "Qwen3ForCausalLM", "GPT2LMHeadModel"]
    assert [kind for kind, _, _ in found] == kinds
    for (_, perplexity, count), one in zip(found, runs.values(), strict=True):
        assert count == len(split.tokens)
        expected = proof._scored(one, workdir, "test")["token_ppl"]
        assert f"{perplexity:.3e}" == f"{expected:.3e}"


@needs_transformers
def test_another_weight_is_found(workdir, run, tmp_path, monkeypatch):
    written = export.write_model

    def other(folder, cfg, vocab_size, max_len, params, extra):
        params = jax.tree.map(np.array, params)
        params["blocks"]["mlp"]["down"]["kernel"][0, 0] += 0.01
        written(folder, cfg, vocab_size, max_len, params, extra)

    monkeypatch.setattr(export, "write_model", other)
    with pytest.raises(RuntimeError, match="does not give the logits of test, by up to"):
        export.export(run, workdir, tmp_path / "to")
    assert not [*tmp_path.iterdir()]


@needs_transformers
def test_without_the_data_random_tokens_are_compared(workdir, run, tmp_path, capsys):
    away = config.replace(
        run.cfg, data__source_dir=str(tmp_path), data__cache_dir=str(tmp_path / "cache")
    )
    export.export(dataclasses.replace(run, cfg=away), workdir, tmp_path / "to")
    said = capsys.readouterr().out
    assert "random tokens stand for the data of the run, which are not here" in said
    assert "same logits of 4 windows of random tokens" in said and "perplexity" not in said


@needs_transformers
@pytest.mark.parametrize("kind", thirds(KINDS))
def test_transformers_reads_a_text_as_evaluation_does(kind, tmp_path):
    import transformers

    own = train_tokenizer(kind, TEXTS * 2, KINDS[kind])
    export.write_tokenizer(tmp_path, own, 32)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, model_max_length=1000)
    for text in TEXTS:
        ids = own.encode(text).tolist()
        assert theirs(text)["input_ids"] == [0, *ids]
        assert theirs.encode(text, add_special_tokens=False) == ids
        assert theirs.decode([0, *ids], skip_special_tokens=True) == own.decode(np.array(ids, int))
