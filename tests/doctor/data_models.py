"""Documents, windows and batches for the tests of data checks."""

from types import SimpleNamespace

import numpy as np

from lm_jax.data.synthetic import MarkovSource
from lm_jax.data.windows import Windows, eval_batches, train_batches
from lm_jax.doctor.data import examine_data

T = 63
VOCAB = 257
SOURCE = MarkovSource(seed=0)


def documents(count, seed, length=300):
    """Documents of a source with 1.8 nats a token, ids from 1."""
    return [SOURCE.sample(length, (seed, i)).astype(np.int64) + 1 for i in range(count)]


TRAIN, VALID, TEST = documents(120, 1), documents(20, 2), documents(20, 3)


def stream(docs):
    """Documents end to end, a separator before each."""
    return np.concatenate([np.concatenate([[0], document]) for document in docs])


def cut(tokens, width=T + 1, stride=T):
    """Windows of a stream."""
    starts = np.arange(0, len(tokens) - width + 1, stride)
    return tokens[starts[:, None] + np.arange(width)]


def batches(rows, size=8):
    return [{"tokens": rows[i : i + size]} for i in range(0, len(rows) - size + 1, size)]


def shuffled(rows, seed=0):
    return rows[np.random.default_rng(seed).permutation(len(rows))]


def split_of(docs):
    starts = np.concatenate([[0], np.cumsum([len(d) for d in docs])])
    return SimpleNamespace(
        name="train", tokens=np.concatenate(docs), document_starts=starts, separator=0
    )


def read(docs=None, *, first=0, epochs=1, batch_size=8, seed=0, processes=1, process=0):
    """The batches of lm_jax's own pipeline, of whole epochs from batch number `first` on."""
    split = split_of(TRAIN if docs is None else docs)
    count = len(Windows(split, T, True)) // batch_size
    return list(
        train_batches(
            split,
            seq_len=T,
            batch_size=batch_size,
            document_mask=True,
            seed=seed,
            calls=[range(i, i + 1) for i in range(first, epochs * count)],
            process_index=process,
            process_count=processes,
            threads=0,
        )
    )


def held_out(docs):
    return list(eval_batches(split_of(docs), seq_len=T, batch_size=8, document_mask=True))


def examine(train, *args, vocab_size=VOCAB, **kwargs):
    return examine_data(train, *args, vocab_size=vocab_size, **kwargs)


def bad(report):
    return {f.check: f.evidence for f in report if f.status in ("fail", "warn")}


def silent(report, *made):
    """No failure, no warning, and the named checks were really made."""
    assert not bad(report)
    for name in made:
        assert report[name].status == "pass", report[name].evidence
    return True


def log_lines(form, seed, count, lines=50):
    """Documents of bytes whose lines have one form with free numbers, drawn below the bounds."""
    text, bounds = form
    rng = np.random.default_rng(seed)
    documents = []
    for _ in range(count):
        numbers = rng.integers(0, bounds, (lines, len(bounds))).tolist()
        joined = "".join(text.format(*line) for line in numbers)
        documents.append(np.frombuffer(joined.encode(), np.uint8).astype(int))
    return documents


# Text that looks like language, for tokenizers.


def prose(seed, sentences=400):
    """Documents of sentences with commas, capitals and newlines.

    A word is one of the favourite successors of the one before it, or any by Zipf's law.
    """
    fixed = np.random.default_rng(0)
    sounds = list("aeioustrnldm")
    words = ["".join(fixed.choice(sounds, fixed.integers(2, 9))) for _ in range(900)]
    favourites = fixed.integers(0, len(words), (len(words), 12))
    p = 1 / np.arange(3, len(words) + 3)
    rng = np.random.default_rng(seed)
    texts, lines = [], []
    for _ in range(sentences):
        length = int(rng.integers(5, 20))
        by_law = rng.choice(len(words), length, p=p / p.sum()).tolist()
        place = by_law[0]
        line = words[place].capitalize()
        for any_word, choice in zip(by_law, rng.random(length).tolist(), strict=True):
            place = favourites[place][int(choice * 15)] if choice < 0.8 else any_word
            line += ", " * (choice > 0.95) or " "
            line += words[place]
        lines.append(line + ".")
        if rng.random() < 0.2:
            texts.append("\n".join(lines) + "\n\n")
            lines = []
    return texts + ["\n".join(lines)] * bool(lines)


PROSE = {"train": prose(1, 1500), "valid": prose(2, 150), "test": prose(3, 150)}
