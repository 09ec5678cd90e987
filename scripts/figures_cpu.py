"""Blocks of `figures.py`: whole runs, kernels and data on a CPU."""

import math
import re
import statistics
from typing import Any

from records import RESULTS, bullets, figure, measured, prose, record, tabled, told


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _above(run: dict[str, Any]) -> str:
    return f"{run['valid_loss'] / run['entropy_rate'] - 1:.1%} above the entropy rate"


def quickstart() -> str:
    """Loss, entropy rate and time."""
    run = figure("quickstart")
    return prose(
        f"The source has an entropy rate of {run['entropy_rate']} nats per symbol; the run ends "
        f"with a valid loss of {run['valid_loss']}, {_above(run)}, after {_clock(run['seconds'])}.",
        told(run),
    )


def runs() -> str:
    """Whole runs from start to report."""
    first = figure("quickstart")
    char = figure("shakespeare_char")[0]
    seconds = figure("wikitext2_cpu")
    lines = [
        (
            "quickstart: a source of known entropy",
            f"`{first['command']}`",
            f"valid loss {first['valid_loss']} ({_above(first)}) in {_clock(first['seconds'])}",
        ),
    ]
    name = "wikitext2_cpu_eval_test.json"
    run, told_of = record(name), record("measured.json")["files"][name]
    trigram = run["references"]["kn3"] ** (math.log(run["word_ppl"]) / run["loss"])
    lines.append(
        (
            f"WikiText-2, {seconds['parameters']} parameters, {seconds['updates']:,} updates",
            f"`{told_of['command']}`",
            f"test word perplexity {run['word_ppl']:.1f} in {_clock(seconds['seconds'])} on "
            f"{told_of['device']} (a Kneser-Ney trigram on the same tokens: {trigram:.1f})",
        )
    )
    lines.append(
        (
            "Tiny Shakespeare by characters, 4 layers, 128 wide, T 64, batch 12, "
            f"{char['updates']:,} updates",
            f"`{char['command']}`",
            f"valid loss {char['valid_loss']} nats per character in {_clock(char['seconds'])}",
        )
    )
    about = (
        f"Whole runs from start to report, seed 0, {first['device']}, {char['date']}; the first "
        f"with an empty cache, {first['date']}; WikiText-2 {told_of['date']}."
    )
    return tabled(["run", "command", "result"], lines, about)


def optimisers() -> str:
    """Tiny Shakespeare by two optimisers."""
    found = figure("shakespeare_char")
    lines = [(r["optimiser"], f"{r['valid_loss']:.3f}", _clock(r["seconds"])) for r in found]
    heads = ["optimiser", "valid loss, nats per character", "start to report"]
    about = f"Tiny Shakespeare, {found[0]['updates']:,} updates, one seed."
    return tabled(heads, lines, about, told(found[0]))


def own_text() -> str:
    """What `configs/text.py` makes of a megabyte."""
    run = figure("own_text")
    return prose(_of_text(run), told(run))


def _of_text(run: dict[str, Any]) -> str:
    return (
        f"Your own text, here {run['text']} ({run['bytes'] / 1e6:.1f} MB), takes "
        f"{_clock(run['seconds'])} and ends with {run['bits_per_byte']:.3f} bits per byte, a "
        f"Kneser-Ney trigram with {run['trigram_bits_per_byte']:.3f}."
    )


def newcomer() -> str:
    """The first two runs of the README."""
    first, text = figure("quickstart"), figure("own_text")
    return prose(
        f"The quickstart takes {_clock(first['seconds'])}.",
        _of_text(text),
        "From `git clone` to a sample of it, installation and quickstart included, it is "
        f"{_clock(text['first_sample_seconds'])}.",
        f"Measured on {text['device']}, {text['date']}.",
    )


def start() -> str:
    """First update of a first and of later starts."""
    run = figure("start")
    return prose(
        f"With the text tokenised before, `{run['config']}` made its first update "
        f"{run['first_seconds']} s after its first start and {run['later_seconds']} s after later "
        f"ones (one start, and the median of {run['later_starts']}).",
        told(run),
    )


def loop() -> str:
    """What the loop around the step costs."""
    run, small = record("bench_loop_cpu.json"), figure("input_wait_small_steps")
    names = " and ".join(f"`{name}`" for name in small["configs"])
    return prose(
        f"At `configs/wikitext2_cpu.py` the loop waits for input {run['input_wait']:.1%} of the "
        f"step ({small['input_wait']:.1%} at the {small['step_ms']} ms steps of {names}); "
        f"evaluation runs at {run['evaluation_against_forward']:.2f}x the speed of the forward "
        f"part; the first update of the quickstart comes "
        f"{run['first_update_seconds']:.1f} s after its start.",
        measured("bench_loop_cpu.json"),
    )


