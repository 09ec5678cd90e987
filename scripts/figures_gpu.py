"""Blocks of `figures.py`: what was measured on a GPU, or compiled for one."""

import statistics
from typing import Any

import gpu_table
from records import figure, measured, prose, record, tabled

H200 = "gpu_h200.jsonl"
UPDATES_OF_AN_EPOCH = {32: 148, 16: 296}  # of configs/wikitext2.py, by rows of a batch


def _sessions(case: str) -> list[dict[str, list[float]]]:
    """Milliseconds of each block by peer, of one case, in each session that measured it."""
    found: list[dict[str, list[float]]] = []
    timed = True
    for row in gpu_table.part(record(H200), "steps"):
        if row["case"] != case:
            continue
        if timed and "step_ms" not in row:
            found.append({})
        timed = "step_ms" in row
        for peer, ms in row.get("step_ms", {}).items():
            found[-1].setdefault(peer, []).append(ms)
    return [session for session in found if session]


def _cell(ms: float, tokens: int) -> str:
    return f"{ms:#.3g} ms, {tokens / ms:,.0f}k"


def _versions() -> str:
    rows: dict[str, Any] = {}
    for row in gpu_table.part(record(H200), "info"):
        rows |= row
    versions = rows["versions"]
    return (
        f"Driver {rows['driver']['driver_version']}, jax {versions['jax']}, cuDNN "
        f"{versions['nvidia-cudnn-cu13']}, PyTorch {versions['torch']}."
    )


def step_h200() -> str:
    """Train step against PyTorch."""
    lines = []
    for case, number, ours, attention, what, tokens in (
        ("17M", 0, "lm_jax", "cudnn", "`configs/wikitext2.py`, 17M, 16,384 tokens", 16_384),
        ("17M", 0, "lm_jax plain", "cudnn", "the same, one document", 16_384),
        (
            *("124M", 0, "lm_jax", "cudnn"),
            "`configs/gpt2_124m.py`, one micro-batch of 32 rows, 32,768 tokens",
            32_768,
        ),
        ("124M", 0, "lm_jax plain", "cudnn", "the same, one document", 32_768),
        ("124M", 1, "lm_jax pallas", "pallas", "the same step in another run", 32_768),
        ("124M", 1, "lm_jax pallas plain", "pallas", "that, one document", 32_768),
    ):
        ms = {p: statistics.median(blocks) for p, blocks in _sessions(case)[number].items()}
        torch = [ms.get(name) for name in ("torch flash", "torch cudnn")]
        fastest = min(time for time in torch if time)
        lines.append(
            (
                *(what, attention, _cell(ms[ours], tokens)),
                *(_cell(time, tokens) if time else "not measured" for time in torch),
                f"{fastest / ms[ours]:.2f}",
            )
        )
    heads = ["step, tokens/s", "attention", "this trainer", "PyTorch, flash", "PyTorch, cuDNN"]
    about = (
        "`python scripts/bench_step.py --device=gpu`, in turns, medians of five blocks of 0.25 s. "
        "PyTorch is compiled, under bfloat16 autocast, with fused AdamW. One document is a row "
        "that is not divided, as PyTorch's never is; its figure is the same for both "
        "rows of a model. The "
        'last two rows are `--cases=124M --peers="lm_jax,lm_jax pallas,lm_jax pallas plain,torch '
        'cudnn"`. At 17M PyTorch has the same matrix products in a plainer model: LayerNorm, GELU, '
        "learned positions, AdamW, no dropout, no average of the weights, no documents. At 124M "
        "model and batch are the same."
    )
    return tabled([*heads, "ratio to the faster"], lines, about, _versions(), measured(H200))


