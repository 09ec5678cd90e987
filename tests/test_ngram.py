import functools
import json
import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from lm_jax.data.corpora import Corpus
from lm_jax.data.references import in_nats, nats, perplexities, references, unigram_nats
from lm_jax.data.store import prepare
from tests.helpers import shared_data


class SlowKneserNey:
    """The definition with dictionaries, one probability at a time."""

    def __init__(self, train_ids, order, vocab_size, start):
        stream = [start] * (order - 1) + list(train_ids)
        self.order, self.vocab_size = order, vocab_size
        self.counts = {order: Counter(zip(*(stream[i:] for i in range(order)), strict=False))}
        for k in range(order - 1, 0, -1):
            self.counts[k] = Counter(gram[1:] for gram in self.counts[k + 1])
        self.discounts: dict[int, float] = {}
        self.continuations: dict[int, dict[tuple, list[int]]] = {}
        for k, counts in self.counts.items():
            n1, n2 = (sum(c == times for c in counts.values()) for times in (1, 2))
            self.discounts[k] = n1 / (n1 + 2 * n2) if n1 else 0.5
            self.continuations[k] = defaultdict(list)
            for gram, count in counts.items():
                self.continuations[k][gram[:-1]].append(count)

    def probability(self, word, history):
        """p(word | history), of a history of order - 1 tokens."""
        k = len(history) + 1
        below = self.probability(word, history[1:]) if history else 1 / self.vocab_size
        followers = self.continuations[k][history]
        if not followers:
            return below
        discount = self.discounts[k]
        kept = max(self.counts[k][(*history, word)] - discount, 0)
        return (kept + discount * len(followers) * below) / sum(followers)

    def nats(self, ids, start):
        stream = [start] * (self.order - 1) + list(ids)
        grams = zip(*(stream[i:] for i in range(self.order)), strict=False)
        return [-math.log(self.probability(gram[-1], gram[:-1])) for gram in grams]


def random_text(seed, length, vocab_size):
    """Tokens 1 ... vocab_size of very different frequencies."""
    shares = np.random.default_rng(seed).zipf(1.3, length) % vocab_size
    return (shares + 1).astype(np.uint16)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("start", [0, 2])
