"""Distillation end to end: the loop, resuming, the cache, the report and the doctor."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from scipy.special import log_softmax

from lm_jax import config, loop, signals
from lm_jax import loss as losses
from lm_jax.config import ConfigError, rules
from lm_jax.config.flags import load_module
from lm_jax.config.resolve import resolve
from lm_jax.data import windows
from lm_jax.data.open import open_data
from lm_jax.distill import cache, scores, teachers
from lm_jax.distill.opening import open_teacher, verify
from lm_jax.preflight import examine_config
from lm_jax.signals import Interrupted
from lm_jax.workdir import open_trained
from tests.distill.toys import EVERYTHING
from tests.helpers import ROOT, StopAfter, examine_distillation_of, final_state, rows, small

CACHED = dict(distill__support="top_k", distill__top_k=5, distill__temperature="2")
pytestmark = pytest.mark.slow


def student(text, **changes):
    base = dict(model__dropout=0.0, train__steps="8", train__eval_every="8", model__d_model=8)
    return small(text, **base | changes)


@pytest.fixture(scope="module")
def runs(text, tmp_path_factory):
    """Two teachers, and a student alone."""
    root = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        cfg = small(
            text,
            seed=seed,
            model__layers=3,
            optim__peak_lr=1e-2,
            train__steps="40",
            train__eval_every="20",
        )
        loop.train_and_evaluate(cfg, root / f"teacher-{seed}")
    loop.train_and_evaluate(student(text), root / "alone")
    return root


@pytest.fixture(scope="module")
def distilled(text, runs):
    """A student with every term."""
    cfg = student(text, model__layers=2, distill__teachers=str(runs / "teacher-0"), **EVERYTHING)
    loop.train_and_evaluate(cfg, runs / "distilled")
    return cfg, runs / "distilled"


def test_resuming_is_bit_identical(distilled, tmp_path, monkeypatch):
    cfg, straight = distilled
    with monkeypatch.context() as patch:
        patch.setattr(signals, "agreed", StopAfter(4))
        with pytest.raises(Interrupted):
            loop.train_and_evaluate(cfg, tmp_path)
    loop.train_and_evaluate(cfg, tmp_path)
    for a, b in zip(final_state(straight), final_state(tmp_path), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(rows(straight), rows(tmp_path), strict=True):
        for name in a:
            assert name.startswith("perf/") or a[name] == b[name], name


def test_terms_that_compare_rows_keep_their_micro_batches(distilled):
    cfg, workdir = distilled
    longer = config.replace(cfg, train__steps="12", data__micro_batch=4)
    with pytest.raises(ConfigError, match=r"another config \(config\.data\.micro_batch: 2 -> 4\)"):
        loop.train_and_evaluate(longer, workdir)


def test_projections_that_an_older_version_saved_are_refused_in_one_sentence(distilled, tmp_path):
    cfg, straight = distilled
    shutil.copytree(straight, tmp_path / "run")
    (manifest,) = (tmp_path / "run" / "checkpoints").glob("8/manifest/metadata")
    kept = json.loads(manifest.read_text())
    for name in ("version", "checksums", "seal"):
        del kept[name]
    manifest.write_text(json.dumps(kept))
    with pytest.raises(ConfigError, match=r"saved by lm_jax 0\.2, and this version cannot go on"):
        loop.train_and_evaluate(cfg, tmp_path / "run")


def test_another_teacher_on_resuming_is_refused(text, runs, tmp_path, monkeypatch):
    teacher = tmp_path / "teacher"
    shutil.copytree(runs / "teacher-0", teacher)
    cfg = student(text, distill__teachers=str(teacher))
    with monkeypatch.context() as patch:
        patch.setattr(signals, "agreed", StopAfter(4))
        with pytest.raises(Interrupted):
            loop.train_and_evaluate(cfg, tmp_path / "run")
    shutil.rmtree(teacher)
    shutil.copytree(runs / "teacher-1", teacher)
    with pytest.raises(ConfigError, match=r"teacher.json: .* learned from another teacher"):
        loop.train_and_evaluate(cfg, tmp_path / "run")


def test_a_distilled_run_is_a_run(distilled, runs):
    _, workdir = distilled
    run = open_trained(workdir)
    assert set(run.params) == set(open_trained(runs / "alone").params)
    logged = [row for row in rows(workdir) if "train/loss" in row]
    for row in logged:
        assert row["distill/lm_ce"] == pytest.approx(row["train/loss"], rel=1e-6)
        weighted = sum(x for name, x in row.items() if name.startswith("distill/weighted/"))
        assert weighted == pytest.approx(row["distill/objective"], rel=1e-5)
    # What is evaluated is the plain loss of next tokens, whatever the weights.
    result = json.loads((workdir / "eval_valid.json").read_text())
    assert not any(name.startswith("distill") for name in result)


def test_the_report(text, runs, tmp_path):
    names = [str(runs / f"teacher-{seed}") for seed in (0, 1)]
    cfg = student(text, distill__teachers=",".join(names), distill__alone=str(runs / "alone"))
    loop.train_and_evaluate(cfg, tmp_path)
    scores = json.loads((tmp_path / "distillation.json").read_text())
    mean = scores["taught_by"]
    taught = [f"teacher {name}" for name in names]
    assert list(scores["models"]) == ["distilled", "alone", *taught, mean]
    folders = {"distilled": tmp_path, "alone": runs / "alone"}
    folders |= {f"teacher {name}": pathlib.Path(name) for name in names}
    for name, folder in folders.items():
        recorded = json.loads((folder / "eval_test.json").read_text())
        for value in ("bits_per_byte", "word_ppl", "loss"):
            assert scores["models"][name][value] == pytest.approx(recorded[value], rel=1e-5)
    itself = scores["models"][mean]
    assert itself["agreement"] == 1 and abs(itself["kl"]) < 1e-6
    # A mean of probabilities is never worse than the mean of the losses.
    each = [scores["models"][name] for name in taught]
    assert itself["loss"] < np.mean([row["loss"] for row in each])
    assert itself["parameters"] == sum(row["parameters"] for row in each)
    assert all(row["kl"] > 1e-4 and row["agreement"] < 1 for row in each)


def test_the_divergence_of_the_report_is_from_the_teacher(text, runs):
    """KL(teacher || model), by definition."""
    name = str(runs / "teacher-0")
    cfg = student(text, distill__teachers=name)
    store = open_data(rules.validate(cfg))
    cfg = resolve(cfg, windows=50)
    models = [open_trained(runs / folder) for folder in ("alone", "teacher-0")]
    scored = {
        folder: teachers.Teacher((folder,), (run.graphdef,), (run.params,))
        for folder, run in zip(("alone", name), models, strict=True)
    }
    found = scores.score_models(cfg, store, "valid", scored, name)["alone"]["kl"]

    def logits(run, b):
        model = nnx.merge(run.graphdef, run.params)
        return model.logits(model(b.inputs, b.segment_ids, b.positions))

    total = count = 0.0
    for batch in windows.eval_batches(
        store.split("valid"), seq_len=32, batch_size=8, document_mask=True, stride=32
    ):
        b = losses.shift(jax.tree.map(jax.numpy.asarray, batch))
        log_q, log_p = (log_softmax(np.float64(logits(run, b)), -1) for run in models)
        total += float((b.weights * (np.exp(log_p) * (log_p - log_q)).sum(-1)).sum())
        count += float(b.weights.sum())
    assert found == pytest.approx(total / count, rel=1e-4)


@pytest.mark.parametrize("document_mask", [True, False])
def test_a_teacher_reads_documents_as_the_student_does(text, runs, document_mask):
    """However it was trained."""
    cfg = student(
        text, distill__teachers=str(runs / "teacher-0"), data__document_mask=document_mask
    )
    store = open_data(rules.validate(cfg))
    cfg = resolve(cfg, windows=50)
    teacher = open_teacher(cfg, store)
    batch = windows.Windows(store.split("train"), 32, document_mask).batch(np.arange(40))
    separators = batch["tokens"] == store.tokenizer.separator
    row = int(np.argmax(separators[:, 5:25].any(1)))
    begins = 5 + int(np.argmax(separators[row, 5:25]))
    tokens = batch["tokens"][row : row + 1]
    batch = {name: x[row : row + 1] for name, x in batch.items()}
    changed = tokens.copy()
    changed[0, 1:begins] = tokens[0, 1:begins] % (store.tokenizer.vocab_size - 1) + 1

    def states(tokens):
        b = losses.shift(jax.tree.map(jax.numpy.asarray, batch | {"tokens": tokens}))
        read = teacher.read(teacher.params, batch, b, jax.numpy.float32, inside=False)
        return np.asarray(read.members[0].x_BTE[0, begins:])

    assert (states(tokens) == states(changed)).all() == document_mask


@pytest.fixture(scope="module")
def kept(text, runs):
    """A cache of the first teacher."""
    make_cache = load_module(ROOT / "scripts" / "cache_teacher.py").make_cache
    cfg = student(text, distill__teachers=str(runs / "teacher-0"), **CACHED)
    count = make_cache(cfg, runs / "cache")
    assert count == np.load(runs / "cache" / cache.HASHES).size
    with pytest.raises(FileExistsError, match="holds a cache already"):
        make_cache(cfg, runs / "cache")
    return runs / "cache"


def test_a_cache_teaches_as_its_teacher_does(text, runs, kept, tmp_path):
    live = student(text, distill__teachers=str(runs / "teacher-0"), **CACHED)
    from_disk = student(text, distill__cache=str(kept), **CACHED, seed=0)
    report = examine_distillation_of(from_disk)
    assert not report.failed
    for name in ("teacher_eval", "information", "teacher_fixed"):
        assert report[f"distill.{name}"].status == "pass", report[f"distill.{name}"]
    found = []
    for name, cfg in (("live", live), ("disk", from_disk)):
        loop.train_and_evaluate(cfg, tmp_path / name)
        found.append([r["distill/kd_kl"] for r in rows(tmp_path / name) if "train/loss" in r])
    np.testing.assert_allclose(*found, rtol=1e-4)
    assert min(found[0]) > 0.01


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(tokenizer__kind="byte"), "tokenizer_hash"),
        (dict(data__valid_fraction=0.3), "train_sha256"),
        (dict(data__seq_len=16), "seq_len"),
        (dict(data__document_mask=False), "document_mask"),
        (dict(distill__top_k=4), "top_k"),
        (dict(distill__temperature="3"), "temperature"),
    ],
)
def test_a_cache_of_something_else_is_refused(text, kept, changes, said):
    cfg = student(text, distill__cache=str(kept), **CACHED | changes)
    store = open_data(cfg)
    with pytest.raises(ConfigError, match=f"config.distill.cache: .* was made for {said}"):
        open_teacher(cfg, store)


def test_a_window_that_is_not_in_the_cache(text, kept):
    cfg = student(text, distill__cache=str(kept), **CACHED)
    extend, _ = cache.open_cache(cfg, open_data(cfg))
    tokens = np.ones((1, 2, 33), np.int32)
    with pytest.raises(ConfigError, match="lacks a window of this run"):
        extend({"tokens": tokens, "segment_ids": tokens})


def test_an_unfinished_cache_is_none(text, kept, tmp_path):
    shutil.copytree(kept, tmp_path / "cache")
    (tmp_path / "cache" / cache.MANIFEST).unlink()
    cfg = student(text, distill__cache=str(tmp_path / "cache"), **CACHED)
    with pytest.raises(ConfigError, match="holds no finished cache"):
        cache.open_cache(cfg, open_data(cfg))


def test_a_teacher_of_another_tokenizer_is_refused(text, runs, tmp_path):
    cfg = student(text, distill__teachers=str(runs / "teacher-0"), tokenizer__kind="byte")
    with pytest.raises(ConfigError, match="config.distill.teachers: .* another tokenizer"):
        loop.train_and_evaluate(cfg, tmp_path)


def test_a_teacher_that_is_not_there(text, tmp_path):
    cfg = student(text, distill__teachers=str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="config.distill.teachers: .*no such file"):
        loop.train_and_evaluate(cfg, tmp_path / "run")


def test_a_teacher_must_have_the_loss_on_its_record(text, runs, tmp_path):
    other = tmp_path / "teacher"
    shutil.copytree(runs / "teacher-0", other)
    record = json.loads((other / "eval_valid.json").read_text())
    record["loss"] *= 1.01
    (other / "eval_valid.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=r"eval_valid.json says .*; restore the run"):
        loop.train_and_evaluate(student(text, distill__teachers=str(other)), tmp_path / "run")


def test_a_teacher_is_scored_in_the_students_windows(text, runs, tmp_path):
    """As well as in its own, where its record was made."""
    cfg = student(text, distill__teachers=str(runs / "teacher-0"), data__seq_len=8)
    store = open_data(rules.validate(cfg))
    cfg = resolve(cfg, windows=50)
    (line,) = verify(open_teacher(cfg, store), cfg, store)
    recorded = json.loads((runs / "teacher-0" / "eval_valid.json").read_text())["loss"]
    assert f"on its record {recorded:.4f}, found {recorded:.4f}, here in the student's" in line
    here = float(line.split("valid loss ")[1].split()[0])
    assert abs(here - recorded) > 1e-3


def test_a_teacher_of_other_text_is_refused(text, runs, tmp_path):
    """It knows its own text, and nothing of the student's, whose letters are shuffled."""
    other = tmp_path / "text"
    other.mkdir()
    rng = np.random.default_rng(0)
    for path in sorted(text.glob("*.txt")):
        (other / path.name).write_text("".join(rng.permutation(list(path.read_text()))) + "x\n")
    cfg = student(other, distill__teachers=str(runs / "teacher-0"), tokenizer__kind="byte")
    store = open_data(rules.validate(cfg))
    teacher_cfg = small(text, tokenizer__kind="byte", optim__peak_lr=1e-2, train__steps="40")
    loop.train_and_evaluate(teacher_cfg, tmp_path / "teacher")
    cfg = config.replace(cfg, distill__teachers=str(tmp_path / "teacher"))
    cfg = resolve(cfg, windows=50)
    with pytest.raises(ConfigError, match="train it first, on such text"):
        verify(open_teacher(cfg, store), cfg, store)


