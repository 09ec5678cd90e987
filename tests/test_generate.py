"""The cache against the full forward, the sampler's properties, and the command end to end."""

import dataclasses
import io
import json
import logging
import re
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lm_jax
from lm_jax import config, evaluate, generate, loop, loss
from lm_jax import workdir as workdir_module
from lm_jax.config import Config, ConfigError
from lm_jax.data.tokenizers.kinds import ByteTokenizer, CharTokenizer
from lm_jax.decode import sample, shortlist
from lm_jax.generate import ArgumentError
from lm_jax.models.families import create_model
from lm_jax.objective import NextToken
from lm_jax.samples import drop_samples
from lm_jax.workdir import Trained, open_trained
from tests.helpers import ADDED, randomise, thirds, tiny_config

FAMILIES = {
    "rotary": {},
    "learned": dict(
        model__norm="layernorm", model__positions="learned", model__mlp="gelu", model__bias=True
    ),
    "none": dict(model__positions="none", model__logit_softcap=5.0),
    "added": ADDED,
    "grouped": dict(model__kv_heads=2, model__qk_norm=True, model__tied=False),
    "windowed": dict(model__window=5, model__head_dim=6, model__kv_heads=2),
    "scanned": dict(model__scan_layers=True, model__remat=True, model__kv_heads=1),
    "factorised": dict(model__embedding_rank=7),
    "musota": dict(
        model__family="musota", model__d_model=128, model__heads=4, model__init="normal"
    ),
    "dropout": dict(model__dropout=0.5, model__attention_dropout=0.5, model__embedding_dropout=0.5),
}
LETTERS = CharTokenizer(" .abcdefghijklmnopqrstuvwxyz")
V = LETTERS.vocab_size


def make_run(std=0.3, tokenizer=LETTERS, **changes):
    """A run with random parameters, as `open_trained` would return it."""
    cfg = tiny_config(**{"data__seq_len": 24} | changes)
    graphdef, init = create_model(cfg, tokenizer.vocab_size, "reference")
    params = randomise(jax.jit(init)(jax.random.key(1)), 1, std)
    return Trained(cfg, tokenizer, None, graphdef, params, 7, {})


def full_logits(run, tokens_BT, dtype=jnp.float32):
    @jax.jit
    def forward(params):
        model = nnx.merge(run.graphdef, params)
        positions_BT = np.broadcast_to(np.arange(tokens_BT.shape[1]), tokens_BT.shape)
        return model.logits(model(tokens_BT, np.ones_like(tokens_BT), positions_BT, dtype=dtype))

    return forward(run.params)


