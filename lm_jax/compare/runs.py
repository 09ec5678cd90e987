"""Finished runs, read from their workdirs and grouped by what was trained."""

import dataclasses
import itertools
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lm_jax import config
from lm_jax.config import Config
from lm_jax.data.files import naming
from lm_jax.data.tokenizers.load import load_tokenizer
from lm_jax.ensemble import is_ensemble, recorded_members
from lm_jax.files import read_json
from lm_jax.models.families import size
from lm_jax.models.size import Size
from lm_jax.places import pulled
from lm_jax.workdir import DOCUMENTS, SCORES, TOKENIZER, read_metrics, read_record


@dataclasses.dataclass(frozen=True)
class Training:
    """A finished run as it was trained."""

    folder: pathlib.Path
    cfg: Config
    data: Mapping[str, Any]  # the manifest of its store
    tokens_seen: int
    tokens_per_second: float
    seconds: float
    curve: Mapping[str, list[float]]


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run, or an ensemble of several, and its evaluation of one split."""

    folder: pathlib.Path
    trained: tuple[Training, ...]  # one, or the members
    data: Mapping[str, Any]  # the manifest of their store
    result: Mapping[str, Any]  # eval_<split>.json
    documents: Mapping[str, np.ndarray]  # documents_<split>.npz
    ensemble: bool = False

    @property
    def cfg(self) -> Config:
        """Its config; of an ensemble that of the first member."""
        return self.trained[0].cfg

    @property
    def size(self) -> Size:
        """Parameters and FLOPs per token, of all members together."""
        vocab_size = self.data["vocab_size"]
        sizes = [size(one.cfg.model, vocab_size, one.cfg.data.seq_len) for one in self.trained]
        return Size(*map(sum, zip(*sizes, strict=True)))

    @property
    def tokens_seen(self) -> int:
        """Tokens seen in training, by all members together."""
        return sum(one.tokens_seen for one in self.trained)

    @property
    def tokenizer(self) -> str:
        """Kind of the tokenizer and number of its ids."""
        return f"{self.data['tokenizer_kind']} {self.data['vocab_size']:,}"

    @property
    def reads(self) -> tuple[str, int]:
        """What stands for its tokenizer: a hash, and the number of its ids."""
        return self.data["tokenizer_hash"], self.data["vocab_size"]


@dataclasses.dataclass(frozen=True)
class Arm:
    """The seeds of one config."""

    name: str
    runs: tuple[Run, ...]

    @property
    def bits_per_byte(self) -> np.ndarray:
        """Bits per byte of each seed."""
        return np.array([run.result["bits_per_byte"] for run in self.runs])

    @property
    def nats_D(self) -> np.ndarray:
        """Nats of each document, mean over seeds."""
        return np.mean([run.documents["nats"] for run in self.runs], axis=0)

    @property
    def size(self) -> Size:
        """Parameters and FLOPs per token."""
        return self.runs[0].size

    @property
    def members(self) -> list[str]:
        """The folders of an ensemble's runs; none of an arm of runs."""
        return [str(one.folder) for one in self.runs[0].trained if self.runs[0].ensemble]

    @property
    def bytes_seen(self) -> float:
        """Bytes of text seen in training, mean over seeds."""
        counts = self.runs[0].data["splits"]["train"]
        tokens = float(np.mean([run.tokens_seen for run in self.runs]))
        return tokens * counts["bytes"] / counts["tokens"]

    @property
    def settings(self) -> dict[str, Any]:
        """All settings that determine the trained model, without the seed."""
        run = self.runs[0]
        if run.ensemble:
            members = [(one.cfg.seed, _settings(one.cfg)) for one in run.trained]
            return {"members": members, "tokenizer": run.reads}
        return {**_settings(run.cfg), "tokenizer": run.reads}


def load_run(folder: pathlib.Path, split: str) -> Run:
    """Read a finished run and its evaluation of a split.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if the run is not finished, or its files do not belong together.
    """
    with naming(folder):
        return _load(folder, split)


def with_one_hash(runs: Sequence[Run]) -> list[Run]:
    """The runs, with one `tokenizer_hash` for tokenizers of several files that do the same.

    A workdir without its tokenizer keeps the hash of the file.
    """
    hashes = {}
    for run in runs if len({run.data["tokenizer_hash"] for run in runs}) > 1 else ():
        if (run.trained[0].folder / TOKENIZER).is_dir():
            tokenizer = load_tokenizer(run.trained[0].folder / TOKENIZER)
            hashes[tokenizer.content_hash] = tokenizer.identity
    return [
        dataclasses.replace(run, data={**run.data, "tokenizer_hash": hashes.get(own, own)})
        for run in runs
        for own in [run.data["tokenizer_hash"]]
    ]


