"""Blocks of `figures.py`: the studies, as `lm_jax.compare` recorded them, and the soak."""

import math
import statistics
from typing import Any

from records import bullets, figure, measured, record, tabled, told


def _interval(found: dict[str, Any], how: str) -> str:
    """Mean, with the 95 % interval over seeds where there is one."""
    mean = format(found["mean"], how)
    if found["low95"] is None:
        return mean
    return f"{mean} [{found['low95']:{how}}, {found['high95']:{how}}]"


def _millions(parameters: int) -> str:
    return f"{parameters / 1e6:.3f}M"


def _short(name: str) -> str:
    return name.partition("-")[2]


def _verdict(study: dict[str, Any]) -> str:
    """The ranking, best first; arms in braces are not told apart."""
    groups = [", ".join(map(_short, group)) for group in study["ranking"]]
    return " < ".join(f"{{{g}}}" if "," in g else g for g in groups)


def _gap(study: dict[str, Any], better: str, worse: str) -> str:
    """The gap of two arms with its standard errors."""
    pair = next(p for p in study["pairs"] if (p["better"], p["worse"]) == (better, worse))
    return (
        f"{pair['gap_bits_per_byte']:.4f} bits per byte, "
        f"{pair['gap_bits_per_byte'] / pair['standard_error']:.1f} standard errors "
        f"({pair['standard_error_seeds']:.4f} between seeds, "
        f"{pair['standard_error_documents']:.4f} between documents)"
    )


def musota() -> str:
    """MU-SOTA against dense models."""
    study, lines = record("musota_wikitext2_cpu.json"), []
    for arm in study["arms"]:
        tables = arm["parameters_table"]
        lines.append(
            (
                _short(arm["name"]),
                f"{_millions(arm['parameters_total'])} ({_millions(tables)})",
                f"{arm['flops_per_token'] / 1e6:.2f}M",
                _interval(arm["bits_per_byte"], ".4f"),
                _interval(arm["word_perplexity"], ".1f"),
                f"{arm['training_seconds']:.0f} s",
            )
        )
    seconds = {_short(arm["name"]): arm["training_seconds"] for arm in study["arms"]}
    bigram = next(r for r in study["references"] if r["name"] == "kn2")["word_perplexity"]
    longer = record("bench_musota_cpu.json")["total"]["musota_takes"]
    heads = ["arm", "parameters (tables)", "FLOPs per token", "test bits per byte"]
    return tabled(
        [*heads, "word perplexity", "training"],
        lines,
        f"Three seeds each. Verdict of `compare`: {_verdict(study)}; the gap of the first two is "
        f"{_gap(study, 'musota-musota', 'musota-total')}. A Kneser-Ney bigram reaches {bigram:.1f} "
        f"on the same tokens. musota took {seconds['musota'] / seconds['total']:.1f} times the "
        "time of total; times are those of two runs side by side, without the preflight. A step at "
        f"12 layers, T 192 and V 16,000 takes {longer:.1f} times as long as that of the dense "
        "model of as many parameters.",
        measured("musota_wikitext2_cpu.json"),
        measured("bench_musota_cpu.json"),
    )


def phase1() -> str:
    """Where 10M parameters go."""
    study, lines = record("phase1_wikitext2_cpu.json"), []
    same = {_short(one): _short(other) for one, other in study["same_model"]}
    for arm in study["arms"]:
        name = _short(arm["name"])
        lines.append(
            (
                f"{name}, the same model as {same[name]}" if name in same else name,
                f"{arm['parameters_total'] / 1e6:.2f}M ({arm['parameters_table'] / 1e6:.2f}M)",
                _interval(arm["bits_per_byte"], ".4f"),
                f"{arm['word_perplexity']['mean']:,.0f}",
            )
        )
    bigram = next(r for r in study["references"] if r["name"] == "kn2")["bits_per_byte"]
    heads = ["arm", "parameters (table)", "test bits per byte", "word perplexity"]
    return tabled(
        heads,
        lines,
        f"Three seeds each. Verdict of `compare`: {_verdict(study)}. All are behind a Kneser-Ney "
        f"bigram ({bigram:.4f} bits per byte). emb35 and glu266x differ by what the number of "
        "threads of the machine and stops between updates do.",
        measured("phase1_wikitext2_cpu.json"),
    )


def distillation() -> str:
    """A student alone and taught."""
    study = record("distillation_wikitext2_cpu.json")
    reports = record("distillation_reports_cpu.json").values()
    arms = {_short(arm["name"]): arm for arm in study["arms"]}
    lines = []
    for name in ("alone", "distilled", "teacher"):
        arm = arms[name]
        found = [report["models"][name] for report in reports if name in report["models"]]
        lines.append(
            (
                f"{name}, {arm['parameters_total'] / 1e6:.2f}M parameters",
                _interval(arm["bits_per_byte"], ".4f"),
                _interval(arm["word_perplexity"], ".1f"),
                f"{statistics.mean(m['agreement'] for m in found):.1%}" if found else "",
                f"{statistics.mean(m['kl'] for m in found):.3f}" if found else "",
                f"{arm['training_seconds']:,.0f} s",
            )
        )
    bits = {name: arm["bits_per_byte"]["mean"] for name, arm in arms.items()}
    way = (bits["alone"] - bits["distilled"]) / (bits["alone"] - bits["teacher"])
    over = {
        name: found["over_parts"]
        for name, found in record("bench_distill_cpu.json").items()
        if isinstance(found, dict) and "over_parts" in found
    }
    heads = ["", "test bits per byte", "word perplexity", "equal top choice"]
    return tabled(
        [*heads, "KL from the teacher", "training"],
        lines,
        "Three seeds of the students, one of the teacher. Verdict of `compare`: "
        f"{_verdict(study)}, by {_gap(study, 'distill-distilled', 'distill-alone')}: {way:.0%} of "
        "the way to the teacher with equally many tokens. A distillation step takes "
        f"{over['divergence and cross-entropy']:.2f} times as long as the teacher's forward pass "
        f"and the student's step together, {over['reverse']:.2f} times with reverse KL and "
        f"{over['union of 64']:.2f} with the union of 64 ids, whose gradients are not written by "
        "hand.",
        measured("distillation_wikitext2_cpu.json", "distillation_reports_cpu.json"),
        measured("bench_distill_cpu.json"),
    )


