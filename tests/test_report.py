"""The page of a run: what it says, that it needs nothing else, and how it lies on a screen."""

import html
import itertools
import json
import re
import shutil
import subprocess
import time
import tracemalloc

import numpy as np
import pytest

from lm_jax import report
from lm_jax.compare.compare import compare_runs
from lm_jax.config import ConfigError
from lm_jax.history import Log
from lm_jax.loop import train_and_evaluate
from lm_jax.report import write  # before conftest puts it out of action
from tests.helpers import Page, small, words

_NO_STATE = shutil.ignore_patterns("checkpoints", "best")
FAILED = {
    "check": "log.spikes",
    "status": "fail",
    "evidence": "7 > 6.",
    "remedy": "Lower the <LR>.",
}


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    """A run with a page, and what that page said at its evaluations."""
    folder, pages = tmp_path_factory.mktemp("runs") / "tiny-0", []

    def noted(*arguments):
        pages.append(write(*arguments).read_text())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write", noted)
        cfg = small(text, train__layer_norms=True, train__profile="4:5")
        train_and_evaluate(cfg, folder)
    return folder, pages


@pytest.fixture
def run(trained, tmp_path):
    """A copy, to write into."""
    return shutil.copytree(
        trained[0], tmp_path / "tiny-0", ignore=lambda *_: ["checkpoints", "best"]
    )


def test_the_page_follows_the_run(trained):
    midway, at_end, finished = trained[1]
    assert "Update 6 of 12" in words(midway) and 'http-equiv="refresh"' in midway
    assert "Time left" in words(midway) and "Kneser-Ney bigram" in midway
    assert "Finished after 12 updates" in words(at_end)
    assert "Finished after 12 updates" in words(finished) and 'http-equiv="refresh"' not in finished
    assert len(Page(midway).legends) == len(Page(finished).legends) == 5
    assert "valid: " in words(finished) and "test: " in words(finished)  # of eval_<split>.json


def test_the_page_holds_what_the_files_say(trained):
    folder, (*_, source) = trained
    said, result = words(source), json.loads((folder / "eval_test.json").read_text())
    assert f"{result['loss']:.4f}" in said and f"{result['token_ppl']:,.2f}" in said
    for name in ("uniform", "unigram", "Kneser-Ney bigram", "Kneser-Ney trigram", "this model"):
        assert name in said
    names = [name for legend in Page(source).legends for name in legend]
    assert {"train", "valid", "reference lines", "gradient norm", "clip threshold"} <= set(names)
    assert {"learning rate", "tokens per second", "blocks/0", "embedding"} <= set(names)
    assert "of all updates were clipped." in said and "waiting for data" in said
    assert "model.d_model 16 128" in " ".join(said.split())  # value and default


