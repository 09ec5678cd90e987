"""Positions of a teacher with another tokenizer, against the definition."""

import json
import types

import numpy as np
import pytest

from lm_jax.data.store import Split
from lm_jax.data.tokenizers.base import count_words
from lm_jax.data.tokenizers.hf import HfTokenizer
from lm_jax.data.tokenizers.kinds import BpeTokenizer, ByteTokenizer
from lm_jax.data.tokenizers.load import train_tokenizer
from lm_jax.distill import alignment
from lm_jax.distill.alignment import Aligner

TEXTS = [
    "the cat sat on the mat, and the other cat sat on the other mat",
    "naïve café – “quoted” text, 漢字 and 🎈 balloons",
    "a\n\n  b\tc",
    "",
    "the mat",
]


@pytest.fixture(scope="module")
def tokenizers():
    return {
        "byte": ByteTokenizer(),
        "char": train_tokenizer("char", TEXTS, 0),
        "small": BpeTokenizer.train(TEXTS * 3, 262),
        "large": BpeTokenizer.train(TEXTS * 3, 300),
    }


def row(tokenizer, texts, document_mask=True):
    """Tokens and segments of a stream of documents."""
    tokens, segments = [], []
    for i, text in enumerate(texts, 1):
        ids = [tokenizer.separator, *tokenizer.encode(text)]
        tokens += ids
        segments += [i if document_mask else 1] * len(ids)
    return np.array(tokens, np.int32), np.array(segments, np.int32)


PAIRS = [
    ("small", "large"),
    ("large", "small"),
    ("byte", "large"),
    ("large", "byte"),
    ("char", "small"),
]


@pytest.mark.parametrize("document_mask", [True, False])
@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_never_later_and_exact_where_it_says_so(tokenizers, student, teacher, document_mask):
    s, t = tokenizers[student], tokenizers[teacher]
    tokens, segments = row(s, TEXTS, document_mask)
    # A window may open and end inside a character.
    some = len(tokens) // 3
    for first, last in ((0, len(tokens)), (3, -2), (some, 2 * some), (some + 1, some + 12)):
        window, ids = tokens[first:last], segments[first:last]
        found = Aligner(s, t, 4 * len(tokens)).row(window, ids)
        read = found["teacher_tokens"][found["teacher_segment_ids"] > 0]
        documents = np.cumsum(window == s.separator)  # of each student position
        theirs = np.cumsum(read == t.separator)

        def until(tokenizer, sequence, numbers, at):
            inside = (numbers == numbers[at]) & (np.arange(len(sequence)) <= at)
            return b"".join(tokenizer.token_bytes(sequence[inside]))

        for at in range(len(window)):
            text = until(s, window, documents, at)
            place = found["teacher_place"][at]
            if place < 0:
                assert not found["aligned"][at]
                assert documents[at] == 0  # only a document whose start is outside the window
                continue
            assert theirs[place] == documents[at]
            seen = until(t, read, theirs, place)
            cut = (
                0
                if documents[at]
                else next(n for n in range(4) if text[n:].startswith(seen[:1]) or not seen)
            )
            assert text[cut:].startswith(seen)
            following = until(t, read, theirs, place + 1) if place + 1 < len(read) else b""
            if place + 1 < len(read) and theirs[place + 1] == theirs[place]:
                assert len(following) + cut > len(text)  # the last one that ends in time
            assert found["aligned"][at] == (text[cut:] == seen)


def test_positions_restart_with_segments_and_go_on_over_documents(tokenizers):
    s, t = tokenizers["small"], tokenizers["large"]
    for mask in (True, False):
        tokens, segments = row(s, TEXTS, mask)
        found = Aligner(s, t, 500).row(tokens, segments)
        real = found["teacher_segment_ids"] > 0
        starts = np.flatnonzero(np.diff(found["teacher_segment_ids"][real], prepend=0))
        expected = np.arange(real.sum())
        expected -= np.repeat(starts, np.diff([*starts, real.sum()]))
        np.testing.assert_array_equal(found["teacher_positions"][real], expected)
        assert len(starts) == (len(TEXTS) if mask else 1)


def test_text_beyond_the_teachers_row_is_not_aligned(tokenizers):
    s, t = tokenizers["large"], tokenizers["byte"]
    tokens, segments = row(s, TEXTS[:1])
    whole, cut = (Aligner(s, t, n).row(tokens, segments) for n in (200, 20))
    assert len(cut["teacher_tokens"]) == 20
    inside = whole["teacher_place"] < 20
    np.testing.assert_array_equal(
        cut["teacher_place"], np.where(inside, whole["teacher_place"], -1)
    )
    np.testing.assert_array_equal(cut["aligned"], whole["aligned"] * inside)
    assert not inside.all()


