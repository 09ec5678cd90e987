"""The Markdown of `gpu_report.py`, made from its rows alone."""

import json
import pathlib
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

CORRECT = """\
Exact is the plain implementation in float32; an error may be twice that of the plain one in the
same dtype, and a little. A pallas kernel is run ten times more.

"""
STEPS = """\
Peers are processes that take turns in blocks of steps; ms are medians over the blocks. Where a name
says plain, rows are not divided into documents, as PyTorch's never are; x8 is 8 updates in a call.
The variants are compared with this trainer, which is measured again beside them. PyTorch is
compiled, under autocast, with fused AdamW. At 124M its model and batch are the same; at 17M it has
the same matrix products in a plainer model: LayerNorm, GELU, learned positions, AdamW, no dropout
and no average of the weights.
"""
KERNELS = """\
Medians over turns in one process. The gradient contains the forward pass; TF/s count the
visible half of the products.

"""
Row = dict[str, Any]
Rows = list[Row]


def read(path: pathlib.Path) -> Rows:
    """All rows; the last line may have been cut by a kill."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def left_out(rows: Rows) -> dict[str, str]:
    """Implementations of attention that are not to be used, and why."""
    found: dict[str, str] = {}
    for row in last(rows):
        if row["case"].startswith("loss"):
            continue
        # A whole update with wrong values does not say which part of it is wrong.
        wrong = row.get("ok") is False and row["case"].startswith("attention")
        if wrong or "raised" in row:
            found.setdefault(row["impl"], f"{row.get('raised', 'wrong')} at {row['case']}")
        if "running" in row:
            found.setdefault(row["impl"], f"did not come back from {row['case']}")
    found.pop("auto", None)  # it is another one's name
    return found


def last(rows: Rows) -> Rows:
    """The last row about each implementation at each check."""
    checks = [row for row in rows if row["part"] == "correct"]
    found: dict[tuple[str, str], Row] = {}
    for row in checks:
        key = row["case"], row["impl"]
        # What another session found stays where this one did not come to it.
        if "not_run" not in row or "not_run" in found.get(key, row):
            found[key] = row
    return list(found.values())


def table(heads: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """Markdown of a table."""
    rows = [heads, ["---"] * len(heads), *lines]
    return "".join("| " + " | ".join(map(str, cells)) + " |\n" for cells in rows)


def names(pairs: Iterable[tuple[str, str]]) -> str:
    """A list of what was not run, each reason once with all its names."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in dict.fromkeys(pairs):
        by_reason.setdefault(reason, []).append(name)
    return "".join(f"- not run: {', '.join(n)}: {reason}\n" for reason, n in by_reason.items())


def part(rows: Rows, name: str) -> Rows:
    """The rows of a part."""
    return [row for row in rows if row["part"] == name]


def info(rows: Rows) -> str:
    """Device and versions."""
    found: Row = {}
    for row in part(rows, "info"):
        found |= row
    versions = {name: v for name, v in found.get("versions", {}).items() if v}
    driver = found.get("driver") or {}
    device = f"{found.get('device')} ({found.get('backend')}, {found.get('cpus')} CPU cores)"
    lines = [("device", device)]
    lines += list(driver.items())
    lines.append(("versions", ", ".join(f"{name} {v}" for name, v in versions.items())))
    for key, title in (("gemm_tflops", "matrix product, TFLOP/s"), ("copy_tb_per_s", "copy, TB/s")):
        lines.append((title, f"{found[key]:.3g}" if key in found else "not measured"))
    for row in part(rows, "info"):
        if "reason" in row:
            title = f"auto attention, {row['case']}" + ", plain" * row["peer"].endswith("plain")
            lines.append((title, f"{row['attention']}: {row['reason']}"))
    return table(["", ""], lines)


