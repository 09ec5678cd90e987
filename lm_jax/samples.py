"""Samples of a run, and the file in its workdir that keeps them."""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from lm_jax import page
from lm_jax.files import write_text
from lm_jax.workdir import SAMPLES, read_rows


@dataclasses.dataclass(frozen=True)
class Sample:
    """A prompt and one continuation of it."""

    prompt: str
    text: str  # the continuation alone, before the first stop string
    # its tokens, to that which completed a stop string
    ids: list[int] = dataclasses.field(repr=False)
    # nats, of each token under the model itself: temperature 1, no cuts
    log_probs: list[float] = dataclasses.field(repr=False)
    step: int  # updates behind the parameters that wrote it


def sample_html(prompt: str, text: str) -> str:
    """One as a part of a page; the prompt is bold."""
    return f'<p class="panel sample"><b>{escape(prompt)}</b>{escape(text)}</p>'


class Samples(list[Sample]):
    """Samples, which show themselves as text; so does a slice of them."""

    def __getitem__(self, at: Any) -> Any:
        """One, or those of a slice."""
        found = super().__getitem__(at)
        return Samples(found) if isinstance(at, slice) else found

    def __repr__(self) -> str:
        """One after the other, each with its number."""
        texts = (f"{one.prompt}{one.text}" for one in self)
        told = [f"--- sample {n} of {len(self)}\n{text}" for n, text in enumerate(texts, start=1)]
        return "\n".join(told) or "no samples"

    def _repr_html_(self) -> str:
        """One after the other; the prompts are bold."""
        shown = "".join(sample_html(one.prompt, one.text) for one in self)
        return page.fragment(shown or '<p class="soft">no samples</p>')


def record_samples(folder: pathlib.Path, facts: Mapping[str, Any], made: Iterable[Sample]) -> None:
    """Append samples to `samples.jsonl` in a workdir, each with how it was made."""
    with (folder / SAMPLES).open("a") as file:
        for one in made:
            file.write(json.dumps({**facts, **dataclasses.asdict(one)}) + "\n")


def drop_samples(folder: pathlib.Path, after: int) -> None:
    """Remove the samples of evaluations that come again: those of later updates than `after`."""

    def again(row: Mapping[str, Any]) -> bool:
        step = row.get("step")
        return bool(row.get("evaluation")) and isinstance(step, int) and step > after

    rows = list(read_rows(folder / SAMPLES))
    kept = [row for row in rows if not again(row)]
    if len(kept) < len(rows):
        write_text(folder / SAMPLES, "".join(json.dumps(row) + "\n" for row in kept))


def read_samples(folder: pathlib.Path) -> Samples:
    """Those that were appended, oldest first."""
    names = [field.name for field in dataclasses.fields(Sample)]
    rows = (row for row in read_rows(folder / SAMPLES) if row.keys() >= {*names})
    return Samples(Sample(**{name: row[name] for name in names}) for row in rows)