def test_findings_and_samples_are_shown_as_they_are(run):
    passed = [{"check": f"c{i}", "status": "pass", "evidence": "", "remedy": ""} for i in range(3)]
    (run / "doctor.json").write_text(json.dumps({"findings": passed}))
    (run / "watch.json").write_text(json.dumps({"findings": [*passed, FAILED]}))
    rows = [{"step": 12, "prompt": f"p{i} ", "text": f"<script>{i}</script>"} for i in range(7)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (run / "samples.jsonl").write_text('{"step": 1, "te' + lines)  # a kill, then 7 samples
    said = words(write(run).read_text())
    assert "Before the run: all 3 checks passed." in said
    assert "fail: log.spikes" in said and "7 > 6." in said and "Lower the <LR>." in said
    assert "3 other checks passed." in said
    assert "p6  <script>6</script>" in said and said.index("p6") < said.index("p5")
    assert "p1 " not in said  # the newest five


def test_a_broken_row_stops_nothing(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "train/lo{"step": 13, "train/loss": 9.9}\n')
        file.write('{"step": null, "train/loss": 3}\n{"step": 14, "train/loss": "3"}\n[1]\n7\n')
        file.write('{"step": 12, "train/loss": null, "optim/grad_norm": null}\n')
        file.write('{"step": 12, "valid/loss": null}\n{"step": 12, "train/l')
    assert "Finished after" in words(write(run).read_text())
    (run / "metrics.jsonl").write_text("")
    for path in run.glob("eval_*.json"):
        path.unlink()
    bare = write(run).read_text()
    assert "Update 0 of 12" in words(bare) and not Page(bare).legends


def test_a_single_update_is_a_point_and_a_diverged_loss_leaves_the_figure(run):
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    (run / "metrics.jsonl").write_text(json.dumps(first) + "\n")
    assert "<span>●</span></i>train</li>" in write(run).read_text()
    worse = {"step": 2, "train/loss": 1e30}
    (run / "metrics.jsonl").write_text(json.dumps(first) + "\n" + json.dumps(worse) + "\n")
    source = write(run).read_text()
    assert "train ends at 1000000000" in source and "1e30" not in words(source)


def logged(count, *, every=100):
    """Rows as a run writes them, with a spike, a skipped update, evaluations and a resume."""
    rng = np.random.default_rng(0)
    for step in range(1, count + 1):
        row = {"step": step, "train/loss": 3 + rng.normal(), "optim/skipped_updates": 0.0}
        row |= {"optim/clip_rate": float(step % 3 == 0), "perf/step_ms": 2.0}
        row |= {"grad_norm/blocks/1/up/kernel": 3.0, "grad_norm/blocks/1/down/kernel": 4.0}
        if step == count // 2:
            row |= {"train/loss": 99.0, "optim/skipped_updates": 1.0, "resumed": step - 1}
        yield row
        if step % every == 0:
            yield {"step": step, "valid/loss": 2.5}


def write_rows(folder, rows):
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def test_few_updates_are_drawn_as_they_are(tmp_path):
    rows = list(logged(300))
    write_rows(tmp_path, rows)
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    found = Log(tmp_path).read().course("train/loss", 300)
    for values in found[1:]:
        assert list(values) == losses
    assert list(found.steps) == list(range(1, 301))


def test_a_number_that_no_float_holds_is_left_out(tmp_path):
    losses = [3.0, 10**400, 2.0]
    write_rows(tmp_path, [{"step": n, "train/loss": loss} for n, loss in enumerate(losses, 1)])
    assert list(Log(tmp_path).read().course("train/loss", 9).mean) == [3.0, 2.0]


def test_of_many_updates_nothing_is_lost_that_a_page_shows(tmp_path):
    rows = list(logged(20_000))
    write_rows(tmp_path, rows)
    train = [row for row in rows if "train/loss" in row]
    losses = np.array([row["train/loss"] for row in train])
    log = Log(tmp_path).read()
    found = log.course("train/loss", 300)
    assert 150 <= len(found.steps) <= 300 and (np.diff(found.steps) > 0).all()
    assert found.high.max() == 99 and found.low.min() == losses.min()
    assert found.high[(found.steps < 9_800) | (found.steps > 10_200)].max() < 10
    whole = log.course("train/loss", 1)
    assert np.isclose(whole.mean[0], losses.mean()) and np.isclose(whole.steps[0], 10_000.5)
    assert log.total("optim/skipped_updates") == 1 and log.total("perf/step_ms") == 40_000
    assert log.course("optim/clip_rate", 1).mean[0] == 6666 / 20_000
    assert [*log.layers(9)] == ["blocks/1"] and (log.layers(9)["blocks/1"].mean == 5).all()
    assert log.done == 20_000 and len(log.events) == 201
    assert [row["resumed"] for row in log.events if "resumed" in row] == [9_999]


def test_a_log_is_read_on_and_keeps_little(tmp_path):
    """In parts of any length it holds what it holds when it is read at once."""
    rows, pieces = list(logged(6_000)), np.random.default_rng(1).integers(1, 900, 40).cumsum()
    log = Log(tmp_path)
    tracemalloc.start()
    for begin, end in itertools.pairwise([0, *pieces]):
        write_rows(tmp_path, rows[begin:end])
        log.read()
    grown = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert grown < 800_000 and log.done == 6_000
    at_once = Log(tmp_path).read()
    ways = [
        lambda log, most, name=name: log.course(name, most) for name in ("train/loss", "valid/loss")
    ]
    for course in (*ways, lambda log, most: log.layers(most)["blocks/1"]):
        found, other = course(log, 300), course(at_once, 300)
        assert len(found.steps) == len(other.steps)
        assert found.high.max() == other.high.max() and found.low.min() == other.low.min()
        assert np.allclose(course(log, 1), course(at_once, 1))
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b"?" * file.stat().st_size + b'{"step": 6001, "train/loss": 1.0}\n')
    assert log.read().done == 6_001  # what was read is not read again


def test_the_command_says_where_the_page_is(run, monkeypatch, capsys):
    monkeypatch.setattr(report, "write", write)
    (run / "report.html").unlink()
    report.main(["report", f"--workdir={run}"])
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    assert "Finished after 12 updates" in words((run / "report.html").read_text())


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="give the workdir of a run"):
        write(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="not as a run writes it"):
        write(tmp_path)


