"""The nats of each document that evaluation leaves beside those of the split."""

import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm_jax import config, evaluate, loss, sharding, step
from lm_jax.config import Config, MeshConfig
from lm_jax.config.resolve import resolve
from lm_jax.data.open import open_data
from lm_jax.models.families import create_model
from lm_jax.objective import NextToken
from tests.helpers import randomise

T = 40
RTOL = 1e-5  # float32 sums of at most some hundred terms in another order


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    """Lines of 3 to 30 characters as documents, a model that looks at all of them."""
    folder = tmp_path_factory.mktemp("lines")
    rng = np.random.default_rng(0)
    lines = ["".join(rng.choice(list("abcdé "), rng.integers(3, 31))) for _ in range(60)]
    (folder / "all.txt").write_text("\n".join(f"a{line}" for line in lines))
    return config.replace(
        Config(),
        data__corpus="text",
        data__source_dir=str(folder),
        data__files="all.txt",
        data__document="line",
        data__valid_fraction=0.5,
        data__cache_dir=str(folder / "cache"),
        data__seq_len=T,
        data__batch_size=4,
        eval__batch_size=4,
        eval__stride=T,
        model__layers=1,
        model__d_model=8,
        model__heads=2,
        model__d_ff=16,
    )


@pytest.fixture(scope="module")
def store(cfg):
    return open_data(cfg)


@pytest.fixture(scope="module")
def model(cfg, store):
    """Structure, and parameters under which every token depends on those before it."""
    graphdef, init = create_model(resolved(cfg), store.tokenizer.vocab_size, "reference")
    return graphdef, randomise(init(jax.random.key(0)), 1)


def resolved(cfg, **changes):
    return resolve(config.replace(cfg, **changes), windows=10)


def score(cfg, store, model, **changes):
    cfg = resolved(cfg, **changes)
    graphdef, params = model
    eval_step = step.make_eval_step(cfg, graphdef)
    return evaluate.Evaluator(cfg, store, sharding.make_mesh(MeshConfig()), eval_step).score(
        params, "valid"
    )


@pytest.fixture(scope="module")
def alone(store, model):
    """Nats of each document after a separator, in a row of its own."""
    split = store.split("valid")
    starts = split.document_starts
    tokens = np.zeros((len(starts) - 1, T + 1), np.int32)
    weights = np.zeros(tokens.shape, np.float32)
    for row, (first, last) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
        tokens[row, 1 : 1 + last - first] = split.tokens[first:last]
        weights[row, 1 : 1 + last - first] = 1
    rows = {"tokens": tokens, "segment_ids": np.ones_like(tokens), "weights": weights}

    def nats(row):
        one = {name: x[row : row + 1] for name, x in rows.items()}
        return score_row(one).nats

    score_row = jax.jit(lambda b: NextToken(model[0]).scored(model[1], b))
    return np.array([nats(row) for row in range(len(tokens))], np.float64)


@pytest.mark.parametrize("impl", ["materialised", "fused"])
def test_a_document_with_all_its_context_is_scored_as_if_alone(cfg, store, model, alone, impl):
    result, nats_D = score(cfg, store, model, loss__impl=impl, eval__stride=1)
    np.testing.assert_allclose(nats_D, alone, rtol=RTOL)
    np.testing.assert_allclose(nats_D.sum(), result["loss"] * result["token_count"], rtol=1e-6)


@pytest.mark.parametrize("stride", [T, 7])
@pytest.mark.parametrize("batch_size", [1, 9, 64])
def test_tokens_go_to_their_documents_without_the_help_of_segments(cfg, store, batch_size, stride):
    """Against a walk over the stream; the stand-in for a model says where a target stands."""
    split, starts = store.split("valid"), store.split("valid").document_starts
    expected = []
    for first, last in zip(starts[:-1], starts[1:], strict=True):
        before = np.concatenate([[split.separator], split.tokens[first : last - 1]])
        expected.append((np.square(split.tokens[first:last]) / 7 + before).sum())

    def eval_step(params, batch):
        b = loss.shift(batch)
        nats_BT = (jnp.square(b.targets) / 7 + b.inputs) * b.weights
        sums = {"nats": nats_BT.sum(), "count": b.weights.sum(), "correct": 0}
        return {**sums, "token_nats": nats_BT, "token_weights": b.weights}

    changed = resolved(
        cfg, data__document_mask=False, eval__batch_size=batch_size, eval__stride=stride
    )
    evaluator = evaluate.Evaluator(changed, store, sharding.make_mesh(MeshConfig()), eval_step)
    result, nats_D = evaluator.score(None, "valid")
    np.testing.assert_allclose(nats_D, expected, rtol=1e-6)
    np.testing.assert_allclose(nats_D.sum(), result["loss"] * result["token_count"], rtol=1e-6)


@pytest.mark.parametrize("kind", ["byte", "char", "bpe", "word"])
def test_bytes_of_documents_sum_to_those_of_the_split_or_are_left_out(cfg, kind):
    cfg = config.replace(cfg, tokenizer__kind=kind, tokenizer__vocab_size=300 * (kind == "bpe"))
    if kind == "word":  # few, so that no split holds one that is new
        cfg = config.replace(cfg, data__files="words.txt")
        lines = (
            f"{a} {b}   {c}" for a, b, c in itertools.product(["ab", "cd", "é", "gh"], repeat=3)
        )
        (pathlib.Path(cfg.data.source_dir) / "words.txt").write_text("\n".join(lines))
    store = open_data(cfg)
    split = store.split("valid")
    nats_D = np.ones(len(split.document_starts) - 1)
    kept = evaluate.documents(store, "valid", nats_D)
    assert kept["tokens"].sum() == len(split.tokens)
    if kind == "word":  # more spaces in the text than in the layout that the ids stand for
        assert set(kept) == {"nats", "tokens"}
        return
    assert kept["bytes"].sum() == split.bytes
    pairs = zip(split.document_starts[:-1], split.document_starts[1:], strict=True)
    for i, (first, last) in enumerate(pairs):
        text = store.tokenizer.decode(split.tokens[first:last])
        assert kept["bytes"][i] == len(text.encode())
