"""The files of a run, in its folder: their names, its record and log, and its parameters."""

import contextlib
import dataclasses
import datetime
import functools
import importlib.metadata
import itertools
import json
import pathlib
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

import lm_jax
from lm_jax import config, rundir, sharding
from lm_jax.checkpoint import Kept, abstract_like, find_kept, first_good, kept_in
from lm_jax.compilations import keep_compilations
from lm_jax.config import Config, ConfigError
from lm_jax.data.open import open_data
from lm_jax.data.store import Store, same_data
from lm_jax.data.tokenizers.base import Tokenizer
from lm_jax.data.tokenizers.load import load_tokenizer
from lm_jax.files import write_json
from lm_jax.models.families import choose_attention, create_model
from lm_jax.rundir import RECORD, REPORT, SCORES

TOKENIZER = "tokenizer"
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
DOCUMENTS = "documents_{}.npz"  # of a split
TEACHER = "teacher.json"
AGREEMENT = "distillation.json"
DOCTOR = "doctor.json"
WATCH = "watch.json"
RESULTS = (METRICS, SCORES, DOCUMENTS, TEACHER, AGREEMENT, DOCTOR, WATCH, REPORT)


@dataclasses.dataclass(frozen=True)
class Record:
    """The record that a run writes before its first update."""

    path: pathlib.Path
    cfg: Config  # resolved
    asked: Config | None  # as written; None: from before it was kept
    data: Mapping[str, Any]  # the manifest of its store
    devices: Sequence[str]  # their kinds


def read_record(workdir: pathlib.Path, *, checkpoints: bool = False) -> Record:
    """Read the `config.json` of a run; a field that came later has its default.

    Args:
        workdir: folder of the run.
        checkpoints: whether the caller reads its checkpoints too, which must then be of a version
            whose layout this one reads.

    Raises:
        FileNotFoundError: if there is no such file.
        ConfigError: if the file is not as a run writes it, or the version cannot be read.
    """
    path = workdir / RECORD
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; give the workdir of a run.")
    try:
        read = json.loads(path.read_text())
        asked = config.from_dict(read["asked"]) if "asked" in read else None
        record = Record(path, config.from_record(read), asked, read["data"], read["devices"])
        _ = record.data["vocab_size"], record.data["splits"]["train"]["tokens"], record.devices[0]
    except rundir.UNREADABLE as error:
        raise rundir.unreadable(path, error) from error
    if checkpoints:
        rundir.refuse_older(path, read)
    return record


def record_config(
    workdir: pathlib.Path, cfg: Config, store: Store, *, asked: Config, start: Any = None
) -> None:
    """Write `config.json` and the tokenizer of a new run.

    Args:
        workdir: folder of the run.
        cfg: the config as resolved here.
        store: the data.
        asked: the config as written.
        start: what is kept of where its first state comes from; None if it is drawn.
    """
    if jax.process_index():
        return
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    record = _configs(cfg, asked) | {
        "started": _now(),
        "versions": {"python": platform.python_version(), "lm_jax": lm_jax.__version__}
        | {name: importlib.metadata.version(name) for name in packages},
        "devices": [device.device_kind for device in jax.devices()],
        "git_revision": git_revision(),
        "data": store.manifest,
    }
    if start is not None:
        record["start"] = start
    shutil.copytree(store.path / TOKENIZER, workdir / TOKENIZER, dirs_exist_ok=True)
    write_json(workdir / RECORD, record)


