"""Run the planted faults of the doctor's tests and write the table of what caught them.

    python scripts/fault_table.py

Writes `lm_jax/doctor/FAULTS.md`. A row is a test that plants the fault in a small but real setting
and passes only if the named check reports it and is silent on the healthy twin.
"""

import collections
import pathlib
from typing import Any

import pytest

from lm_jax.config.manual import script_parser

ROOT = pathlib.Path(__file__).parents[1]
TABLE = ROOT / "lm_jax" / "doctor" / "FAULTS.md"
FAULTS = """
1 no label shift: the target is visible
2 labels shifted twice
3 shift crosses a row boundary
4 padding used as a target
5 numerator and denominator count different tokens
6 sum of the loss back-propagated
7 end of document never a target
8 batch without a scored token gives NaN
9 label outside the vocabulary accepted
10 input id outside the table
11 smoothing or auxiliary loss in the reported perplexity
12 loss computed in bfloat16
13 no causal mask
14 causal mask off by one
15 leak inside a chunk only
16 leak through FFT, time mean or normalisation over time or batch
17 leak through input features
18 leak hidden behind a zero gate
19 mask right in one backend and wrong in another
20 padding mask replaces the causal mask
21 attention uses batch row 0 only
22 attention over the batch axis
23 reshape without transpose
24 packed documents attend to each other
25 fully masked rows give NaN or garbage
26 wrong positions in cached decoding
27 wrong window or grouping of heads
28 attention probabilities after dropout, or softmaxed twice
29 windows cut before the split
30 training stream runs into the evaluation range
31 workers cover the data partly and twice
32 every host reads the same data
33 same order every epoch
34 diversity check without power
35 resume replays data
36 overlapping training windows counted as data
37 batches of near-identical rows
38 unknown words dropped
39 tokenizer differs between places, or collapses
40 dummy data in place of the corpus
41 one short line a row, empty rows kept
42 evaluation split contained in training, or test equals valid
43 whitespace destroyed before tokenising
44 mean of micro-batch means
45 schedule sized in micro-batches
46 optimiser never steps
47 config keys ignored
48 arms ranked inside the noise
49 weight decay on norms and biases
50 clipping before unscaling, per micro-batch or per device
51 bfloat16 weights or moments
52 decay smaller than the resolution of the weights
53 non-finite parts replaced by 0
54 clipping spreads an infinity to all parameters
55 where hides a NaN from the loss but not from the gradient
56 learning rate 0 at first, or warm-up longer than the run
57 dropout key reused
58 dropout left on in evaluation
59 all layers initialised alike
60 positions drown tokens, or a loss far from ln V at the start
61 tied embedding not tied
62 parameter count claimed is not the real one
63 throughput or token budget impossible
64 average of weights without warm-up
65 backward pass of another function
66 finite difference too small for float32
67 uninitialised gradient buffers
68 kernel tested on toy sizes only
69 padding keys enter the softmax
70 perplexity aggregated wrongly
71 perplexity capped
72 perplexity of the whole objective
73 more tokens evaluated than there are
74 perplexity below any plausible floor
75 worse than trivial baselines, unnoticed
76 perplexities compared across tokenizers
77 teacher-forced loss and generation disagree
78 faults of the sampler
79 evaluation on a varying subset
80 sliding windows score tokens twice
81 temperature squared missing or twice
82 wrong direction or axis of the KL divergence
83 gradient reaches the teacher
84 teacher in training mode
85 no distillation at all
86 teacher outputs misaligned
87 teacher and student swapped
88 KL divergence in bfloat16
89 vocabulary mismatch papered over
90 teacher states leak later positions
91 top-k union with duplicates
92 raw and weighted terms under one name
93 curriculum counted in micro-steps
94 epsilon outside the logarithm, clamps that end gradients
95 contrastive loss over a tiny batch
"""


class Planted:
    """Collects the marked tests that pass, as a pytest plugin."""

    def __init__(self) -> None:
        """Start empty."""
        self.marks: dict[str, list[tuple[int, str, str]]] = {}
        self.caught: dict[int, list[tuple[str, str, str, float]]] = collections.defaultdict(list)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Note the faults of each test; keep only tests that plant one."""
        for item in items:
            if found := planted_by(item):
                self.marks[item.nodeid] = found
        items[:] = [item for item in items if item.nodeid in self.marks]

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Note a test that passed."""
        if report.when == "call" and report.passed:
            test = report.nodeid.split("/")[-1]
            for number, check, status in self.marks[report.nodeid]:
                self.caught[number].append((check, status, test, report.duration))


def planted_by(item: pytest.Item) -> list[tuple[int, str, str]]:
    """Number, check and status of the faults that a test plants."""

    def mark(number: int, check: str, status: str = "fail") -> tuple[int, str, str]:
        return number, check, status

    return [mark(*m.args, **m.kwargs) for m in item.iter_markers("fault")]


def names() -> dict[int, str]:
    """Number and name of every fault."""
    rows = (line.split(" ", 1) for line in FAULTS.strip().splitlines())
    return {int(number): name for number, name in rows}


def main() -> None:
    """Run the tests and write the table."""
    script_parser(__doc__).parse_args()
    planted = Planted()
    outcome = pytest.main(["-n0", "-q", str(ROOT / "tests" / "doctor")], plugins=[planted])
    if outcome:
        raise SystemExit("some planted faults were not caught; the table is left as it is")
    if missing := set(names()) - set(planted.caught):
        raise SystemExit(f"no test plants {sorted(missing)}; the table is left as it is")
    lines = [
        "# Faults planted and caught",
        "",
        f"{len(names())} faults. Written by `python scripts/fault_table.py`, which runs the tests; "
        "seconds on CPU, plant, check and healthy twin together. Where a check can only warn, its "
        "evidence is compatible with a healthy run as well.",
        "",
        "| fault | what is wrong | check | finding | seconds | test |",
        "|---|---|---|---|---|---|",
    ]
    for number in names():
        best: dict[tuple[str, str], tuple[str, float]] = {}
        for check, status, test, seconds in planted.caught[number]:
            best.setdefault((check, status), (test, seconds))
        for (check, status), (test, seconds) in best.items():
            what = f"| {number} | {names()[number]} | `{check}` | {status} "
            lines.append(f"{what}| {seconds:.1f} | `{test}` |")
    TABLE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
