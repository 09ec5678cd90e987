"""The report of a GPU runs on a CPU, at toy sizes, and keeps what a killed part has measured."""

import argparse
import json
import os
import queue
import random
import subprocess
import sys
import time

import pytest

from tests.helpers import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
PARTS = "info correct steps attention loss train".split()
SECTIONS = "Device Correctness Steps Attention Training".split()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """WikiText's files, in small."""
    folder = tmp_path_factory.mktemp("wikitext")
    draw = random.Random(0)
    words = ["".join(draw.choices("aeinorst", k=draw.randint(2, 9))) for _ in range(2000)]
    for split, articles in (("train", 60), ("valid", 5), ("test", 5)):
        lines = ""
        for i in range(articles):
            lines += f" \n = Title {i} = \n \n"
            lines += "".join(f" {' '.join(draw.choices(words, k=30))} . \n" for _ in range(10))
        (folder / f"wiki.{split}.tokens").write_text(lines)
    return folder


def report(out, *args):
    """Exit code, rows and table of a run."""
    command = [sys.executable, ROOT / "scripts" / "gpu_report.py", f"--out={out}", *args]
    code = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}).returncode
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return code, rows, (out / "report.md").read_text()


@pytest.mark.slow
@pytest.mark.long
def test_all_parts_run(tmp_path, corpus):
    folders = (f"--source_dir={corpus}", f"--cache_dir={tmp_path / 'cache'}")
    code, rows, table = report(tmp_path / "out", "--minutes=6", *folders)
    assert code == 0, (tmp_path / "out" / "log.txt").read_text()[-3000:]
    assert {row["part"] for row in rows} == {*PARTS, "end"}
    right = {(row["case"], row["impl"]) for row in rows if row.get("ok")}
    assert {("attention documents", "blockwise"), ("update 124M toy", "auto")} <= right
    assert {"xla", "blockwise", "fused", "auto"} == {impl for _, impl in right}
    assert any(row.get("step_ms", {}).get("lm_jax x8") for row in rows)
    scored = {row["split"]: row for row in rows if "split" in row}
    assert scored["test"]["token_count"] > 0 and scored["valid"]["word_ppl"] > 1
    assert len([row for row in rows if "valid_at" in row]) == 6
    for title in SECTIONS:
        assert f"### {title}" in table
    for absent in ("cudnn", "pallas", "flash_attn3", "torch flash"):
        assert any(absent in line for line in table.splitlines() if "not run" in line), absent
    assert len(list((tmp_path / "out").iterdir())) <= 8


@pytest.mark.slow
@pytest.mark.long
def test_killed_part_leaves_its_figures(tmp_path):
    code, rows, table = report(tmp_path, "--minutes=0.25", "--parts=correct")
    assert code == 1
    assert any(row.get("ok") or "refused" in row for row in rows)  # some were there in time
    assert [row["of"] for row in rows if row.get("killed")] == ["correct"]
    assert "correct was ended at its limit" in table and "| cudnn | 0 | 0 |" in table
    planned = {(row["case"], row["impl"]) for row in rows if "not_run" in row}
    assert ("attention large", "pallas") in planned  # it counts though it was never begun
    # The table can be made again from what is there, and what failed fails again.
    assert report(tmp_path, "--parts=table") == (1, rows, table)


def test_wrong_implementation_is_left_out(tmp_path):
    import gpu_report
    import gpu_table

    found = dict(part="correct", error={"out": 1.0}, limit={"out": 0.1})
    rows = [
        dict(part="info", case="17M", peer="lm_jax", attention="cudnn", reason="measured"),
        dict(found, case="attention plain", impl="xla", ok=False),
        dict(found, case="attention plain", impl="blockwise", ok=True),
        dict(part="correct", case="attention long", impl="pallas", running=True),
    ]
    assert set(gpu_table.left_out(rows)) == {"xla", "pallas"}
    without = gpu_report.step_peers_without(rows, ["pallas", "xla"])
    assert {"lm_jax xla", "lm_jax pallas plain", "lm_jax cudnn"} <= set(without)
    text, fine = gpu_table.report(rows)
    assert not fine
    assert "WRONG: xla, attention plain" in text
    assert "pallas was left out of the parts after `correct`: did not come back" in text
    # A row that is not finished, as a kill leaves it, is passed over.
    (tmp_path / "rows").write_text("\n".join(map(json.dumps, rows)) + '\n{"part": "co')
    assert gpu_table.read(tmp_path / "rows") == rows


