import concurrent.futures
import fcntl
import json
import math
import os
import platform
import re
import threading

import numpy as np
import pytest

from lm_jax import config, console, evaluate, metrics
from lm_jax.config import Config
from lm_jax.data import open as data_open
from lm_jax.data import references as references_module
from lm_jax.data.open import open_data
from lm_jax.files import write_json
from tests.helpers import shared_data


@pytest.mark.slow
def test_references_of_wikitext_by_words(tmp_path):
    cfg = config.replace(
        Config(),
        data__corpus="wikitext2",
        data__source_dir=str(shared_data("wikitext-2")),
        data__cache_dir=str(tmp_path),
        tokenizer__kind="word",
    )
    store = open_data(cfg)
    split = store.split("test")
    assert len(split.tokens) == split.words == 245_569
    documents = evaluate.documents(store, "test", np.zeros(len(split.document_starts) - 1))
    assert documents["bytes"].sum() == split.bytes  # words in WikiText's own layout
    references = references_module.references(store, "test")
    assert references["uniform"] == 33_278
    assert round(references["unigram"], 1) == 911.7
    assert round(references["kn2"], 1) == 267.4
    assert round(references["kn3"], 1) == 230.1
    assert references_module.references(store, "test") == references


@pytest.mark.slow
def test_entropy_rate_is_a_reference_of_symbols_only(tmp_path):
    cfg = config.replace(Config(), data__cache_dir=str(tmp_path))
    store = open_data(cfg)
    rate = references_module.references(store, "valid")["entropy_rate"]
    np.testing.assert_allclose(rate, store.manifest["entropy_rate"])
    byte = open_data(config.replace(cfg, tokenizer__kind="byte"))
    assert "entropy_rate" not in references_module.references(byte, "valid")


def test_one_process_at_a_time_prepares_data_and_others_say_that_they_wait(tmp_path, monkeypatch):
    cfg = config.replace(Config(), data__cache_dir=str(tmp_path), tokenizer__kind="byte")
    prepare, inside = data_open.prepare, threading.Event()
    said, go_on = threading.Event(), threading.Event()

    def prepare_under_lock(*arguments, **options):
        with (tmp_path / "lock").open() as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        inside.set()
        assert go_on.wait(60)
        return prepare(*arguments, **options)

    monkeypatch.setattr(data_open, "prepare", prepare_under_lock)
    lines = []
    monkeypatch.setattr(console, "say", lambda line: lines.append(line) or said.set())
    with concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(open_data, cfg)
        assert inside.wait(60)
        both = [first, pool.submit(open_data, cfg)]
        assert said.wait(60)
        assert not any(one.done() for one in both)
        go_on.set()
        assert [one.result(60).tokenizer.kind for one in both] == ["byte"] * 2
    (line,) = lines
    holder = f"process {os.getpid()} on {platform.node()}"
    said = rf"waiting until {holder} \(since 20[\d :-]+\) has prepared its data in {tmp_path}"
    assert re.fullmatch(said, line)


def test_json_has_null_for_what_is_not_finite(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": [math.inf, 1.5], "b": {"c": math.nan, "d": "x"}})
    assert json.loads(path.read_text()) == {"a": [None, 1.5], "b": {"c": None, "d": "x"}}
    assert list(tmp_path.iterdir()) == [path]


def test_a_loss_of_nothing_stands_among_its_references():
    """A text of one symbol; its length cannot be told from it."""
    zero = {"loss": 0.0, "bits_per_byte": 0.0, "word_ppl": 1.0, "references": {"uniform": 4.0}}
    assert evaluate.among_references(zero) == [
        {"": "uniform", "nats per token": "1.3863", "token ppl": "4.00"},
        {"": "this model", "nats per token": "0.0000", "token ppl": "1.00"},
    ]
    diverged = evaluate.among_references(
        zero | dict.fromkeys(("loss", "bits_per_byte", "word_ppl"))
    )
    assert {row["bits per byte"] for row in diverged} == {"nan"}


def test_sums_keep_what_float32_would_lose():
    total = sum((metrics.Sums(1e-3, 1.0, 0.0) for _ in range(100_000)), metrics.Sums(1e8, 0, 0))
    # Float32 cannot tell 1e8 from 1e8 + 1e-3 and would add nothing; float64 loses 1e-8 a time.
    assert total.nats == pytest.approx(1e8 + 100, abs=1e-2) and total.count == 100_000