def test_a_teacher_that_knows_nothing_is_refused(text, tmp_path):
    cfg = student(text, train__steps="1", optim__warmup="0", optim__peak_lr=1e-9)
    loop.train_and_evaluate(cfg, tmp_path / "teacher")
    cfg = student(text, distill__teachers=str(tmp_path / "teacher"))
    with pytest.raises(ConfigError, match="no better than the .* of the frequencies"):
        loop.train_and_evaluate(cfg, tmp_path / "run")


@pytest.mark.long
def test_the_preflight_is_in_order(distilled, text, runs):
    cfg = config.replace(distilled[0], doctor="fast", data__batch_size=32, data__micro_batch=16)
    scores = examine_config(cfg, level="fast")
    found = {f.check: f.status for f in scores if f.check.startswith("distill.")}
    assert set(found.values()) <= {"pass", "skip"}, scores
    assert [name for name, status in found.items() if status == "skip"] == ["distill.subset"]


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_preflight_is_in_order_with_16_bits(text, runs, dtype):
    cfg = student(
        text,
        distill__teachers=str(runs / "teacher-0"),
        distill__kind="jsd",
        data__batch_size=32,
        data__micro_batch=16,
        train__compute_dtype=dtype,
    )
    scores = examine_distillation_of(cfg)
    assert {f.status for f in scores} <= {"pass", "skip"}, scores


@pytest.mark.long
def test_the_preflight_sees_a_gradient_of_the_teacher_by_any_term(text, runs, monkeypatch):
    monkeypatch.setattr(jax.lax, "stop_gradient", lambda x: x)
    cfg = student(text, distill__teachers=str(runs / "teacher-0"), distill__feature="0.1")
    scores = examine_distillation_of(cfg)
    assert "distill.teacher_gradient" in scores.failed, scores["distill.teacher_gradient"].evidence


def test_the_preflight_sees_targets_that_are_not_the_teachers(text, runs, monkeypatch):
    read = teachers.Teacher.read

    def late(self, params, batch, b, dtype, *, inside):
        reading = read(self, params, batch, b, dtype, inside=inside)
        shifted = [m._replace(x_BTE=jax.numpy.roll(m.x_BTE, 1, 1)) for m in reading.members]
        return reading._replace(members=shifted)

    monkeypatch.setattr(teachers.Teacher, "read", late)
    cfg = student(text, distill__teachers=str(runs / "teacher-0"))
    assert "distill.alignment" in examine_distillation_of(cfg).failed