def resume_record(
    workdir: pathlib.Path, cfg: Config, store: Store, *, asked: Config, position: int
) -> Config:
    """Compare `config.json` with the config and the data that a run is to go on with; renew it.

    Other incidental fields, other places of the same data and another length are possible. Where
    the length changes, what was scored at the old end is removed. `train.eval_every` must stay: it
    decides between which checkpoints the best is chosen.

    Args:
        workdir: folder of the run.
        cfg: the config as resolved here.
        store: the data.
        asked: the config as written.
        position: updates that the run has behind it.

    Returns:
        The config that was there.

    Raises:
        ConfigError: if a run with another config or other data lives in the workdir, naming the
            fields, or if it is longer already.
    """
    old = read_record(workdir, checkpoints=True)
    _require_same(old, cfg, store, asked)
    before, steps = int(old.cfg.train.steps), int(cfg.train.steps)
    if steps < before and steps <= position:
        raise ConfigError(
            f"config.train.steps: {steps:,} is not beyond update {position:,}, which the run in "
            f"{workdir} has reached; give more, or {_elsewhere(old, cfg, asked)}."
        )
    if jax.process_index() == 0:
        written = json.loads(old.path.read_text())
        record = written | _configs(cfg, asked)
        if steps != before:
            clear_results(workdir, SCORES, DOCUMENTS, AGREEMENT, WATCH)
            change = {"from": before, "to": steps, "at": position, "when": _now()}
            record["lengthened"] = [*record.get("lengthened", ()), change]
        if record != written:
            write_json(old.path, record)
    return old.cfg


def _configs(cfg: Config, asked: Config) -> dict[str, Any]:
    """What a record says of a config."""
    resolved, written = config.to_dict(cfg), config.to_dict(asked)
    return {"config": resolved, "hash": config.config_hash(cfg), "asked": written}


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _elsewhere(old: Record, cfg: Config, asked: Config) -> str:
    """The flag for a run of a config, here as resolved and as written, beside that of `old`."""
    before, now = (old.asked, asked) if old.asked else (old.cfg, cfg)
    there = old.path.parent
    named = there.with_name(rundir.other_name(there.name, before, now))
    return f"--workdir={shlex.quote(str(named))}"


# Where data lie, which their hashes know better.
_PLACES = {"data.files", "data.valid_files", "data.test_files", "tokenizer.folder"}
# What a length cuts short: another length does so elsewhere.
_CUT = ("data.growth", "optim.warmup", "optim.decay")


def _require_same(old: Record, cfg: Config, store: Store, asked: Config) -> None:
    own, here = old.cfg.train.compute_dtype, cfg.train.compute_dtype
    if asked.train.compute_dtype == "auto" and own != here:
        raise ConfigError(
            f"config.train.compute_dtype: 'auto' is {here} on this device, and the run in "
            f"{old.path.parent} computes in {own}; give --config.train.compute_dtype={own} to go "
            "on."
        )
    may_differ = {"train.steps", *_PLACES, *config.incidental_fields()}
    if not (cfg.distill.contrastive.zero and cfg.distill.router_balance.zero):
        may_differ.discard("data.micro_batch")  # whose rows these terms compare
    if old.asked:
        before, now = (dict(config.named_fields(c)) for c in (old.asked, asked))
        may_differ |= {path for path in _CUT if before[path] == now[path]}
    if lines := config.difference(old.cfg, cfg, may_differ):
        raise ConfigError(
            f"{old.path}: the run there has another config ({'; '.join(lines)}); give the same "
            f"config, or {_elsewhere(old, cfg, asked)}."
        )
    if not same_data(old.data, store.manifest):
        raise ConfigError(
            f"{old.path}: the run there was trained on another corpus or tokenizer; "
            "restore the data or give another --workdir."
        )


def read_metrics(workdir: pathlib.Path) -> Iterator[dict[str, Any]]:
    """The rows of `metrics.jsonl`; a number that was not finite is None. See `read_rows`."""
    return (row for row in read_rows(workdir / METRICS) if isinstance(row.get("step"), int))