def correct(rows: Rows) -> str:
    """How many checks each implementation passed, and what failed."""
    found = last(rows)
    lines = []
    for impl in dict.fromkeys(row["impl"] for row in found):
        mine = [row for row in found if row["impl"] == impl]
        words: dict[Any, str] = {True: "right", False: "wrong"}
        counts = Counter("refused" if "refused" in r else words.get(r.get("ok"), "") for r in mine)
        ratios = [
            error / row["limit"][name]
            for row in mine
            for name, error in row.get("error", {}).items()
            if error is not None
        ]
        largest = f"{max(ratios):.2f}" if ratios else "-"
        moved = sum(row.get("dq_moved", 0) for row in mine)
        lines.append(
            (impl, counts["right"], counts["wrong"], counts["refused"], counts[""], largest, moved)
        )
    heads = ["implementation", "right", "wrong", "refused", "not checked", "largest error / limit"]
    text = CORRECT + table([*heads, "reruns with another dq"], lines)
    for row in found:
        if row.get("ok") is False:
            what = row.get("raised") or f"error {row['error']}, limit {row['limit']}"
            text += f"- WRONG: {row['impl']}, {row['case']}: {what}\n"
        if "running" in row:
            text += f"- DID NOT COME BACK: {row['impl']}, {row['case']}\n"
    late = [row for row in found if "not_run" in row]
    return text + names((f"{row['impl']}, {row['case']}", row["not_run"]) for row in late)


def steps(rows: Rows) -> str:
    """Tokens a second of all peers, case by case; ratios to the fastest PyTorch, or to lm_jax."""
    mine, text = part(rows, "steps"), STEPS
    for case in dict.fromkeys(row["case"] for row in mine):
        here = [row for row in mine if row["case"] == case]
        ready: dict[str, Row] = {}
        absent: dict[str, str] = {}
        ms: dict[str, list[float]] = {}
        for row in here:
            for peer, value in row.get("step_ms", {}).items():
                ms.setdefault(peer, []).append(value)
            if "compile_seconds" in row:
                ready[row["peer"]] = row
                absent.pop(row["peer"], None)  # it was late in another session
            elif "agrees" in row:
                ready[row["peer"]] = ready[row["peer"]] | row
            elif "not_run" in row:
                absent[row["peer"]] = row["not_run"]
        medians = {peer: statistics.median(values) for peer, values in ms.items()}
        torch = min((v for peer, v in medians.items() if peer.startswith("torch")), default=None)
        base = torch or medians.get("lm_jax")
        lines = []
        for peer, row in ready.items():
            time = medians.get(peer)
            lines.append(
                [
                    peer,
                    row["attention"] or "-",
                    f"{time:.2f}" if time else "-",
                    f"{1e3 * row['tokens'] / time:,.0f}" if time else "-",
                    f"{base / time:.2f}" if time and base else "-",
                    f"{row['peak_bytes'] / 1e9:.2f}" if row["peak_bytes"] else "-",
                    f"{row['compile_seconds']:.0f}",
                    "" if row.get("agrees", True) else f"LOSSES DIFFER BY {row['differs']:.1e}",
                ]
            )
        speed = "speed / PyTorch" if torch else "speed / lm_jax"
        heads = ["peer", "attention", "ms", "tokens/s", speed, "GB", "compile, s", ""]
        if ready:
            tokens = next(iter(ready.values()))["tokens"]
            text += f"\n{case}, {tokens:,} tokens an update:\n\n" + table(heads, lines)
        else:
            text += f"\n{case}: nothing was measured.\n\n"
        text += names(absent.items())
    return text


