"""A cache on disk is what was written, or is refused."""

import json
import re
import types

import jax
import numpy as np
import pytest

from lm_jax.config import ConfigError
from lm_jax.data.open import open_data
from lm_jax.data.windows import Windows
from lm_jax.distill import cache, scores
from lm_jax.distill.opening import record_teacher
from lm_jax.distill.teachers import Teacher
from tests.helpers import small

K = 3


@pytest.fixture(scope="module")
def run(text):
    cfg = small(text, distill__support="top_k", distill__top_k=K, distill__temperature="2")
    return cfg, open_data(cfg)


@pytest.mark.parametrize("process", [0, 1])
def test_the_first_process_alone_writes_the_comparison(run, tmp_path, monkeypatch, process):
    row = dict.fromkeys([value for _, value, _ in scores.SHOWN], 1)
    monkeypatch.setattr(scores, "score_models", lambda *_: {"distilled": row})
    monkeypatch.setattr(jax, "process_index", lambda: process)
    cfg, store = run
    student = types.SimpleNamespace(graphdef=None, params={}, mesh=None)
    teacher = Teacher(("one",), (None,), ({},))
    scores.report_distillation(cfg, tmp_path, student, store, teacher)
    assert (tmp_path / "distillation.json").exists() == (process == 0)


def uniform(batch):
    """As a teacher says that finds all ids below K equally likely."""
    rows = (len(batch["tokens"]), batch["tokens"].shape[-1] - 1)
    ids = np.broadcast_to(np.arange(K), (*rows, K))
    return ids, np.broadcast_to(np.log(np.full(K + 1, 1 / (K + 1))), (*rows, K + 1))


@pytest.fixture
def written(run, tmp_path):
    cfg, store = run
    cache.write_cache(tmp_path / "cache", cfg, store, uniform, {})
    cfg.distill.cache = str(tmp_path / "cache")
    return cfg, store, tmp_path / "cache"


def test_what_was_written_comes_back(written):
    cfg, store, _ = written
    extend, _ = cache.open_cache(cfg, store)
    batch = Windows(store.split("train"), cfg.data.seq_len, True).batch(np.arange(5))
    ids, log_p = uniform(batch)
    np.testing.assert_array_equal(extend(batch)["kept_ids"], ids)
    np.testing.assert_array_equal(extend(batch)["kept_log_p"], np.float32(log_p))


def alter(path):
    array = np.load(path, mmap_mode="r+")
    array.reshape(-1)[len(array) // 2] += 1
    array.flush()


def cut(path):
    path.write_bytes(path.read_bytes()[:-4])


@pytest.mark.parametrize("name", [cache.HASHES, cache.IDS, cache.LOG_P])
@pytest.mark.parametrize("wreck", [alter, cut, lambda path: path.unlink()])
def test_a_wrecked_file_is_refused(written, name, wreck):
    cfg, store, folder = written
    wreck(folder / name)
    said = f"cache: {name} in {folder} is not what was written; .* scripts/cache_teacher.py"
    with pytest.raises(ConfigError, match=said):
        cache.open_cache(cfg, store)


def test_a_file_without_a_hash_must_be_there_too(written):
    cfg, store, folder = written
    values = json.loads((folder / cache.MANIFEST).read_text())
    (folder / cache.MANIFEST).write_text(json.dumps(values | {"sha256": {}}))
    (folder / cache.IDS).unlink()
    with pytest.raises(ConfigError, match=rf"{cache.IDS}.* in {folder} is not what was written"):
        cache.open_cache(cfg, store)


@pytest.mark.parametrize("without", ["sha256", "temperature", None, "brackets", "deep"])
def test_a_manifest_that_lacks_something_is_refused(written, without):
    cfg, store, folder = written
    path = folder / cache.MANIFEST
    values = json.loads(path.read_text())
    values.pop(without, None)
    damaged = {None: "{", "brackets": "[1]", "deep": "[" * 9**5}
    path.write_text(damaged.get(without, json.dumps(values)))
    said = f"{path} is damaged or of an older version, .* run scripts/cache_teacher.py"
    with pytest.raises(ConfigError, match=said):
        cache.open_cache(cfg, store)


def test_what_is_not_finite_is_not_kept(run, tmp_path):
    def broken(batch):
        ids, log_p = uniform(batch)
        return ids, np.where(batch["tokens"][:, 1:, None] == 3, np.nan, log_p)

    with pytest.raises(ConfigError, match="no finite log-probabilities in windows 0 to"):
        cache.write_cache(tmp_path / "cache", *run, broken, {})
    assert not (tmp_path / "cache" / cache.MANIFEST).exists()


@pytest.mark.parametrize("damage", [lambda p: p.unlink(), lambda p: p.write_text("[" * 9**5)])
def test_a_run_whose_record_of_the_teacher_is_damaged_does_not_go_on(tmp_path, damage):
    teacher = types.SimpleNamespace(identity={"cache": "abc"})
    record_teacher(tmp_path, teacher, resuming=False)
    record_teacher(tmp_path, teacher, resuming=True)
    path = tmp_path / "teacher.json"
    damage(path)
    said = re.escape(f"{path}: is missing or damaged") + ".*; restore the file or give another"
    with pytest.raises(ConfigError, match=said):
        record_teacher(tmp_path, teacher, resuming=True)
