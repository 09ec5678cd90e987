"""The folder of a run, seen without JAX: its name, how far the run in it is, who trains there."""

import collections
import contextlib
import dataclasses
import errno
import hashlib
import json
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from lm_jax import config
from lm_jax.config import Config, ConfigError, rules
from lm_jax.files import locked, read_json, remove_halves, user_path

RECORD = "config.json"
SCORES = "eval_{}.json"  # of a split
REPORT = "report.html"
CHECKPOINTS, BEST = "checkpoints", "best"
# What reading a record raises that is not as a run writes it.
UNREADABLE = (
    *(ArithmeticError, AttributeError, LookupError, OSError, RecursionError),
    *(TypeError, ValueError),
)
_LOCK = ".lock"
_LONGEST = 80  # characters that say what was changed
_READABLE = re.compile(r"[\w.+@-]{1,40}")


@dataclasses.dataclass(frozen=True)
class State:
    """What a folder holds."""

    position: int  # updates in its newest checkpoint
    steps: int  # updates of the whole run
    asked: Config | None  # the config as it was last given; None: from before it was kept
    splits: list[str]  # that are scored at its end
    finished: bool  # whether it went to its end and they were

    def __str__(self) -> str:
        """In words."""
        how = "finished, " if self.finished else ""
        return f"{how}update {self.position:,} of {self.steps:,} is saved"

    def answers(self, cfg: Config) -> bool:
        """Whether the run was asked for by this config, apart from its incidental fields."""
        return self.asked is not None and not changes(self.asked, cfg)


def read_state(workdir: pathlib.Path) -> State | None:
    """How far the run in a folder is; None if there is no checkpoint of one.

    Raises:
        ConfigError: if its record is not as a run writes it.
    """
    position = newest_update(workdir)
    if position is None:
        return None
    path = workdir / RECORD
    try:
        record = json.loads(path.read_text())
        asked = config.from_dict(record["asked"]) if "asked" in record else None
        cfg = config.from_record(record)
        splits = rules.eval_splits(cfg, record["data"]["splits"])
        scored = all((workdir / SCORES.format(split)).exists() for split in splits)
        steps = int(cfg.train.steps)
        return State(position, steps, asked, splits, finished=scored and position >= steps)
    except UNREADABLE as error:
        raise unreadable(path, error) from error


def report_is_old(workdir: pathlib.Path) -> bool:
    """Whether the page of a run was not written after its scores: a kill came between."""
    page, scores = workdir / REPORT, workdir.glob(SCORES.format("*"))
    return not page.exists() or any(
        path.stat().st_mtime_ns > page.stat().st_mtime_ns for path in scores
    )


def read_scores(workdir: pathlib.Path) -> dict[str, dict[str, Any]]:
    """The values of each `eval_<split>.json` of a run that is there, by split."""
    return {
        split: read_json(path)
        for split in ("valid", "test", "train")
        if (path := workdir / SCORES.format(split)).exists()
    }


def unreadable(record: pathlib.Path, error: Exception) -> ConfigError:
    """What is said of a record that is not as a run writes it."""
    what = f"{type(error).__name__}: {error}".rstrip(".")
    return ConfigError(f"{record}: not as a run writes it ({what}); restore the file.")


def refuse_older(config_json: pathlib.Path, record: dict[str, Any]) -> None:
    """Refuse a run whose checkpoints have another layout than those of this version.

    Version 0.1 kept the parameters layer by layer, this one keeps all layers in one array.

    Raises:
        ConfigError: naming the version that can go on.
    """
    versions = record.get("versions")
    version = str(versions.get("lm_jax")) if isinstance(versions, dict) else ""
    if version.startswith("0.1."):
        raise ConfigError(
            f"{config_json}: the run was made by lm_jax {version}, whose checkpoints this version "
            "does not read; go on with that one, or train anew in another --workdir."
        )