def kernels(rows: Rows, name: str) -> str:
    """Milliseconds (and GB of temporaries) of every peer, a line a case."""
    mine = part(rows, name)
    cases = [row for row in mine if "peers" in row]
    peers = dict.fromkeys(p for row in cases for p, r in row["peers"].items() if r.get("ms"))
    lines = []
    for row in cases:
        cells = [f"{row['case']}, {row['pass']}" if "pass" in row else row["case"]]
        for peer in peers:
            found = row["peers"].get(peer, {})
            text = f"{statistics.median(found['ms']):.3g}" if found.get("ms") else "-"
            if name == "loss" and found.get("temp_bytes"):
                text += f" ({found['temp_bytes'] / 1e9:.2f} GB)"
            if row.get("flops") and found.get("ms"):
                text += f" ({1e-9 * row['flops'] / statistics.median(found['ms']):.0f} TF/s)"
            cells.append(text)
        lines.append(cells)
    text = KERNELS if name == "attention" else ""
    text += table(["ms", *peers], lines) if peers else "Nothing was measured.\n\n"
    for row in cases:
        for peer, found in row["peers"].items():
            differs = found.get("difference") or max(
                map(abs, found.get("relative_difference", [0])), default=0
            )
            if peer != "all pairs" and not differs < 0.05:
                text += f"- DIFFERS by {differs:.1e}: {peer}, {row['case']}\n"
    text += names(
        (peer, found["not_run"])
        for row in cases
        for peer, found in row["peers"].items()
        if "not_run" in found
    )
    late = [row for row in mine if "not_run" in row]
    return text + names((f"{row['case']} {row.get('pass', '')}", row["not_run"]) for row in late)


def train(rows: Rows) -> str:
    """Scores, times and the curve of the training."""
    mine, text = part(rows, "train"), ""
    for row in mine:
        if "wall_seconds" in row:
            ended = " (stopped when time was out)" if row["stopped"] else ""
            lines = [("updates", f"{row['updates']:,} of the {row['of']:,} of the config{ended}")]
            lines.append(("start to report, s", f"{row['wall_seconds']:.1f}"))
            for name, title, how in (
                ("update_seconds", "updates alone, s", ".1f"),
                ("tokens_per_second", "tokens/s", ",.0f"),
                ("step_ms", "ms an update", ".2f"),
                ("input_wait", "share of time waiting for input", ".2%"),
                ("mfu", "model FLOP/s utilisation", ".1%"),
            ):
                lines.append((title, format(row[name], how) if row.get(name) else "-"))
            flags = [flag for flag in row["flags"] if "_dir=" not in flag]
            text += table(["", ""], lines) + f"\nFlags: `{' '.join(flags)}`\n\n"
    scores = [row for row in mine if "split" in row]
    heads = ["split", "word perplexity", "token perplexity", "bits per byte", "accuracy", "update"]
    text += "" if scores else "No score was computed in time.\n"
    text += table(
        heads,
        (
            (
                row["split"],
                f"{row['word_ppl']:.2f}",
                f"{row['token_ppl']:.2f}",
                f"{row['bits_per_byte']:.4f}",
                f"{row['accuracy']:.2%}",
                row["step"],
            )
            for row in scores
        ),
    ) * bool(scores)
    curve = [f"{row['word_ppl']:.1f} at {row['valid_at']:,}" for row in mine if "valid_at" in row]
    return text + f"\nValid word perplexity: {', '.join(curve) or 'never scored'}.\n"


def endings(rows: Rows) -> tuple[str, bool]:
    """Parts that did not end by themselves, and whether all is well."""
    text, fine = "", True
    for row in part(rows, "end"):
        if row["killed"]:
            text += f"- {row['of']} was ended at its limit, after {row['seconds']:.0f} s; what it "
            text += "had measured by then stands here\n"
        elif any(row["codes"]):
            text += f"- {row['of']} ended with {row['codes']}: see log.txt\n"
        fine &= not row["killed"] and not any(row["codes"])
    for impl, reason in left_out(rows).items():
        text += f"- {impl} was left out of the parts after `correct`: {reason}\n"
    return text, fine


def report(rows: Rows) -> tuple[str, bool]:
    """The whole text, and whether nothing is wrong."""
    text, fine = endings(rows)
    sections = {
        "Device": ("info", info),
        "Correctness": ("correct", correct),
        "Steps": ("steps", steps),
        "Attention": ("attention", lambda rows: kernels(rows, "attention")),
        "Linear layer and loss": ("loss", lambda rows: kernels(rows, "loss")),
        "Training": ("train", train),
    }
    for title, (name, section) in sections.items():
        body = section(rows) if part(rows, name) else "Not measured.\n"
        text += f"\n### {title}\n\n{body}"
    return text, fine and all(row.get("ok", True) for row in last(rows))