def _load_training(folder: pathlib.Path) -> Training:
    record = read_record(folder)
    cfg, data = record.cfg, record.data
    rows = list(read_metrics(folder))
    training = [row for row in rows if "train/loss" in row]
    done = training[-1]["step"] if training else 0
    if done < int(cfg.train.steps):
        raise ValueError(
            f"{folder}: stopped after update {done} of {cfg.train.steps}; finish it with "
            f"`python -m lm_jax.main --config=FILE --workdir={folder}`."
        )
    return Training(
        folder=folder,
        cfg=cfg,
        data=data,
        tokens_seen=int(training[-1]["data/tokens"]),
        tokens_per_second=float(np.median([row["perf/tokens_per_second"] for row in training])),
        seconds=sum(row["perf/step_ms"] for row in training) / 1e3,
        curve=_curve(rows, training, data["splits"]["train"]),
    )


def _load(folder: pathlib.Path, split: str) -> Run:
    folders = [folder]
    if ensemble := is_ensemble(folder):
        folders = [pulled(one.folder) for one in recorded_members(folder)]
    trained = tuple(map(_load_training, folders))
    data = trained[0].data
    if split not in data["splits"]:
        raise ValueError(
            f"{folder}: its corpus has no {split} split; "
            f"give --split={' or --split='.join(data['splits'])}."
        )
    again = f"`python -m lm_jax.evaluate --workdir={folder} --split={split}`"
    names = SCORES.format(split), DOCUMENTS.format(split)
    for name in names:
        if not (folder / name).exists():
            raise FileNotFoundError(f"{folder}: has no {name}; write it with {again}.")
    result = read_json(folder / names[0])
    with (folder / names[1]).open("rb") as opened, np.load(opened, allow_pickle=False) as file:
        documents = dict(file)
    if result["loss"] is None:
        raise ValueError(f"{folder}: the loss in {names[0]} is not finite; leave this run out.")
    nats, tokens = result["loss"] * result["token_count"], documents["tokens"].sum()
    if tokens != result["token_count"] or not np.isclose(documents["nats"].sum(), nats, rtol=1e-5):
        raise ValueError(
            f"{folder}: {names[0]} and {names[1]} are of different evaluations; write both with "
            f"{again}."
        )
    return Run(folder, trained, data, result, documents, ensemble)


def _curve(rows: list, training: list, counts: Mapping[str, int]) -> dict[str, list[float]]:
    """Loss in bits per byte against tokens seen."""
    seen = {row["step"]: row["data/tokens"] for row in training}
    valid = [row for row in rows if row.get("valid/bits_per_byte") is not None]
    loss = np.array([row["train/loss"] for row in training], float)  # null becomes NaN
    bits = loss * counts["tokens"] / counts["bytes"] / math.log(2)
    finite = np.flatnonzero(np.isfinite(bits))
    stretches = [s for s in np.array_split(finite, 100) if len(s)]
    return {
        "valid_tokens": [seen[row["step"]] for row in valid],
        "valid_bits_per_byte": [row["valid/bits_per_byte"] for row in valid],
        "train_tokens": [training[s[-1]]["data/tokens"] for s in stretches],
        "train_bits_per_byte": [float(bits[s].mean()) for s in stretches],
    }


def group_runs(runs: Sequence[Run]) -> list[Arm]:
    """Group runs into arms by the names of their folders.

    Raises:
        ValueError: if two runs of an arm differ in more than the seed, or have the same one.
    """
    by_name: dict[str, list[Run]] = {}
    for run in runs:
        name = run.folder.resolve().name
        name = name if run.ensemble else name.removesuffix(f"-{run.cfg.seed}")
        by_name.setdefault(name, []).append(run)
    arms = []
    for name, members in by_name.items():
        members.sort(key=lambda run: run.cfg.seed)
        for a, b in itertools.pairwise(members):
            _require_seeds(name, a, b)
        arms.append(Arm(name, tuple(members)))
    return arms


def _require_seeds(name: str, a: Run, b: Run) -> None:
    both = f"{a.folder} and {b.folder} are taken for seeds of {name!r}"
    if a.ensemble or b.ensemble:
        raise ValueError(f"{both}, but an ensemble is an arm of its own; rename its folder.")
    if a.cfg.seed == b.cfg.seed:
        raise ValueError(f"{both}, but both have seed {a.cfg.seed}; leave one out.")
    ours, others = ({**_settings(run.cfg), "eval.stride": run.result["stride"]} for run in (a, b))
    for path in ours:
        if ours[path] != others[path]:
            raise ValueError(
                f"{both}, but config.{path} is {ours[path]!r} in one and {others[path]!r} "
                "in the other; rename a folder to make it an arm of its own."
            )
    if a.reads != b.reads:
        raise ValueError(f"{both}, but their tokenizers differ; rename a folder.")


def _settings(cfg: Config) -> dict[str, Any]:
    left_out = {"seed", *config.incidental_fields()}
    return {
        path: value
        for path, value in config.named_fields(cfg)
        if path not in left_out and not path.startswith("tokenizer.")  # it is compared itself
    }