def test_equal_tokenizers_are_aligned_everywhere(tokenizers):
    s = tokenizers["small"]
    tokens, segments = row(s, TEXTS)
    batch = {
        "tokens": np.pad(tokens, (0, 1))[None, None],
        "segment_ids": np.pad(segments, (0, 1))[None, None],
    }
    found = Aligner(s, s, len(tokens))(batch)
    np.testing.assert_array_equal(found["teacher_tokens"][0, 0], tokens)
    np.testing.assert_array_equal(found["teacher_place"][0, 0], np.arange(len(tokens)))
    assert found["aligned"].shape == (1, 1, len(tokens)) and found["aligned"].all()


def test_a_window_with_nothing_but_part_of_a_character(tokenizers):
    s, t = tokenizers["byte"], tokenizers["large"]
    tokens, segments = row(s, ["é", "the mat"])
    found = Aligner(s, t, 64).row(tokens[2:], segments[2:])  # from the second byte
    assert found["teacher_place"][0] == -1 and found["aligned"][0] == 0
    assert found["aligned"][1:].any()


def test_padding_is_no_text(tokenizers):
    s, t = tokenizers["small"], tokenizers["large"]
    tokens, segments = (np.pad(a, (4, 7)) for a in row(s, TEXTS[:1]))
    found = Aligner(s, t, 200).row(tokens, segments)
    outside = segments == 0
    assert (found["teacher_place"][outside] == -1).all() and not found["aligned"][outside].any()
    assert found["aligned"][~outside].any()


def test_first_bytes(tokenizers):
    groups, other = alignment.first_bytes(tokenizers["large"], tokenizers["byte"])
    assert other[0] == alignment.BYTES and set(other[1:]) == set(range(256))
    assert groups[0] == alignment.BYTES
    pieces = tokenizers["large"].token_bytes(np.arange(1, len(groups)))
    np.testing.assert_array_equal(groups[1:], [piece[0] for piece in pieces])


def test_bytes_that_only_one_knows_are_left_out(tokenizers):
    few, all_bytes = alignment.first_bytes(tokenizers["char"], tokenizers["byte"])
    known = {character.encode()[0] for character in "".join(TEXTS)}
    assert set(few[1:]) == known and set(all_bytes) == known | {alignment.BYTES}


def composing(tokenizer):
    """The same tokens of a tokenizer that writes an accent and its letter as one character."""
    tree = json.loads(tokenizer.to_library().to_str()) | {"normalizer": {"type": "NFC"}}
    return HfTokenizer(json.dumps(tree), tokenizer.separator, tokenizer.vocab_size)


@pytest.mark.parametrize("document_mask", [True, False])
def test_text_that_the_teacher_would_change_has_no_teacher(tokenizers, document_mask):
    s, t = tokenizers["small"], composing(tokenizers["large"])
    tokens, segments = row(s, ["the cat", "caf\u0065\u0301 on", "the mat"], document_mask)
    found = Aligner(s, t, 64).row(tokens, segments)
    second = np.cumsum(tokens == s.separator) == 2
    ends = np.cumsum([len(piece) for piece in s.token_bytes(tokens[second])])
    changed = np.zeros(len(tokens), bool)
    changed[second] = ends > len("caf")
    assert 3 < changed.sum() < second.sum()
    assert (found["teacher_place"][changed] == -1).all() and not found["aligned"][changed].any()
    assert (found["teacher_place"][~changed] >= 0).all()
    rest = Aligner(s, t, 64).row(tokens[~changed], segments[~changed])
    for name, values in rest.items():
        kept = ~changed if name in ("teacher_place", "aligned") else slice(None)
        np.testing.assert_array_equal(found[name][kept], values)
    assert rest["aligned"].any()


def test_a_split_without_the_documents_that_it_would_change(tokenizers):
    texts = ["the cat sat", "caf\u0065\u0301", "the mat"]
    s, t = tokenizers["byte"], composing(tokenizers["large"])

    def again(texts):
        documents = [s.encode(text) for text in texts]
        starts = np.cumsum([0, *map(len, documents)])
        size, words = sum(len(text.encode()) for text in texts), sum(map(count_words, texts))
        split = Split("valid", np.concatenate(documents), starts, size, words, 0)
        original = types.SimpleNamespace(split=lambda name: split, tokenizer=s)
        return alignment.Retokenised(None, {}, t, original).split("valid")

    found, kept = again(texts), [texts[0], texts[2]]
    np.testing.assert_array_equal(found.tokens, np.concatenate(t.encode_all(kept)))
    assert (found.bytes, found.words) == (sum(map(len, kept)), 5)
    assert len(found.document_starts) == 3
    with pytest.raises(ValueError, match=r"normalizer \(NFC\) changes the text at character 3"):
        again(texts[1:2] * 3 + texts[:1])


def test_tokens_in_common(tokenizers):
    small, large = (tokenizers[name] for name in ("small", "large"))
    assert alignment.common_tokens(large, large) == 1
    assert alignment.common_tokens(small, large) == (262 - 257) / (300 - 257)
    assert alignment.common_tokens(tokenizers["byte"], small) == 0