def ensemble() -> str:
    """Members, their mean, and a student of it."""
    models = record("ensemble_wikitext2_cpu.json")["models"]
    run = figure("ensemble")
    members = [found for name, found in models.items() if name.startswith("teacher ")]
    mean, student = models["mean of the teachers"], models["distilled"]
    bits = [one["bits_per_byte"] for one in members]
    words = [one["word_ppl"] for one in members]
    rows = [
        *((f"member {n}", one) for n, one in enumerate(members)),
        (f"mean of the {len(members)}", mean),
        ("student", student),
    ]
    lines = [
        (
            name,
            f"{one['parameters'] / 1e6:.2f}M",
            f"{one['bits_per_byte']:.4f}",
            f"{one['word_ppl']:.1f}",
            "" if one is mean else f"{one['agreement']:.1%}",
        )
        for name, one in rows
    ]
    kept = (statistics.mean(bits) - student["bits_per_byte"]) / (
        statistics.mean(bits) - mean["bits_per_byte"]
    )
    errors = [statistics.stdev(values) / math.sqrt(len(values)) for values in (bits, words)]
    return tabled(
        ["", "parameters", "test bits per byte", "word perplexity", "top choice as the mean's"],
        lines,
        f"{run['updates']:,} updates each. The members reach {statistics.mean(bits):.4f} bits "
        f"per byte and word perplexity {statistics.mean(words):.1f} on average, with standard "
        f"errors of {errors[0]:.4f} and {errors[1]:.1f} over their seeds; the student, one seed, "
        f"keeps {kept:.0%} of what their mean gains. Three members took "
        f"{', '.join(map(str, run['member_seconds']))} s with both cores, from start to report "
        f"(the first shared them with another run), the student {run['student_seconds']:,} s.",
        measured("ensemble_wikitext2_cpu.json"),
    )


CHANGES = {
    "decay1": "`optim.weight_decay` 1 instead of 0.1",
    "base": "",
    "window_offset": "windows cut elsewhere in every epoch (`data.window_offset`)",
    "ema": "average of the weights, 0.99 (`optim.ema_decay`)",
    "attention_dropout": "0.1",
    "untied": "a head of its own",
    "embedding_dropout": "0.1",
    "decay3": "`optim.weight_decay` 3",
    "label_smoothing": "0.1 (`loss.label_smoothing`, never in what is logged)",
    "dropout": "0.1, of the branches",
    "factorised": "embeddings of rank 64 (`model.embedding_rank`)",
}


def small_corpus() -> str:
    """Options for a small corpus, one at a time."""
    study = record("small_corpus_wikitext2_cpu.json")
    lines = [
        (
            _short(arm["name"]),
            CHANGES[_short(arm["name"])],
            f"{arm['parameters_total'] / 1e6:.2f}M",
            f"{arm['bits_per_byte']['mean']:.4f}",
            f"{arm['word_perplexity']['mean']:.1f}",
        )
        for arm in study["arms"]
    ]
    pair = study["pairs"][0]
    heads = ["arm", "what it changes", "parameters", "test bits per byte", "word perplexity"]
    return tabled(
        heads,
        lines,
        "One seed each: `compare` ranks nothing, for the noise between seeds is not known. "
        f"Documents alone give the gap of {_short(pair['better'])} and {_short(pair['worse'])} a "
        f"standard error of {pair['standard_error_documents']:.4f} bits per byte.",
        measured("small_corpus_wikitext2_cpu.json"),
    )


HURTS = {
    "kills": "`kill -9` at a moment of a run",
    "signals": "SIGINT, SIGTERM or SIGHUP at such a moment, once or twice in a row",
    "disks": "a disk that is full or read-only, a folder that is gone",
    "damage": "a file cut, emptied, removed, or with one bit flipped",
    "sweep": "`kill -9` of a sweep, alone or with its runs",
}


def soak() -> str:
    """What was hurt, and what was lost."""
    found, lines = record("soak.json"), []
    for kind, what in HURTS.items():
        rows = [row for row in found["rows"] if row["kind"] == kind]
        sums = {
            name: sum(row[name] for row in rows)
            for name in ("tried", "refused", "redone", "lost", "seconds")
        }
        if rows:
            refused = sums["refused"] if kind in ("disks", "damage") else ""
            seconds = f"{sums['seconds'] / sums['tried']:.0f} s"
            lines.append(
                (what, sums["tried"], len(rows), refused, sums["redone"], sums["lost"], seconds)
            )
    heads = ["hurt", "times", "places", "refused, by name", "updates made anew", "lost", "each"]
    losses = [f"{one['story']}, {one['what']}: {'; '.join(one['lost'])}" for one in found["lost"]]
    return "\n\n".join(
        filter(
            None,
            (
                tabled(heads, lines, told(found), "Recorded in `scripts/results/soak.json`."),
                bullets(*losses),
            ),
        )
    )