def newest_update(workdir: pathlib.Path) -> int | None:
    """The update of the newest finished checkpoint of a run."""
    return max(updates(workdir / CHECKPOINTS), default=None)


def updates(folder: pathlib.Path) -> list[int]:
    """The updates of the finished checkpoints in a folder of them, which are their names."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdigit())


@contextlib.contextmanager
def occupied(workdir: pathlib.Path) -> Iterator[None]:
    """Make the folder, and hold it for one trainer; those that read it are not kept out.

    Raises:
        ConfigError: if another trainer holds it.
    """

    def refuse(holder: str) -> None:
        raise ConfigError(
            f"{workdir}: {holder} is training there; wait for it, or give another --workdir."
        ) from None

    workdir.mkdir(parents=True, exist_ok=True)
    with locked(workdir / _LOCK, refuse):
        remove_halves(workdir)
        yield


_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room there"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "make it writable"),
    errno.EIO: "look at the disk",
}


@contextlib.contextmanager
def disk_told(workdir: pathlib.Path, cache_dir: str) -> Iterator[None]:
    """Let an error of the disk inside say which flag names the place, and what helps.

    Raises:
        RuntimeError: if the folder was removed.
    """
    there = workdir.exists()
    try:
        yield
    except OSError as error:
        if there and not workdir.exists():
            raise RuntimeError(
                f"{workdir}: was removed while the run went on, and with it the run."
            ) from error
        remedy = _REMEDIES.get(error.errno or 0)
        if remedy is None:
            raise
        path = pathlib.Path(error.filename or workdir).absolute()
        places = {"config.data.cache_dir": user_path(cache_dir), "--workdir": workdir}
        named = (flag for flag, place in places.items() if path.is_relative_to(place.absolute()))
        if (flag := next(named, None)) is None:
            raise
        then = f"{remedy} and give the same command, which goes on, or give another {flag}"
        raise OSError(error.errno, f"{error.strerror}; {then}", str(path)) from error


def changes(old: Config, new: Config) -> dict[str, Any]:
    """The fields of `new` that make it another run than `old`, by dotted path."""
    before, free = dict(config.named_fields(old)), config.incidental_fields()
    return {
        path: value
        for path, value in config.named_fields(new)
        if value != before[path] and path not in free
    }


def run_name(spec: str, seed: int, changed: Mapping[str, Any] | None = None) -> str:
    """The folder of a run: `phase1-emb25-0` for `configs/phase1.py:emb25` and seed 0.

    What was changed on the command line stands before the seed, `phase1-emb25-peak_lr0.01-0`. The
    length does not: the same command with more `train.steps` finds its run and lengthens it.
    """
    path, _, arm = spec.partition(":")
    return "-".join(filter(None, [pathlib.Path(path).stem, arm, _label(changed or {}), str(seed)]))


def other_name(name: str, old: Config, new: Config) -> str:
    """A name beside `name`, the folder of a run of `old`, for a run of `new`."""
    label = _label(changes(old, new)) or f"steps{new.train.steps}"
    return f"{name.removesuffix(f'-{old.seed}')}-{label}-{new.seed}"


def _label(changed: Mapping[str, Any]) -> str:
    """What was changed, short and fit for a file system."""
    free = {"seed", "train.steps", *config.incidental_fields()}
    fields = [path for path, _ in config.named_fields(Config()) if path not in free]
    times = collections.Counter(path.rpartition(".")[2] for path in fields)
    parts = []
    for path, value in changed.items():
        if path in free:
            continue
        last = path.rpartition(".")[2]
        name = last if times[last] == 1 else path.replace(".", "_")
        text = str(value).replace(" ", "").rpartition("/")[2]
        text = text if _READABLE.fullmatch(text) else _hash(str(value))
        parts.append(f"{name}{text}" if text[0].isdigit() else f"{name}_{text}")
    label = "-".join(parts)
    return label if len(label) <= _LONGEST else _hash(label)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
