"""The harness: its rows against evaluation and decoding, and lm_eval where it is installed."""

import importlib.util
import json

import numpy as np
import pytest
import yaml

from lm_jax import generate
from lm_jax.harness import command
from lm_jax.harness.scoring import Scorer, rows_of
from lm_jax.loop import train_and_evaluate
from lm_jax.pretrained import open_model
from tests.helpers import small
from tests.hugging_face import LONGEST, save_pretrained

T = 64


@pytest.fixture(scope="module")
def workdir(text, tmp_path_factory):
    """A run whose documents are lines, most of which lie in one window."""
    folder = tmp_path_factory.mktemp("harness") / "run"
    cfg = small(text, data__document="line", data__seq_len=T, eval__splits="test")
    train_and_evaluate(cfg, str(folder))
    return folder


@pytest.fixture(scope="module")
def run(workdir):
    return open_model(workdir)


def test_rows_score_each_id_once_with_all_the_context_there_is_room_for():
    for window in range(1, 7):
        for before in range(1, 9):
            for count in range(20):
                text = list(range(before + count))
                rows = rows_of(text[:before], text[before:], window)
                scored = [i for row in rows for i in row.ids[len(row.ids) - row.scored :]]
                assert scored == text[before:]
                for row in rows:
                    assert row.ids == text[row.ids[0] : row.ids[-1] + 1]
                    assert len(row.ids) == min(window, row.ids[-1]) + 1
                assert all(row.scored == window for row in rows[:-1])


def test_a_document_has_the_nats_of_evaluation(run, workdir):
    with np.load(workdir / "documents_test.npz") as arrays:
        expected = arrays["nats"]
    split = run.store.split("test")
    texts = np.split(np.asarray(split.tokens), split.document_starts[1:-1])
    ends = np.cumsum([len(text) + 1 for text in texts])  # in the stream with separators
    whole = [n for n, end in enumerate(ends) if (end - 1 - len(texts[n])) // T == (end - 2) // T]
    assert len(whole) > 30
    found = Scorer(run)([([split.separator], texts[n].tolist()) for n in whole])
    np.testing.assert_allclose([-one.log_prob for one in found], expected[whole], rtol=1e-5)


def test_what_decoding_would_say_is_greedy(run):
    prompts = ["ba", "du kilo mefa no pi roso tu ba du kilo mefa"]
    made = generate.generate(run, prompts, tokens=9, temperature=0)
    encode, separator = run.tokenizer.encode, run.tokenizer.separator
    requests = [([separator, *encode(one.prompt).tolist()], one.ids) for one in made]
    requests += [(context, [*ids[:-1], ids[-1] % 5 + 1]) for context, ids in requests]
    found = Scorer(run)(requests)
    assert [one.greedy for one in found] == [True, True, False, False]
    sums = [sum(one.log_probs) for one in made]
    np.testing.assert_allclose([one.log_prob for one in found[:2]], sums, rtol=1e-5)


def test_one_width_is_compiled_once(run):
    scorer = Scorer(run)
    few = [([0], [1] * count) for count in (1, 7, 32, 5)]
    assert all(np.isfinite([one.log_prob for one in scorer(few)]))
    assert list(scorer._steps) == [32]
    scorer([([0] * 40, [1, 2]), ([0], [1] * 200)])
    assert sorted(scorer._steps) == [32, 64] and scorer._steps[32]._cache_size() == 1


def test_without_the_package_one_sentence_says_how_to_get_it(workdir, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SystemExit) as stopped:
        command.main(["harness", str(workdir), "--tasks=a"])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install 'lm_jax[eval]'" in line


# --- with lm_eval --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lm_eval():
    return pytest.importorskip("lm_eval", reason="lm_eval is not installed")


def save_task(folder, name, documents, **fields):
    folder.mkdir(exist_ok=True)
    lines = "".join(json.dumps(document) + "\n" for document in documents)
    (folder / f"{name}.jsonl").write_text(lines)
    own = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
        "test_split": "test",
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(own | fields))


@pytest.mark.filterwarnings("ignore")
def test_the_command_runs_tasks_of_a_folder(lm_eval, run, workdir, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    questions = [{"q": "ba du", "choices": [" kilo", " no pi"], "gold": n} for n in (0, 1, 1)]
    save_task(
        tmp_path / "tasks",
        "choose",
        questions,
        output_type="multiple_choice",
        doc_to_text="{{q}}",
        doc_to_choice="choices",
        doc_to_target="gold",
        metric_list=[{"metric": "acc"}],
    )
    texts = ["ba du", "kilo mefa no pi roso tu " * 6]
    save_task(
        tmp_path / "tasks",
        "perplexity",
        [{"text": text} for text in texts],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    )
    flags = [f"--include_path={tmp_path / 'tasks'}", f"--out={tmp_path / 'out.json'}"]
    command.main(["harness", str(workdir), "--tasks=choose,perplexity", *flags])
    assert "|perplexity|" in capsys.readouterr().out
    results = json.loads((tmp_path / "out.json").read_text())
    scorer, separator = Scorer(run), run.tokenizer.separator
    found = scorer([([separator], run.tokenizer.encode(text).tolist()) for text in texts])
    bits = -sum(one.log_prob for one in found) / np.log(2) / sum(map(len, texts))
    assert results["results"]["perplexity"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-6)
    context = [separator, *run.tokenizer.encode("ba du").tolist()]
    choices = [run.tokenizer.encode(choice).tolist() for choice in questions[0]["choices"]]
    first, second = (one.log_prob for one in scorer([(context, ids) for ids in choices]))
    accuracy = np.mean([(second > first) == one["gold"] for one in questions])
    assert results["results"]["choose"]["acc,none"] == pytest.approx(accuracy)
    assert results["config"]["step"] == run.step


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_task_that_does_not_exist(lm_eval, workdir, capsys):
    """The tasks of lm_eval are listed to find its neighbour."""
    with pytest.raises(SystemExit) as stopped:
        command.main(["harness", str(workdir), "--tasks=hellaswagg"])
    assert stopped.value.code == 2
    said = "--tasks=hellaswagg: there is no such task; did you mean hellaswag?"
    assert capsys.readouterr().err.splitlines()[-1] == said


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_scores_as_the_hf_model_of_lm_eval(lm_eval, tmp_path):
    for name in ("torch", "accelerate"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from lm_jax.harness.model import RunLM

    folder = str(save_pretrained(tmp_path)["llama"])
    others = dict(device="cpu", dtype="float32", batch_size=4)
    for opens in (False, True):
        hf = HFLM(pretrained=folder, add_bos_token=opens, **others)
        own = RunLM(folder, add_bos_token=opens)
        pairs = [("low lower ", "newest"), ("", "the end"), ("low new " * 40, "er lower")]
        asked = [Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(pairs)]
        expected = np.array(hf.loglikelihood(asked))
        np.testing.assert_allclose(own.loglikelihood(asked), expected, rtol=1e-4)
        options = {"until": ["e"], "max_gen_toks": 12}
        asked = [Instance("generate_until", {}, (text, options), 0) for text, _ in pairs if text]
        assert own.generate_until(asked) == hf.generate_until(asked)
    # With its token before a text, `hf` scores that token too.
    hf, own = HFLM(pretrained=folder, add_bos_token=False, **others), RunLM(folder)
    texts = ["low", "low new " * (LONGEST - 3)]
    asked = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
    expected = hf.loglikelihood_rolling(asked)
    np.testing.assert_allclose(own.loglikelihood_rolling(asked), expected, rtol=1e-4)