def step_h200_rest() -> str:
    """Uneven blocks, other attention and several updates in a call."""
    small, variants = _sessions("17M")[0], _sessions("17M variants")[0]
    ours = small["lm_jax"]
    torch = [ms for peer, blocks in small.items() if peer.startswith("torch") for ms in blocks]
    ms = {peer: statistics.median(blocks) for peer, blocks in variants.items()}
    first, later = _sessions("124M")
    masks = statistics.median(first["lm_jax"]) - statistics.median(first["lm_jax plain"])
    other = statistics.median(later["lm_jax pallas"]) - statistics.median(
        later["lm_jax pallas plain"]
    )
    return prose(
        f"PyTorch's blocks at 17M were uneven, {min(torch):.1f} to {max(torch):.1f} ms, against "
        f"{min(ours):.2f} to {max(ours):.2f} ms here: by its fastest block the ratio is "
        f"{min(torch) / statistics.median(ours):.2f}. At 124M the mask that keeps documents apart "
        f"costs this trainer {masks:.1f} ms in cuDNN and {other:.1f} ms in pallas. At 17M pallas "
        f"takes {ms['lm_jax pallas']:.2f} ms beside {ms['lm_jax']:.2f} of cudnn and "
        f"{ms['lm_jax xla']:.1f} of xla; 8 updates in a call take {ms['lm_jax x8']:.2f} ms each.",
        measured(H200),
    )


def _rows(part: str) -> dict[str, dict[str, Any]]:
    """The rows of a part by case, of attention those of the gradient."""
    rows = gpu_table.part(record(H200), part)
    return {r["case"]: r for r in rows if "peers" in r and r.get("pass") != "forward"}


def attention_h200() -> str:
    """One attention by every implementation."""
    peers = {
        **{name: name for name in ("cudnn", "pallas", "pallas_deterministic")},
        "torch flash": "PyTorch, flash",
        "torch cudnn": "PyTorch, cuDNN",
        "flash_attn3": "FlashAttention 3 in JAX",
    }
    lines = []
    for row in sorted(_rows("attention").values(), key=_size):
        shape = row["shape"]
        what = f"C {shape['C']}, T {shape['T']}, {shape['rows']} rows, {shape['H']} heads"
        if shape["documents"] > 1:
            what = f"the same, {shape['documents']} documents a row"
        times = [row["peers"].get(peer, {}).get("ms") for peer in peers]
        lines.append((what, *(f"{statistics.median(ms):.3f}" if ms else "-" for ms in times)))
    about = (
        "One attention, forward and backward, milliseconds, medians over turns in one process "
        "(`python scripts/bench_attention.py --device=gpu`). `auto` takes the faster of cudnn and "
        "pallas by this table. -: not measured."
    )
    return tabled(["bfloat16", *peers.values()], lines, about, measured(H200))


def _size(row: dict[str, Any]) -> tuple[int, ...]:
    return tuple(row["shape"][axis] for axis in ("C", "T", "documents"))


def loss_h200() -> str:
    """A linear layer with its loss."""
    lines = []
    for row in _rows("loss").values():
        shape = row["shape"]
        kind = "forward KL from a teacher" if shape["kind"] == "divergence" else shape["kind"]
        what = f"{kind}, {shape['tokens']:,} tokens, D {shape['width']}, V {shape['vocabulary']:,}"
        cells = [what]
        for peer in ("lm_jax", "materialised", "torch.compile"):
            found = row["peers"].get(peer, {})
            cells.append(
                f"{statistics.median(found['ms']):#.3g} ms, {found['temp_bytes'] / 1e9:.2f} GB"
                if found.get("ms")
                else "not measured"
            )
        lines.append(cells)
    heads = ["", "this trainer", "all logits at once", "PyTorch, compiled"]
    about = (
        "Forward and backward, bfloat16, medians over turns in one process "
        "(`python scripts/bench_loss.py --device=gpu`)."
    )
    return tabled(heads, lines, about, measured(H200))