def overlap() -> str:
    """A call of the loop in two processes, before and now."""
    found = record("loop_overlap.json")
    run = found["2 processes"]
    then, now = (run[f"{name}_call_ms"] for name in ("agreed_in_every_call", "now"))
    asked, asks = (run[f"{name}_agree_ms"] for name in ("agreed_in_every_call", "now"))
    return prose(
        f"A call of two processes takes {now:.1f} ms, of which the step takes {run['step_ms']:.1f} "
        f"ms and the host {run['host_ms']:.0f} ms; when they agreed in every call, as in 0.4, it "
        f"took {then:.1f} ms. To agree takes {asks:.2f} ms in place of {asked:.1f}, and to put a "
        f"batch on the devices {run['now_put_ms']:.1f} ms.",
        told(found),
    )


def doctor() -> str:
    """Seconds and checks of the preflight."""
    run = figure("doctor")
    fast, full = run["fast"], run["full"]
    return prose(
        "On `configs/wikitext2.py` (17M parameters; the checks run the same code at two layers) "
        f"the doctor takes {fast['seconds']} s with start and compilation (median of "
        f"{run['runs']}): {fast['passed']} checks pass, {fast['skipped']} have nothing to look at. "
        f"`--level=full` makes {full['checks']} checks in {full['seconds']} s, of which "
        f"{full['skipped']} have nothing to look at.",
        told(run),
    )


def baselines() -> str:
    """WikiText-2 by words."""
    found = figure("baselines")
    paper = found["published"]
    return prose(
        f"WikiText-2 by words has a test perplexity of {found['word_ppl']['unigram']} under the "
        f"frequencies of words and of {found['word_ppl']['kn2']} under a Kneser-Ney bigram "
        f"(`{found['command']}`). {paper['model']} with {paper['parameters']} parameters reaches "
        f"{paper['word_ppl']} ({paper['source']}).",
    )


def decoding() -> str:
    """Tokens a second against Hugging Face transformers."""
    run = figure("decoding")
    lines = [
        (
            "1 prompt" if prompts == "1" else f"{prompts} prompts",
            *(f"{ours} : {theirs} ({ratio:.2f}x)" for ours, theirs, ratio in speeds.values()),
        )
        for prompts, speeds in run["tokens_per_second"].items()
    ]
    low, high = run["compile_seconds"]
    heads = ["tokens/s, lm_jax : Hugging Face", *run["tokens_per_second"]["1"]]
    return tabled(
        heads,
        lines,
        f"Against {run['against']} on the same weights ({run['model']}), with a key/value cache on "
        f"both sides, medians of {run['turns']} turns of {run['tokens']} tokens; the greedy tokens "
        f"are all the same. The first call compiles for {low} to {high} s.",
        told(run),
    )


def step_cpu() -> str:
    """Train step against PyTorch."""
    found, lines = record("bench_step_cpu.json"), []
    for name in ("char", "10M"):
        size = found[name]["size"]
        what = f"{size['layers']} layers, {size['d_model']} wide, T {size['seq_len']}, "
        what += f"batch {size['batch_size']}, V {size['vocab_size']:,}"
        ms = statistics.median(found[name]["step_ms"]["lm_jax"])
        ratios = (f"{ratio:.2f}x" for ratio in found[name]["speed_against"].values())
        lines.append((what, f"{ms:.1f} ms", *ratios))
    heads = ["train step", "this trainer", "speed against PyTorch, eager", "`torch.compile`"]
    versions = ", ".join(dict.fromkeys(found["char"]["versions"].values()))
    about = f"Float32, the first five losses equal; {versions}."
    return tabled(heads, lines, about, measured("bench_step_cpu.json"))


def attention_cpu() -> str:
    """Blockwise attention against xla, and a window against all pairs."""
    cases, lines = record("bench_attention_cpu.json")["cases"], []
    for length in (128, 256, 512, 1024, 2048, 4096):
        found = cases[f"cpu_t{length}"]["gradient"]["xla"]
        ratios = (f"{found['speed_ratio']:#.2g}x", f"{found['memory_ratio']:#.2g}")
        lines.append((f"T {length}", *ratios))
    window = cases["cpu_window"]
    lines.append(
        (
            f"T {window['case']['T']} with a window of {window['case']['window']}, against the "
            "full causal one",
            f"{window['gradient']['all pairs']['speed_ratio']:.2g}x",
            "",
        )
    )
    repeats = figure("attention_cpu_t512_repeats")["speed_ratios"]
    heads = ["blockwise against xla", "speed", "share of its memory"]
    about = (
        "Forward and backward, 4 heads of 64, float32, 4,096 tokens, in turns in one process; "
        f"memory is XLA's analysis of temporaries. At T 512 three runs gave {min(repeats)}x to "
        f"{max(repeats)}x."
    )
    return tabled(heads, lines, about, measured("bench_attention_cpu.json"))


