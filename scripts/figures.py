"""Fill the figures of README.md and docs/ from `scripts/results/`, so that none is stale.

    python scripts/figures.py           # write every block anew
    python scripts/figures.py --check   # name the blocks that are not current; exit code 1
    python scripts/figures.py --list    # print every block

In Markdown a block stands between two comments, each alone on its line, with an empty line inside:

    <!-- figures: quickstart -->

    (a table or sentences, written by this script: change nothing here)

    <!-- end -->

A measured number (ms, tokens/s, GB, perplexity, "1.3x", ...) stands in README.md and docs/ nowhere
else; `pytest tests/test_docs.py` holds that. A block says on which device, when and by what command
its figures were measured. A new figure is a record in `scripts/results/` and a function beside the
others, in `figures_cpu.py`, `figures_gpu.py` or `figures_studies.py`; its name is the name of the
block, with hyphens.

| block | tells |
|---|---|
| `quickstart` | one sentence: loss, entropy rate and time of `configs/quickstart.py` |
| `runs` | table of whole runs on 2 CPU cores: quickstart, WikiText-2, Tiny Shakespeare |
| `newcomer` | sentences: the first two runs of the README |
| `own-text` | one sentence: time and bits per byte of `configs/text.py` on a megabyte |
| `optimisers` | Tiny Shakespeare by AdamW and by Muon |
| `start` | first update of a first and of a second start |
| `overlap` | what several processes no longer wait for |
| `loop` | waiting for input, evaluation against the forward part, first update |
| `doctor` | seconds and number of checks, fast and full |
| `baselines` | WikiText-2 by words: perplexity of counting, and of the neural baseline |
| `decoding` | table: tokens/s against Hugging Face transformers |
| `step-cpu` | table: train step against PyTorch |
| `attention-cpu` | table: blockwise attention against xla |
| `loss-cpu` | table: fused loss and divergence against all logits at once |
| `stream` | table: tokenising and reading up to 2.15 GB |
| `stream-rest` | sentences: hashing, opening, reading, formats, references, doctor of that corpus |
| `stream-long` | sentence: memory that one long document takes |
| `temperature` | table: what the temperature does to divergence and gradient |
| `gradients` | sentence: the table of verified gradients |
| `musota` | table, verdict and step time of MU-SOTA against dense models |
| `phase1` | table and verdict: where 10M parameters go |
| `distillation` | table, verdict and step time of the distillation study |
| `ensemble` | table: four models, their mean and a student of it |
| `soak` | table: kills, signals, full disks, damaged files, and what was lost |
| `small-corpus` | table and verdict: options for a small corpus |
| `step-h200` | table: train step against PyTorch on an H200 |
| `step-h200-rest` | sentences: uneven blocks, pallas, xla and 8 updates a call at 17M |
| `attention-h200` | table: one attention, all implementations |
| `loss-h200` | table: linear layer with its loss |
| `correct-h200` | sentence: values on the GPU against float32 |
| `wikitext2-h200` | table: WikiText-2 arms |
| `aot` | table: kernels, roofline and memory of the steps compiled for an H200 |
| `meshes` | table: what the devices send one another, of the steps compiled for several H200s |
| `plan` | table: memory, traffic and bounds of the shipped configs on several GPUs |
"""

import inspect
import pathlib
import re
from collections.abc import Callable, Iterable

import figures_cpu
import figures_gpu
import figures_studies
from records import ROOT

from lm_jax.config.manual import script_parser

BLOCKS: dict[str, Callable[[], str]] = {
    name.replace("_", "-"): function
    for module in (figures_cpu, figures_gpu, figures_studies)
    for name, function in vars(module).items()
    if inspect.isfunction(function)
    if function.__module__ == module.__name__ and not name.startswith("_")
}
BLOCK = re.compile(r"^<!-- figures: (\S+) -->\n(.*?)^<!-- end -->$", re.MULTILINE | re.DOTALL)


def pages() -> list[pathlib.Path]:
    """The Markdown files that may hold blocks."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def filled(text: str) -> str:
    """The Markdown with every block written anew.

    Raises:
        ValueError: for a block whose name is unknown, or that has no end.
    """

    def block(match: re.Match[str]) -> str:
        if match[1] not in BLOCKS:
            raise ValueError(f"figures: {match[1]} is no block; write one of {', '.join(BLOCKS)}.")
        if "<!-- figures:" in match[2]:
            raise ValueError(f"figures: {match[1]} has no end; write <!-- end --> after it.")
        return f"<!-- figures: {match[1]} -->\n\n{BLOCKS[match[1]]().strip()}\n\n<!-- end -->"

    return BLOCK.sub(block, text)


def stale(paths: Iterable[pathlib.Path]) -> dict[pathlib.Path, str]:
    """The files of which a block is not current, with the text that they should have."""
    texts = {path: (path.read_text(), filled(path.read_text())) for path in paths}
    return {path: new for path, (old, new) in texts.items() if old != new}


def main() -> None:
    """Write, check or print the blocks."""
    parser = script_parser(__doc__)
    parser.add_argument("--check", action="store_true", help="name what is not current")
    parser.add_argument("--list", action="store_true", help="print every block")
    args = parser.parse_args()
    if args.list:
        for name, block in BLOCKS.items():
            print(f"<!-- figures: {name} -->\n\n{block().strip()}\n\n<!-- end -->\n")
        return
    found = stale(pages())
    for path, text in found.items():
        print(f"{path.relative_to(ROOT)}: {'not current' if args.check else 'written'}")
        if not args.check:
            path.write_text(text)
    if args.check and found:
        raise SystemExit("run `python scripts/figures.py`")


if __name__ == "__main__":
    main()