def test_table_of_what_was_not_measured():
    import gpu_table

    def steps(case, peer, **row):
        return dict(part="steps", case=case, peer=peer, **row)

    def ready(case, peer):
        kept = dict(tokens=64, attention=None, peak_bytes=None, compile_seconds=1.0)
        return [steps(case, peer, **kept), steps(case, peer, differs=0.0, agrees=True)]

    def turn(case, **step_ms):
        return dict(part="steps", case=case, turn=0, step_ms=step_ms)

    checks = [("a", "ok"), ("a", "not_run"), ("b", "not_run"), ("c", "not_run"), ("c", "ok")]
    rows = [
        *(dict(part="correct", impl="xla", case=f"attention {c}", **{k: True}) for c, k in checks),
        steps("17M", "lm_jax", not_run="not ready after 9 s"),
        steps("17M", "torch flash", not_run="not ready after 9 s"),
        steps("124M", "torch flash", not_run="not ready after 8 s"),
        *ready("124M", "lm_jax"),
        turn("124M", lm_jax=2.0),
        *ready("124M", "torch flash"),  # of another session
        turn("124M", **{"torch flash": 4.0}),
        *ready("17M variants", "lm_jax"),
        *ready("17M variants", "lm_jax x8"),
        turn("17M variants", **{"lm_jax": 4.0, "lm_jax x8": 2.0}),
    ]
    text = gpu_table.report(rows)[0]
    assert "| xla | 2 | 0 | 0 | 1 |" in text
    assert "17M: nothing was measured" in text and "0 tokens" not in text
    assert "lm_jax, torch flash: not ready after 9 s" in text and "after 8 s" not in text
    assert "| lm_jax | - | 2.00 | 32,000 | 2.00 |" in text
    assert "| lm_jax x8 | - | 2.00 | 32,000 | 2.00 |" in text and "speed / lm_jax" in text


class FakeProcess:
    """A peer that is ready after the seconds in its name; `torch hang` is so at once, and hangs."""

    def __init__(self, case, peer, device):
        self.at = time.perf_counter() + (0 if "hang" in peer else float(peer.split()[1]))
        self.hangs, self.lines, self.process = "hang" in peer, self, self

    def empty(self):
        return time.perf_counter() < self.at

    def read(self, until):
        return {"losses": [3.0] * 5, "count": 1, "version": ""}

    def run(self, calls, patience):
        if self.hangs:
            raise queue.Empty
        return {"seconds": 0.001 * calls}

    def close(self):
        pass

    kill = close


@pytest.mark.parametrize(
    ("peers", "late", "hangs"),
    [
        ("torch 0.1,torch 9,torch 0.2", {"torch 9"}, set()),
        ("torch hang,torch 0.1", set(), {"torch hang"}),
        # Nobody was ready when the turns should have begun: there is still time for the first.
        ("torch 3.5,torch 9", {"torch 9"}, set()),
        ("torch 9,torch 8", {"torch 9", "torch 8"}, set()),
    ],
)
@pytest.mark.slow
def test_late_peer_costs_itself_only(monkeypatch, peers, late, hangs):
    import bench_step

    monkeypatch.setattr(bench_step, "Process", FakeProcess)
    rows, peers = [], peers.split(",")
    args = argparse.Namespace(block_seconds=0.01, device="cpu", repeats=3)
    result = bench_step.bench("124M toy", peers, args, 6.0, lambda **row: rows.append(row))
    reasons = {row["peer"]: row["not_run"] for row in rows if "not_run" in row}
    assert set(reasons) == late | hangs
    assert all("not ready after" in reasons[peer] for peer in late)
    fine = set(peers) - late - hangs
    assert set(result["step_ms"]) == fine and all(map(len, result["step_ms"].values()))
    assert {peer for row in rows for peer in row.get("step_ms", {})} == fine