def loss_cpu() -> str:
    """Fused losses against all logits at once."""
    cases, lines = record("bench_loss_cpu.json")["cases"], []
    for name in ("cpu_16k", "cpu_kl", "cpu_50k", "cpu_50k_bf16"):
        case, found = cases[name]["case"], cases[name]["peers"]["materialised"]
        what = f"{case['kind']}, {case['tokens']:,} tokens, V {case['vocabulary']:,}, "
        speed = f"{found['speed_ratio']:.2f}x" if case["timed"] else "not measured"
        lines.append(
            (what + f"D {case['width']}, {case['dtype']}", speed, f"{found['memory_ratio']:.2f}")
        )
    older = figure("loss_cpu_50k_jax_0.10.2")["memory_ratio"]
    heads = ["linear layer with", "speed against all logits at once", "share of its memory"]
    about = (
        "Forward and backward, in turns in one process; memory is XLA's analysis of temporaries. "
        f"With jax 0.10.2 the share at V 50,257 in float32 is {older}."
    )
    return tabled(heads, lines, about, measured("bench_loss_cpu.json"))


def stream() -> str:
    """A corpus by size."""
    lines = []
    for run in record("bench_stream_cpu.json")["by_size"]:
        reading = run.get("reading", {}).get("peak_rss_mb")
        lines.append(
            (
                f"{run['megabytes'] / 1e3:.2f} GB, {run['documents']:,}",
                run["workers"],
                f"{run['mb_per_core_second']:.1f}",
                f"{run['peak_rss_mb']:.0f} MB",
                f"{reading:.0f} MB" if reading else "",
            )
        )
    heads = ["text, documents", "processes", "MB/s per core", "peak memory, preparing"]
    about = (
        "JSONL of made-up words, BPE of 32,768 ids learned from 100M characters, T 2048. Speed is "
        "by CPU time; memory is resident, of all processes together; reading is one epoch of "
        "batches, beside no model. More than 2 processes, larger corpora and a training "
        "run: not measured."
    )
    return tabled([*heads, "peak memory, reading"], lines, about, measured("bench_stream_cpu.json"))


def stream_rest() -> str:
    """What else was measured on the largest corpus."""
    found = record("bench_stream_cpu.json")
    run, doctor = found["by_size"][-1], found["doctor"]
    seconds, formats = run["seconds"], found["formats"]
    return bullets(
        f"At {run['megabytes'] / 1e3:.2f} GB the sources are hashed in "
        f"{seconds['open_corpus']:.1f} s, the next time in {seconds['open_corpus_again']:.2f} s; "
        f"the store is opened and checked in {seconds['open_store']:.1f} s.",
        f"One thread reads {run['reading']['tokens_per_second'] / 1e6:.0f}M tokens a second.",
        f"The doctor takes {doctor['doctor_seconds']:.0f} s, on 2M tokens of each split.",
        "Documents alone, of one 134 MB shard: "
        + ", ".join(
            f"{formats[key]['mb_per_second']:.0f} MB/s from {name}"
            for key, name in (
                ("jsonl:text", "JSONL"),
                ("parquet:text", "Parquet"),
                ("arrayrecord", "ArrayRecord"),
            )
        )
        + ".",
        "The references of the evaluation are fitted on 20M tokens at most, which takes "
        f"{doctor['references_seconds']:.0f} s and {doctor['peak_rss_mb'] / 1e3:.1f} GB of memory "
        "(with JAX).",
        measured("bench_stream_cpu.json"),
    )


def stream_long() -> str:
    """Memory for a long document."""
    found = record("bench_stream_cpu.json")["long_documents"]
    sizes = ", ".join(f"{run['document_mb']:.1f}" for run in found)
    peaks = ", ".join(f"{run['peak_rss_mb']:.0f}" for run in found)
    return prose(
        f"With one document of {sizes} MB of ASCII, BPE of 8,000 ids and one process, the peak is "
        f"{peaks} MB.",
        measured("bench_stream_cpu.json"),
    )


def temperature() -> str:
    """What the temperature does to the divergence."""
    found = figure("temperature")
    lines = [
        (title, *(f"{value:#.3g}" for value in found[key].values()))
        for title, key in (
            ("KL, nats per token", "divergence"),
            ("T^2 KL", "times_t_squared"),
            ("norm of its gradient", "gradient_norm"),
        )
    ]
    about = f"Random logits of variance {found['variance']} over {found['vocabulary']} ids."
    return tabled(["T", *found["divergence"]], lines, about, told(found))


def gradients() -> str:
    """The table of verified gradients."""
    last = (RESULTS / "gradient_table.md").read_text().splitlines()[-1]
    leaves, failed = re.findall(r"\d+", last)
    return prose(
        f"`python scripts/gradient_table.py` compares {leaves} leaves of `configs/gpt_demo.py` "
        f"with central differences in float64: {failed} checks failed; in every row the largest "
        "relative error is below what rounding and step explain "
        "(`scripts/results/gradient_table.md`)."
    )
