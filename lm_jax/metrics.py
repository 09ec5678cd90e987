"""Sums to readable numbers: loss, perplexities, bits per byte, throughput, MFU."""

import dataclasses
import math
import re
import sys
from collections.abc import Mapping
from typing import Any

from lm_jax.config import Config
from lm_jax.models.families import size

# Dense 16-bit tensor-core FLOP/s from the makers' data sheets, by the words of the device name that
# must all be there; the first that fits counts. SXM where no other form is named.
_PEAK_FLOPS = {
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L4": 121e12,
    "V100 PCIE": 112e12,
    "V100": 125e12,
    "T4": 65e12,
}
LONGEST_WORD = 20  # mean bytes of a word, where words are a unit of the text
_MAX_NATS = math.log(sys.float_info.max)


@dataclasses.dataclass(frozen=True)
class Sums:
    """Sums of an evaluation over batches, devices and hosts."""

    nats: float = 0.0
    count: float = 0.0
    correct: float = 0.0

    def __add__(self, other: "Sums") -> "Sums":
        """Merge two parts of a split."""
        return Sums(self.nats + other.nats, self.count + other.count, self.correct + other.correct)


def summarise(sums: Sums, *, split_bytes: int, split_words: int) -> dict[str, float]:
    """Loss and its readings for a whole split.

    Args:
        sums: over every target of the split.
        split_bytes: UTF-8 bytes of the split's text.
        split_words: words of the split's text, line ends included.

    Returns:
        `loss` in nats per token, `token_ppl` = exp(loss), `word_ppl` = exp(nats / words),
        `bits_per_byte` = nats / (bytes ln 2), `accuracy` and `token_count`. Nothing is capped;
        what float64 cannot hold is inf.
    """
    return {
        "loss": sums.nats / sums.count,
        "token_count": int(sums.count),
        "token_ppl": exp(sums.nats / sums.count),
        "word_ppl": exp(sums.nats / split_words) if split_words else math.inf,
        "bits_per_byte": sums.nats / split_bytes / math.log(2),
        "accuracy": sums.correct / sums.count,
    }


def has_words(result: Mapping[str, float]) -> bool:
    """Whether a perplexity per word says something: white space divides the text into words.

    Args:
        result: of `summarise`, perhaps read from JSON.
    """
    nats_per_byte = (result.get("bits_per_byte") or 0) * math.log(2)
    nats_per_word = math.log(result.get("word_ppl") or math.inf)  # JSON has null for inf
    return nats_per_word <= LONGEST_WORD * nats_per_byte


def exp(nats: float) -> float:
    """Perplexity of a mean of nats; inf above what float64 holds."""
    return math.inf if nats > _MAX_NATS else math.exp(nats)  # of nan: nan


def flops_per_token(cfg: Config, vocab_size: int, seq_len: int) -> float:
    """FLOPs of one token in training with rows of this length, see `models.families.size`."""
    return size(cfg.model, vocab_size, seq_len).flops


def peak_flops(device_kind: str, compute_dtype: str, devices: int) -> float | None:
    """FLOP/s of all devices together, or None where it is not known."""
    if compute_dtype == "float32":
        return None
    words = set(re.split("[ -]", device_kind))  # an L40S is no L4
    fitting = (peak for name, peak in _PEAK_FLOPS.items() if words.issuperset(name.split()))
    peak = next(fitting, None)
    return peak and peak * devices


def throughput(
    *,
    tokens: float,
    seconds: float,
    steps: int,
    input_wait: float,
    flops: float,
    peak: float | None,
) -> dict[str, Any]:
    """Speed of one call of the step.

    Args:
        tokens: tokens predicted in it, over all devices.
        seconds: its wall time.
        steps: updates in it.
        input_wait: seconds of it spent waiting for data.
        flops: FLOPs per token.
        peak: FLOP/s of all devices, or None.
    """
    row = {
        "perf/tokens_per_second": tokens / seconds,
        "perf/step_ms": 1e3 * seconds / steps,
        "perf/input_wait": input_wait / seconds,
    }
    if peak:
        row["perf/mfu"] = tokens / seconds * flops / peak
    return row