def correct_h200() -> str:
    """Values on the GPU against float32."""
    rows = gpu_table.last(record(H200))
    wrong = sum(row.get("ok") is False for row in rows)
    refused = {row["case"] for row in rows if "refused" in row}
    who = dict.fromkeys(row["impl"] for row in rows if "refused" in row)
    checked = {r["case"] for r in rows if r["case"].startswith("attention") and "ok" in r}
    largest = max(
        error / row["limit"][name]
        for row in rows
        for name, error in row.get("error", {}).items()
        if error is not None
    )
    return prose(
        "Values on the same device against float32 with the highest precision, by "
        f"`python scripts/gpu_report.py --parts=correct`: {len(checked)} cases of attention, the "
        f"losses and whole updates; {wrong} were wrong, pallas with ten reruns of each "
        f"({' and '.join(who)} refuse the {len(refused)} with softcap or dropout). The largest "
        f"error was {largest:.2f} of what is allowed, which is twice that of the plain "
        "implementation in the same dtype and a little.",
        measured(H200),
    )


def wikitext2_h200() -> str:
    """WikiText-2 with the options of its config."""
    shipped = [row for row in gpu_table.part(record(H200), "train")]
    run = next(row for row in shipped if "wall_seconds" in row)
    first = {
        **{"dropout": 0.3, "weight_decay": 2.0, "updates": run["updates"]},
        "window_offset": True,
        "valid": [(row["valid_at"], row["word_ppl"]) for row in shipped if "valid_at" in row],
        "test_word_ppl": next(r["word_ppl"] for r in shipped if r.get("split") == "test"),
        "seconds": run["wall_seconds"],
    }
    arms = [first, *record("wikitext2_h200_arms.json"), figure("wikitext2_h200_fixed_40_epochs")]
    arms.sort(key=lambda arm: arm["test_word_ppl"] or float("inf"))
    about = (
        "One seed each; the checkpoint with the lowest valid perplexity is scored, in windows of "
        "512 without overlap, or with 384 tokens of context before each scored one "
        "(`--stride=128`). The row as shipped is `python scripts/gpu_report.py --parts=train`; the "
        "others are the config with the flags of their row and `--config.doctor=off`, several side "
        "by side on one card. On a T4, an A100, an H100 and several GPUs nothing is measured."
    )
    heads = ["dropout", "weight decay", "epochs", "other", "test word perplexity"]
    return tabled(
        [*heads, "with `--stride=128`", "valid, epoch by epoch"],
        map(_arm, arms),
        about,
        measured(H200, "wikitext2_h200_arms.json"),
    )