@pytest.mark.parametrize("vocab_size, length", [(5, 60), (12, 400), (300, 900)])
def test_kneser_ney_equals_a_slow_reading_of_the_definition(order, start, vocab_size, length):
    train_ids = random_text(0, length, vocab_size)
    ids = random_text(1, 200, vocab_size)
    ids[:20] = train_ids[:20]
    slow = SlowKneserNey(train_ids.tolist(), order, vocab_size, start)
    fast = nats(train_ids, ids, order, vocab_size=vocab_size, start=start)
    assert fast.dtype == np.float64
    np.testing.assert_allclose(fast, slow.nats(ids.tolist(), start), rtol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_kneser_ney_sums_to_one_over_the_vocabulary(order):
    vocab_size = 15
    train_ids = random_text(2, 300, vocab_size - 2)  # the last two types are never seen
    rng = np.random.default_rng(3)
    places = rng.integers(0, len(train_ids) - order, 20)
    seen = [train_ids[i : i + order - 1] for i in places]
    unseen = rng.integers(1, vocab_size + 1, (20, order - 1))
    for history in [*seen, *unseen]:
        queries = [[*history, word] for word in range(1, vocab_size + 1)]
        scores = nats(train_ids, np.ravel(queries), order, vocab_size=vocab_size, start=0)
        total = np.exp(-scores[order - 1 :: order]).sum()
        assert total == pytest.approx(1, rel=1e-12)


def test_kneser_ney_does_not_depend_on_how_types_are_numbered():
    train_ids, ids = random_text(4, 500, 40), random_text(5, 100, 40)
    names = np.random.default_rng(6).permutation(2**32 - 1 - np.arange(41)).astype(np.uint32)
    expected = nats(train_ids, ids, 4, vocab_size=40, start=1)
    renamed = nats(names[train_ids], names[ids], 4, vocab_size=40, start=int(names[1]))
    np.testing.assert_array_equal(renamed, expected)


def test_kneser_ney_keeps_unseen_tokens_possible_without_singletons():
    train_ids = np.tile([1, 2], 50)
    scores = nats(train_ids, np.array([1, 2, 3]), 2, vocab_size=3, start=2)
    slow = SlowKneserNey(train_ids.tolist(), 2, 3, start=2)
    assert slow.discounts == {1: 1.0, 2: 0.5}
    np.testing.assert_allclose(scores, slow.nats([1, 2, 3], 2), rtol=1e-12)


def test_unigram_is_relative_frequency_while_every_token_is_known():
    scores = unigram_nats(np.array([3, 3, 3, 5]), np.array([5, 3]), vocab_size=4)
    np.testing.assert_allclose(np.exp(-scores), [1 / 4, 3 / 4])


def test_unigram_adds_one_when_a_token_is_unknown():
    scores = unigram_nats(np.array([3, 3, 3, 4]), np.array([1, 2, 3, 4]), vocab_size=4)
    np.testing.assert_allclose(np.exp(-scores), [1 / 8, 1 / 8, 4 / 8, 2 / 8])


def test_references_are_perplexities_of_the_named_predictors():
    train_ids, ids = random_text(7, 500, 30), random_text(8, 100, 30)
    result = perplexities(train_ids, ids, vocab_size=30, start=0, orders=(2, 4))
    assert list(result) == ["uniform", "unigram", "kn2", "kn4"]
    assert result["uniform"] == 30
    kn4 = nats(train_ids, ids, 4, vocab_size=30, start=0)
    assert result["kn4"] == pytest.approx(math.exp(kn4.mean()))


@pytest.mark.parametrize("train_ids, ids", [([], [1]), ([1], [])])
def test_an_empty_split_is_refused(train_ids, ids):
    arrays = np.array(train_ids, np.uint16), np.array(ids, np.uint16)
    message = f"{len(train_ids)} to fit and {len(ids)} to score"
    with pytest.raises(ValueError, match=message):
        perplexities(*arrays, vocab_size=2, start=0)


def _store(folder, text="the cat and the dog "):
    splits = {"train": [functools.partial(iter, [text * 9])], "valid": [lambda: iter([text])]}
    corpus = Corpus("c", text, splits)
    return prepare(corpus, tokenizer_kind="char", vocab_size=0, cache_dir=str(folder))


@pytest.mark.parametrize(
    "damage",
    [
        lambda content, other: content.replace("10.0", "9.0"),
        lambda content, other: content[:30],
        lambda content, other: "",
        lambda content, other: "[]",
        lambda content, other: json.dumps({"uniform": 10.0, "unigram": 2.0}),  # without a hash
        lambda content, other: other,
    ],
)
def test_references_that_are_not_those_of_their_store_are_computed_again(tmp_path, capsys, damage):
    store, other = _store(tmp_path), _store(tmp_path, "a cat saw another dog and a bird ")
    expected = references(store, "valid")
    assert expected["uniform"] == 10 != references(other, "valid")["uniform"]
    path = store.path / "references_valid.json"
    content = path.read_text()
    capsys.readouterr()
    assert references(store, "valid") == expected
    assert not capsys.readouterr().out
    path.write_text(damage(content, (other.path / "references_valid.json").read_text()))
    assert references(store, "valid") == expected
    said = capsys.readouterr().out
    told = "not what was written there for its store", "of a version that kept no hash"
    assert any(f"{path} is {what}" in said for what in told)
    assert path.read_text() == content


def test_a_text_of_one_symbol_has_references_of_zero_nats(tmp_path):
    found = references(_store(tmp_path, "a"), "valid")
    assert set(found.values()) == {1.0}
    assert set(in_nats(found).values()) == {0.0}


@pytest.mark.slow
@pytest.mark.long
def test_wikitext_2_gives_the_known_perplexities():
    folder = shared_data("wikitext-2")
    number: dict[str, int] = {}
    splits = {}
    for name in ("train", "valid", "test"):
        lines = (folder / f"wiki.{name}.tokens").read_text(encoding="utf-8").splitlines()
        words = [word for line in lines for word in [*line.split(), "<eos>"]]
        splits[name] = np.array([number.setdefault(w, len(number) + 1) for w in words], np.uint16)
    assert (len(splits["train"]), len(number)) == (2_088_628, 33_278)

    known = {
        "valid": {"uniform": 33278, "unigram": 965.1, "kn2": 288.8, "kn3": 247.0, "kn5": 238.9},
        "test": {"uniform": 33278, "unigram": 911.7, "kn2": 267.4, "kn3": 230.1, "kn5": 223.7},
    }
    for name, expected in known.items():
        options = dict(vocab_size=len(number), start=number["<eos>"])
        found = perplexities(splits["train"], splits[name], orders=(2, 3, 5), **options)
        assert {key: round(value, 1) for key, value in found.items()} == expected