@pytest.fixture
def long(run):
    """A run of 4,000 updates with 40 evaluations and a sample that does not break."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    update, evaluation = rows[0], rows[-1]
    record = json.loads((run / "config.json").read_text())
    record["config"]["train"]["steps"] = "4000"
    (run / "config.json").write_text(json.dumps(record))
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(1, 4001):
            loss = {"train/loss": 2 + 3 / step + 0.1 * (step % 7)}
            file.write(json.dumps(update | loss | {"step": step}) + "\n")
            if step % 100 == 0:
                loss = {"valid/loss": 2 + 4 / step}
                file.write(json.dumps(evaluation | loss | {"step": step}) + "\n")
    (run / "samples.jsonl").write_text(json.dumps({"text": "x" * 500}) + "\n")
    (run / "watch.json").write_text(json.dumps({"findings": [FAILED]}))
    return run


def test_a_long_run_has_a_quick_and_small_page(long):
    began = time.process_time()
    path = write(long)
    assert time.process_time() - began < 1.5
    assert path.stat().st_size < 1_000_000
    said = words(path.read_text())
    assert "4,000 (best)" in said and "32 older" in said


_DRIVER = """<body><script>
addEventListener("load", () => {
  const seen = [...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument, root = page.documentElement;
    const style = getComputedStyle(page.body);
    return [frame.width, root.scrollWidth, style.backgroundColor, style.color];
  });
  document.body.innerHTML = "<pre>" + JSON.stringify(seen) + "</pre>";
});
</script>FRAMES</body>"""


def test_pages_fit_the_screen_in_both_themes(trained, long, tmp_path):
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not on PATH")
    arms = [trained[0]]
    for name in ("b-0", "a-long-name-of-an-arm-" * 3 + "0"):
        arms.append(shutil.copytree(trained[0], tmp_path / name, ignore=_NO_STATE))
    frames = "".join(
        f'<iframe width="{width}" height="2000" srcdoc="{html.escape(page)}"></iframe>'
        for page in (write(long).read_text(), compare_runs(arms).html())
        for width in (360, 1280)
    )
    driver = tmp_path / "driver.html"
    driver.write_text(_DRIVER.replace("FRAMES", frames))
    backgrounds = []
    for theme in (0, 1):  # dark, light
        options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/u"]
        options += [f"--blink-settings=preferredColorScheme={theme}", "--dump-dom"]
        dumped = subprocess.run(
            [chromium, *options, f"file://{driver}"], capture_output=True, text=True, timeout=60
        ).stdout
        seen = json.loads(re.search(r"<pre>(.*)</pre>", dumped)[1])
        assert len(seen) == 4
        for width, content, background, ink in seen:
            assert content <= int(width), seen
            assert background != ink
        backgrounds.append({background for _, _, background, _ in seen})
    assert len(backgrounds[0]) == len(backgrounds[1]) == 1 and backgrounds[0] != backgrounds[1]


def test_the_profile_has_its_updates(trained):
    (trace,) = (trained[0] / "profile").glob("plugins/profile/*/*.xplane.pb")
    assert trace.stat().st_size > 1000