def _arm(arm: dict[str, Any]) -> tuple[object, ...]:
    """Cells of one row of the WikiText-2 table."""
    epoch = UPDATES_OF_AN_EPOCH[arm.get("batch_size", 32)]
    planned = {0.6: 40}.get(arm["dropout"], arm["updates"] // epoch)
    trained = arm["valid"][-1][0] // epoch
    other = [
        *(["as shipped"] if arm["weight_decay"] == 2.0 else []),
        *(["batches of 16 rows"] if arm.get("batch_size") == 16 else []),
        *(["`peak_lr` 8e-3"] if arm.get("peak_lr") == 8e-3 else []),
        *([] if arm["window_offset"] else ["fixed windows"]),
        *(["an older step"] if "seconds" in arm and "epochs" in arm else []),
    ]
    test = f"{arm['test_word_ppl']:.2f}" if arm["test_word_ppl"] else "not scored"
    if "seconds" in arm:
        test += f", {arm['seconds']:.0f} s from start to report"
    stride = arm.get("test_word_ppl_stride_128")
    return (
        *(arm["dropout"], arm["weight_decay"]),
        trained if trained == planned else f"{trained} of {planned}",
        ", ".join(other),
        test,
        f"{stride:.2f}" if stride else "not measured",
        ", ".join(
            f"{ppl:.1f} at {update // epoch}" for update, ppl in arm["valid"] if update >= 8 * epoch
        ),
    )


def aot() -> str:
    """The steps compiled for an H200."""
    programs = record("aot.json")["programs"]
    names = {
        "wikitext2": "`configs/wikitext2.py`, 16,384 tokens",
        "gpt2_124m": "`configs/gpt2_124m.py`, 491,520 tokens in 8 micro-batches",
        "gpt2_124m, xla, materialised": "the same with xla attention and all logits at once",
    }
    lines = [
        (
            what,
            f"{programs[name]['kernels']:,}",
            programs[name]["float32_products"],
            f"{programs[name]['roofline_ms']:,.1f} ms",
            f"{programs[name]['peak_bytes'] / 2**30:.1f} GiB",
        )
        for name, what in names.items()
    ]
    about = (
        f"Compiled for an H200 without one (jax {record('aot.json')['jax']}, `python "
        "scripts/aot.py`, which fails when a figure of `scripts/results/aot.json` gets worse): "
        "kernels that one update executes, products in float32 among them, the sum of their "
        "rooflines (4.0 TB/s, 790 TFLOP/s in 16 bits, 1.5 us a kernel at least) without "
        "attention's own kernels, and predicted peak memory. Nothing is run."
    )
    heads = ["step", "kernels", "float32 products", "roofline", "peak memory"]
    return tabled(heads, lines, about)


def meshes() -> str:
    """The steps compiled for several H200s."""
    programs = record("aot.json")["programs"]
    names = {
        "llama_110m fsdp 8": "`configs/llama_110m.py`, 8 rows a device, `mesh.fsdp=8`",
        "llama_110m fsdp 8, V 50,257": "the same with 50,257 ids",
        "llama_110m fsdp 64": "the first with `mesh.fsdp=64`",
        "llama_1b fsdp 8": "`configs/llama_1b.py`, 4 rows a device, `mesh.fsdp=8`",
        "gpt2_124m data 8": "`configs/gpt2_124m.py`, scanned, 60 rows a device, 8 copies",
        "gpt2_124m data 8, accumulation 4": "the same in 4 micro-batches",
    }
    kinds = ("all_gather", "reduce_scatter", "all_reduce")
    others = ("all_to_all", "ragged_all_to_all", "collective_permute")
    lines = [
        (
            what,
            *(programs[name].get(kind, 0) for kind in kinds),
            sum(programs[name].get(kind, 0) for kind in others),
            f"{programs[name]['sent_gib']:.2f} GiB",
            f"{programs[name]['peak_bytes'] / 2**30:.2f} GiB",
        )
        for name, what in names.items()
        if name in programs
    ]
    about = (
        f"Compiled for H200s without one (jax {record('aot.json')['jax']}, `python "
        "scripts/aot.py`): how often an update gathers, reduces and exchanges arrays, what a "
        "device sends for it in a ring, and predicted peak memory of a device. Nothing is run."
    )
    heads = ["update", *(kind.replace("_", "-") for kind in kinds), "others", "sent", "peak memory"]
    return tabled(heads, lines, about)


def plan() -> str:
    """What `scripts/plan.py` says of the shipped configs."""
    lines = []
    for arguments, found in record("plan.json")["plans"].items():
        compute, sending = found["compute"], found["communication"]
        fits, several = found["fits"], found["devices"] > 1
        lines.append(
            (
                f"`{arguments}`",
                f"{found['peak'] / 2**30:.1f} GiB, {'fits' if fits else 'does not fit'}",
                found["rows"],
                f"{found['sent'] / 2**30:,.1f} GiB" if several else "-",
                f"{found['tokens'] / max(compute, sending):,.0f}" if fits else "-",
                f"{found['tokens'] / (compute + sending):,.0f}" if fits and several else "-",
            )
        )
    about = (
        "Compiled without a GPU, not run: `python scripts/plan.py` with these arguments and "
        f"`--record`, jax {record('plan.json')['jax']} (`scripts/results/plan.json`). The tokens/s "
        "of all devices together are bounds by data sheets; none was measured."
    )
    heads = ["arguments", "peak memory of a device", "rows of a device at a time"]
    heads += ["sent by a device", "tokens/s at best", "if computation waits for communication"]
    return tabled(heads, lines, about)