@pytest.mark.parametrize("family", thirds(FAMILIES))
def test_cache_gives_the_logits_of_the_full_forward(family):
    run = make_run(**FAMILIES[family])
    tokens = np.random.default_rng(0).integers(1, V, (3, 24)).astype(np.int32)
    tokens[:, 0] = LETTERS.separator
    expected = full_logits(run, tokens)

    @jax.jit
    def extend(cache, tokens):
        model = nnx.merge(run.graphdef, run.params)
        x_BTD, cache = model.extend(tokens, cache, dtype=jnp.float32)
        return model.logits(x_BTD), cache

    for sizes in ([1] * 24, [10, 4] + [1] * 10):
        empty = nnx.merge(run.graphdef, run.params).empty_cache(3, 24, jnp.float32)
        cache, found, start = empty, [], 0
        for size in sizes:
            assert int(cache.length) == start
            out, cache = extend(cache, tokens[:, start : start + size])
            found.append(out)
            start += size
        np.testing.assert_allclose(np.concatenate(found, axis=1), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", thirds(FAMILIES))
def test_log_probs_are_those_of_the_scoring_path(family):
    run = make_run(**FAMILIES[family])
    prompt = "ab c."
    made = generate.generate(run, prompt, tokens=19, samples=2, temperature=1, seed=3)
    score = jax.jit(lambda batch: NextToken(run.graphdef).scored(run.params, batch))
    for one in made:
        tokens = np.array([[0, *LETTERS.encode(prompt), *one.ids]], np.int32)
        weights = np.float32(np.arange(25) > len(prompt))[None]
        assert tokens.shape == weights.shape and len(one.ids) == 19
        batch = {"tokens": tokens, "segment_ids": np.ones_like(tokens), "weights": weights}
        sums = score(batch)
        assert sums.count == 19
        np.testing.assert_allclose(-np.sum(one.log_probs), sums.nats, atol=1e-4)
        b = loss.shift(batch)
        logits = full_logits(run, b.inputs)
        for t, expected in enumerate(one.log_probs, start=len(prompt)):
            alone = np.float32(np.arange(24) == t)[None]
            nats, _ = loss.cross_entropy(logits, b.targets, alone)
            np.testing.assert_allclose(-nats, expected, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_cache(dtype):
    run = make_run(std=0.1, train__compute_dtype=dtype)
    (one,) = generate.generate(run, "", tokens=24, temperature=1)
    tokens = np.array([[0, *one.ids]], np.int32)
    log_probs = jax.nn.log_softmax(full_logits(run, tokens[:, :-1], jnp.dtype(dtype)))
    expected = np.take_along_axis(log_probs[0], tokens[0, 1:, None], axis=1)[:, 0]
    np.testing.assert_allclose(one.log_probs, expected, atol=20 * float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize("prompt", ["", "a", "the cat"])
def test_temperature_zero_is_argmax(prompt):
    run = make_run()
    ids = [0, *LETTERS.encode(prompt).tolist()]
    (one,) = generate.generate(run, prompt, tokens=12, temperature=0)
    whole = np.array([ids + one.ids], np.int32)  # causal, so that one pass tells every step
    for logits in np.array(full_logits(run, whole))[0, len(ids) - 1 : -1]:
        logits[LETTERS.separator] = -np.inf
        ids.append(int(logits.argmax()))
    assert one.ids == ids[-12:] and one.text == LETTERS.decode(np.array(ids[-12:]))
    for same in (dict(temperature=1e-50), dict(top_k=1), dict(top_p=1e-9)):
        assert generate.generate(run, prompt, tokens=12, **same) == [one]
    # The most likely token of all is never taken where it is the separator.
    assert 0 not in one.ids


def test_seed_and_number_of_samples():
    run = make_run(std=0.1)
    settings = dict(tokens=20, temperature=1.0)
    a, b, c = (generate.generate(run, "a", samples=4, seed=s, **settings) for s in (0, 0, 1))
    assert a == b
    assert len({one.text for one in a + c}) == 8
    assert generate.generate(run, "a", **settings)[0].ids == a[0].ids


def kept(logits, temperature=1.0, top_k=0, top_p=1.0):
    """For each row, ids that may be sampled with their probabilities."""
    ids, scores = shortlist(jnp.asarray(logits), temperature, top_k, top_p)
    probs = np.asarray(jax.nn.softmax(scores, axis=-1))
    return [
        {int(i): float(p) for i, p in zip(*row, strict=True) if p > 0}
        for row in zip(np.asarray(ids), probs, strict=True)
    ]


def softmax(logits):
    """In float64 and without the separator."""
    logits = np.float64(logits).copy()
    logits[:, 0] = -np.inf
    probs = np.exp(logits - logits.max(axis=1, keepdims=True))
    return probs / probs.sum(axis=1, keepdims=True)


LOGITS = 2 * np.random.default_rng(5).normal(size=(20, 13)).astype(np.float32)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_temperature_divides_logits(temperature):
    expected = softmax(LOGITS / np.float32(temperature))
    for row, probs in zip(kept(LOGITS, temperature), expected, strict=True):
        assert set(row) == set(range(1, 13))
        np.testing.assert_allclose([row[i] for i in range(1, 13)], probs[1:], rtol=2e-5)


@pytest.mark.parametrize("top_k", [1, 2, 5, 12, 13, 500])
def test_top_k_keeps_the_most_likely(top_k):
    for row, probs in zip(kept(LOGITS, top_k=top_k), softmax(LOGITS), strict=True):
        assert set(row) == set(np.argsort(-probs)[: min(top_k, 12)].tolist())
    ties = jnp.zeros((1, 6))
    assert sample(ties, jax.random.split(jax.random.key(0), 1), 1.0, 1, 1.0).tolist() == [1]
    assert set(kept(ties, top_k=2)[0]) == {1, 2}


@pytest.mark.parametrize("top_p", [1e-9, 0.1, 0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("top_k", [0, 4])
def test_top_p_keeps_the_smallest_set(top_p, top_k):
    for row, probs in zip(kept(LOGITS, top_k=top_k, top_p=top_p), softmax(LOGITS), strict=True):
        best = np.argsort(-probs)[: top_k or 12]
        mass = probs[best].cumsum() / probs[best].sum()
        count = len(best) if top_p == 1 else int(np.searchsorted(mass, top_p)) + 1
        assert len(row) >= 1 and set(row) == set(best[:count].tolist())


def test_top_p_on_hard_rows():
    sharp = np.array([[50, 100, 0, 0], [0, 0, 0, 0], [0, -1e30, 5, -1e30]], np.float32)
    assert [set(row) for row in kept(sharp, top_p=0.5)] == [{1}, {1, 2}, {2}]
    assert [set(row) for row in kept(sharp, top_p=1e-30)] == [{1}, {1}, {2}]
    # Nothing in the tail is lost at 1, though the sum in float32 reaches 1 long before it.
    tail = np.concatenate([[0.0, 20.0], np.zeros(5000)])[None].astype(np.float32)
    assert len(kept(tail)[0]) == 5001


def test_sampler_follows_its_distribution():
    keys = jax.random.split(jax.random.key(0), 40_000)
    logits = jnp.broadcast_to(LOGITS[:1], (40_000, 13))
    for settings in (dict(top_k=0, top_p=1.0), dict(top_k=6, top_p=0.9)):
        settings = dict(temperature=0.7) | settings
        drawn = np.asarray(sample(logits, keys, **settings))
        expected = kept(LOGITS[:1], **settings)[0]
        assert set(drawn.tolist()) <= set(expected)
        for i, p in expected.items():
            assert abs((drawn == i).mean() - p) < 5 * np.sqrt(p * (1 - p) / 40_000) + 1e-4


def test_separator_is_never_sampled():
    for top_p in (1e-9, 1.0):
        assert 0 not in kept([[100.0, 1.0, 0.0]], top_p=top_p)[0]
    run = make_run(model__tied=False)
    run.params["head"]["kernel"] = run.params["head"]["kernel"].at[:, 0].multiply(100)
    made = generate.generate(run, "", tokens=24, samples=4, temperature=5.0)
    assert all(0 not in one.ids for one in made)
    assert min(min(one.log_probs) for one in made) < -10, "the separator was likely somewhere"


@pytest.mark.parametrize("family", ["rotary", "learned"])
def test_a_text_longer_than_the_window_keeps_its_last_half(family, capsys):
    run = make_run(**FAMILIES[family])
    contexts, ids, log_probs = [], [], []
    for prompt in ("", "ab", "abc " * 20):
        (one,) = generate.generate(run, prompt, tokens=50, temperature=0)
        assert capsys.readouterr().out.count("window is 24 tokens (config.data.seq_len)") == 1
        row, start = [0, *LETTERS.encode(prompt).tolist()], 0
        for token in one.ids:
            if len(row) - start > 24:
                start = len(row) - 12
            contexts.append(row[start:])
            row.append(token)
        ids, log_probs = ids + one.ids, log_probs + one.log_probs
    padded = np.zeros((150, 24), np.int32)  # behind, where a causal model does not look
    for tokens, context in zip(padded, contexts, strict=True):
        tokens[: len(context)] = context
    last = [len(context) - 1 for context in contexts]
    logits = np.array(full_logits(run, padded))[np.arange(150), last]
    expected = np.asarray(jax.nn.log_softmax(logits))[np.arange(150), ids]
    np.testing.assert_allclose(expected, log_probs, atol=1e-4)
    logits[:, LETTERS.separator] = -np.inf
    assert ids == logits.argmax(1).tolist()


@pytest.mark.parametrize(
    ("family", "temperature"),
    [("rotary", 1.0), ("learned", 0), pytest.param("musota", 1.0, marks=pytest.mark.slow)],
)
def test_prompts_of_one_batch_are_continued_as_each_alone(family, temperature):
    run = make_run(std=0.2, **FAMILIES[family])
    prompts = ["", "the cat sat on the mat and ate", "a", "ab c.", "ab c."]
    settings = dict(tokens=40, temperature=temperature, samples=2, seed=5)
    together = generate.generate(run, prompts, **settings)
    alone = [one for prompt in prompts for one in generate.generate(run, prompt, **settings)]
    for one, other in zip(together, alone, strict=True):
        assert (one.prompt, one.ids, one.text) == (other.prompt, other.ids, other.text)
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-4)


def test_a_sample_ends_before_the_first_stop_string():
    run = make_run(std=0.1)
    (whole,) = generate.generate(run, "a", tokens=40, temperature=1)
    first, second = whole.text[18:21], whole.text[9:12]
    at = min(whole.text.find(first), whole.text.find(second))
    shown = []
    (one,) = generate.generate(
        run, "a", tokens=40, temperature=1, stop=[first, second, "not there"], show=shown.append
    )
    assert one.text == "".join(shown) == whole.text[:at]
    assert one.ids == whole.ids[: at + 3] and one.log_probs == whole.log_probs[: at + 3]
    alone = generate.generate(run, "a", tokens=40, temperature=1, stop=second)
    assert alone[0].text == whole.text[: whole.text.find(second)]
    (all_of_it,) = generate.generate(run, "a", tokens=40, temperature=1, stop=["not there"])
    assert all_of_it == whole


def test_what_is_shown_is_never_taken_back():
    row = generate._Row(ByteTokenizer(), ["<end>", "\n\n"])
    seen = []
    for byte in "é<en 日<<end>x".encode():
        row.add(np.array([byte + 1]), [-1.0])
        seen.append(row.text[: row.settled])
    assert seen[-1] == row.text == "é<en 日<" and len(row.ids) == len("é<en 日<<end>".encode())
    assert all(row.text.startswith(part) and "\ufffd" not in part for part in seen)
    assert seen[:5] == ["", "é", "é", "é", "é"] and seen[5] == "é<en "
    cut = generate._Row(ByteTokenizer(), [])
    cut.add(np.array([byte + 1 for byte in "日".encode()[:2]]), [-1.0, -1.0])
    assert cut.text == ""
    cut.finish()
    assert cut.text == "\ufffd"


@pytest.mark.parametrize(
    "prompt, changes, said",
    [
        ("", dict(tokens=0), r"--tokens=0 is impossible; give 1 or more\."),
        ("", dict(samples=0), "--samples=0"),
        ([], {}, "--prompt=\\[\\] is impossible"),
        ("", dict(temperature=-0.1), "--temperature=-0.1 is impossible; give 0 or more"),
        ("", dict(temperature=float("nan")), "--temperature=nan"),
        ("", dict(temperature=float("inf")), "--temperature=inf"),
        ("", dict(top_k=-1), "--top_k=-1"),
        ("", dict(top_p=0.0), "--top_p=0.0 is impossible; give more than 0 and at most 1"),
        ("", dict(top_p=1.1), "--top_p=1.1"),
        ("", dict(seed=2**32), "--seed"),
        ("", dict(seed=-1), "--seed"),
        (
            "aÉb",
            {},
            r"--prompt='aÉb': Character 'É' .* at position 1 .* no id.*; leave it out\.",
        ),
        ("ab", dict(stop=["x", ""]), "--stop='' is impossible"),
    ],
)
def test_errors_are_one_sentence(prompt, changes, said):
    with pytest.raises(ArgumentError, match=said) as raised:
        generate.generate(make_run(), prompt, **changes)
    assert "\n" not in str(raised.value) and str(raised.value).endswith(".")


def test_logits_that_are_not_finite_are_named():
    run = make_run()
    run.params["embedding"] = run.params["embedding"].at[5, 0].set(jnp.nan)
    with pytest.raises(FloatingPointError, match="step 7 are not finite"):
        generate.generate(run, "e", tokens=3)


def test_second_call_compiles_nothing(caplog):
    run = make_run()
    generate.generate(run, "abc", tokens=5, temperature=0.5)
    with caplog.at_level(logging.WARNING), jax.log_compiles():
        generate.generate(run, "cab b", tokens=7, temperature=2.0, seed=4)
        assert not caplog.messages
        generate.generate(run, "bca", tokens=5, temperature=0)
        assert any("Compiling jit(_extend)" in message for message in caplog.messages)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A finished run of four updates."""
    folder = tmp_path_factory.mktemp("generate")
    for i in range(20):
        (folder / f"{i:02}.txt").write_text("to be or not to be\n" * (i + 3))
    cfg = config.replace(
        Config(),
        doctor="off",
        data__corpus="text",
        data__source_dir=str(folder),
        data__files="*.txt",
        data__valid_fraction=0.2,
        data__test_fraction=0.2,
        data__cache_dir=str(folder / "cache"),
        data__seq_len=32,
        data__batch_size=4,
        model__layers=1,
        model__d_model=16,
        model__heads=2,
        train__steps="4",
        train__checkpoint_every="2",
        optim__warmup="2",
    )
    loop.train_and_evaluate(cfg, folder / "run")
    return folder / "run"


def command(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["generate", *flags])
    generate.main()


def records(workdir):
    return [json.loads(line) for line in (workdir / "samples.jsonl").read_text().splitlines()]


def test_command(workdir, monkeypatch, capsys):
    flags = (f"--workdir={workdir}", "--prompt=to ", "--tokens=9", "--temperature=1.5")
    (workdir / "samples.jsonl").unlink(missing_ok=True)
    capsys.readouterr()
    command(monkeypatch, *flags, "--samples=2", "--top_k=5", "--top_p=0.9", "--seed=3")
    command(monkeypatch, *flags, "--logprobs")
    command(monkeypatch, *flags, "--prompt=be", "--stop=o", "--stop=b", "--checkpoint=last")
    made = records(workdir)
    assert len(made) == 5
    assert made[0].items() >= {"step": 4, "prompt": "to ", "temperature": 1.5, "seed": 3}.items()
    assert made[0]["samples"] == 2 and made[2]["top_p"] == 1.0 and made[3]["stop"] == ["o", "b"]
    out = capsys.readouterr().out
    for record in made:
        assert len(record["ids"]) == len(record["log_probs"]) <= 9
        assert f"{record['prompt']}{record['text']}\n" in out
        assert not set(record["text"]) & set(record["stop"])
    table = re.findall(r"^ +(-\d+\.\d{4})  '(.*)'$", out, re.MULTILINE)
    assert "".join(piece for _, piece in table).encode().decode("unicode_escape") == made[2]["text"]
    np.testing.assert_allclose([float(n) for n, _ in table], made[2]["log_probs"], atol=1e-4)
    again = generate.generate(
        open_trained(workdir),
        "to ",
        tokens=9,
        samples=2,
        temperature=1.5,
        top_k=5,
        top_p=0.9,
        seed=3,
    )
    assert [one.text for one in again] == [record["text"] for record in made[:2]]


def test_interactive_and_a_terminal_of_few_characters(workdir, tmp_path, monkeypatch):
    asked = iter(["to ", "É", "to "])
    monkeypatch.setattr("builtins.input", lambda _: next(asked, None) or raise_(EOFError))
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    before = len(records(workdir)) if (workdir / "samples.jsonl").exists() else 0
    command(monkeypatch, f"--workdir={workdir}", "--interactive", "--tokens=30", "--seed=2")
    first, second = records(workdir)[before:]
    assert (first["seed"], second["seed"]) == (2, 4) and first["text"] != second["text"]
    assert "--prompt='É': Character 'É'" in sys.stderr.getvalue()
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbfto be\r\n\r\nor\r\n")
    command(monkeypatch, f"--workdir={workdir}", f"--prompts={tmp_path / 'prompts.txt'}")
    assert [record["prompt"] for record in records(workdir)[before + 2 :]] == ["to be", "", "or"]
    print("naïve 日本", flush=True)
    assert b"na?ve ??" in written.getvalue()


def raise_(error):
    raise error


def test_the_workdir_alone_is_enough(workdir, tmp_path, monkeypatch, capsys):
    """Neither the corpus nor the tokens that were made of it are opened; evaluation wants them."""
    moved = tmp_path / "elsewhere"
    shutil.copytree(workdir, moved / "run")
    shutil.copytree(workdir.parent, moved / "text", ignore=lambda *_: ["run", "cache"])
    record = json.loads((moved / "run" / "config.json").read_text())
    record["config"]["data"] |= {"source_dir": "/nowhere", "cache_dir": "/nowhere/cache"}
    (moved / "run" / "config.json").write_text(json.dumps(record))
    monkeypatch.setattr(workdir_module, "open_data", lambda cfg: raise_(AssertionError("opened")))
    run = lm_jax.open_run(moved / "run")
    assert run.generate("to ", tokens=3) == lm_jax.open_run(workdir).generate("to ", tokens=3)
    monkeypatch.undo()
    where = [f"--config.data.source_dir={moved / 'text'}", f"--config.data.cache_dir={moved}"]
    flags = ["evaluate", f"--workdir={moved / 'run'}", *where]
    evaluate.main(flags)
    scores = [
        json.loads((path / "eval_test.json").read_text()) for path in (moved / "run", workdir)
    ]
    assert scores[0] == scores[1]
    (moved / "text" / "00.txt").write_text("not to be\n")
    with pytest.raises(SystemExit):
        evaluate.main(flags)
    assert "config.data.corpus: 'text'" in capsys.readouterr().err


def test_checkpoints_by_name_and_number(workdir, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(workdir, tmp_path / "run")
    assert open_trained(folder, checkpoint="last").step == 4
    assert open_trained(folder, checkpoint=2).step == 2 and not capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match=r"--checkpoint=3: .*that is there: 2, 4\.$"):
        open_trained(folder, checkpoint=3)
    shutil.rmtree(folder / "best")
    assert open_trained(folder).step == 4
    said = "no evaluation yet: the newest checkpoint, update 4\n"
    assert capsys.readouterr().err == said
    (folder / "tokenizer" / "tokenizer.json").write_text('{"kind": "byte"}')
    with pytest.raises(ConfigError, match="is not the tokenizer that the run was trained with"):
        open_trained(folder)


def test_samples_of_evaluations_that_come_again_are_dropped(tmp_path):
    at = [(True, 10), (True, 20), (False, 30), (True, 30)]
    rows = [{"evaluation": e, "text": "a", "step": step} for e, step in at]
    for after, left in ((30, rows), (20, rows[:3]), (19, [rows[0], rows[2]])):
        (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        drop_samples(tmp_path, after)
        assert records(tmp_path) == left
    drop_samples(tmp_path / "none", 3)
    (tmp_path / "samples.jsonl").write_text('{"evaluation": true, "step": null}\n')
    drop_samples(tmp_path, 3)


def test_samples_at_an_evaluation(workdir, tmp_path):
    run = open_trained(workdir)
    cfg = config.replace(run.cfg, train__sample_prompts="to be|or")
    now = dataclasses.replace(run, cfg=cfg, step=3)
    made = generate.sample_prompts(now, tmp_path)
    assert [record["prompt"] for record in records(tmp_path)] == ["to be", "or"]
    assert {record["step"] for record in records(tmp_path)} == {3}
    assert made == generate.sample_prompts(now, tmp_path)
    assert len(made[0].ids) == 17  # half a window, at most 64
    assert generate.sample_prompts(run, tmp_path) == [] and len(records(tmp_path)) == 4


def test_command_errors(workdir, tmp_path, monkeypatch, capsys):
    latin = tmp_path / "latin.txt"
    latin.write_bytes("é".encode("latin-1"))
    for flags, said in (
        ([f"--workdir={tmp_path}"], "config.json: no such file"),
        ([f"--workdir={workdir}", "--prompt=Z"], "--prompt='Z': Character 'Z'"),
        ([f"--workdir={workdir}", "--top_p=2"], "--top_p=2.0"),
        ([f"--workdir={workdir}", "--checkpoint=33"], "--checkpoint=33"),
        ([f"--workdir={workdir}", "--interactive", "--prompt=to"], "leave out --prompt"),
        ([f"--workdir={workdir}", f"--prompts={latin}"], "is no UTF-8; convert it."),
    ):
        with pytest.raises(SystemExit) as stopped:
            command(monkeypatch, *flags)
        err = capsys.readouterr().err
        assert stopped.value.code == 2 and said in err.splitlines()[-1]