def read_rows(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """The objects in a file of JSON lines, if it is there.

    A line that is none is left out: a kill leaves half a line, to which the next may be appended.
    """
    if not path.exists():
        return
    with path.open("rb") as lines:
        yield from whole_rows(lines)


def whole_rows(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The objects in lines of JSON; see `read_rows`."""
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict):
                yield row


def clear_results(workdir: pathlib.Path, *names: str) -> None:
    """Remove files of an earlier run, or of an earlier end of this one, if they are there."""
    if jax.process_index() == 0:
        for path in itertools.chain.from_iterable(workdir.glob(name.format("*")) for name in names):
            path.unlink()


def git_revision() -> str | None:
    """Commit of the source tree, with "+" if it has changes; None outside a checkout."""

    def git(*arguments: str) -> str:
        command, folder = ["git", *arguments], pathlib.Path(__file__).parent
        return subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout.strip()

    with contextlib.suppress(FileNotFoundError):  # git is not installed
        if commit := git("rev-parse", "--quiet", "--verify", "HEAD"):
            return commit + "+" * bool(git("status", "--porcelain"))
    return None


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained run, opened for use."""

    cfg: Config
    tokenizer: Tokenizer = dataclasses.field(repr=False)
    mesh: Mesh
    graphdef: Any = dataclasses.field(repr=False)
    params: Any = dataclasses.field(repr=False)
    step: int
    data: Mapping[str, Any] = dataclasses.field(repr=False)  # the manifest of its store

    @functools.cached_property
    def store(self) -> Store:
        """Its data, opened when they are first asked for.

        Raises:
            ConfigError: if they are not those on which the run was trained.
            ValueError: if the corpus cannot be read.
        """
        return open_data(self.cfg, self.data)


def open_trained(
    workdir: pathlib.Path, *, checkpoint: str | int = "best", mesh: Mesh | None = None
) -> Trained:
    """Config, tokenizer and parameters of a workdir.

    Args:
        workdir: folder of the run.
        checkpoint: that with the lowest valid loss ("best"; the newest where nothing was evaluated
            yet, which is said), the newest ("last"), or that of an update, by its number.
        mesh: where the parameters go; if None, one of as many devices as fit the run's.

    Raises:
        FileNotFoundError: if the workdir holds no config, no tokenizer or no such checkpoint.
        ConfigError: if the tokenizer is not that of the run, or `read_record` refuses the record.
    """
    record = read_record(workdir, checkpoints=True)
    cfg, tokenizer = record.cfg, load_tokenizer(workdir / TOKENIZER)
    # What was compiled is run: a record, which may be somebody else's, does not say where it lies.
    keep_compilations(config.replace(cfg, data__cache_dir=Config().data.cache_dir))
    if tokenizer.content_hash != record.data["tokenizer_hash"]:
        raise ConfigError(
            f"{workdir / TOKENIZER}: is not the tokenizer that the run was trained with; "
            "restore the folder."
        )
    mesh = mesh or sharding.mesh_that_fits(cfg.mesh)
    impl, _ = choose_attention(cfg)
    graphdef, init = create_model(cfg, tokenizer.vocab_size, impl)
    # Parameters and their average look alike; nothing else of the state is read.
    name = weights_field(cfg)
    abstract = {name: jax.eval_shape(init, jax.random.key(0))}
    like = abstract_like(abstract, sharding.places(mesh, abstract))
    kept, part = first_good(_choices(workdir, str(checkpoint)), lambda one: one.restore(like))
    return Trained(cfg, tokenizer, mesh, graphdef, part[name], kept.update, record.data)


def weights_field(cfg: Config) -> str:
    """The field of the state that is evaluated."""
    return "ema" if cfg.optim.ema_decay else "params"


def choose_update(workdir: pathlib.Path, which: str) -> int:
    """The update of a checkpoint, which is best, last or a number; see `open_trained`."""
    name = weights_field(read_record(workdir).cfg)
    return first_good(_choices(workdir, which), lambda one: one.verify(name))[0].update


def _choices(workdir: pathlib.Path, which: str) -> list[Kept]:
    """What `which` names, and after it what takes its place if it is damaged."""
    found, best = find_kept(workdir), kept_in(workdir, rundir.BEST)
    if not found:
        raise FileNotFoundError(f"{workdir}: holds no checkpoint yet; wait for one, or train.")
    if which == "best" and best:
        # The same update may be among the newest.
        return sorted(found, key=lambda one: (one != best[0], one.update != best[0].update))
    if which == "best":
        told = f"no evaluation yet: the newest checkpoint, update {found[0].update:,}"
        print(told, file=sys.stderr)
    if which in ("best", "last"):
        return found
    if named := [one for one in found if which == str(one.update)]:
        return named
    there = ", ".join(map(str, sorted({one.update for one in found})))
    raise FileNotFoundError(
        f"--checkpoint={which}: {workdir} holds no such checkpoint; give best, last, or the number "
        f"of updates of one that is there: {there}."
    )
