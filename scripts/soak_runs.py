"""What `soak.py` hurts: a small run in a folder of its own, its moments, and all that it leaves."""

import dataclasses
import hashlib
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import numpy as np
import orbax.checkpoint as ocp

from lm_jax import rundir
from lm_jax.workdir import METRICS, read_metrics

ROOT = pathlib.Path(__file__).parents[1]
LIMIT = 300.0  # seconds after which a process hangs
SAVED_EVERY, CALL = 4, 2  # updates between checkpoints, and in one call; nine have saved one
# Flags that every run has: 40 updates of a model with 3,328 parameters.
FLAGS = {
    "doctor": "off",
    "data.corpus": "text",
    "data.files": "train*.txt",
    "data.valid_files": "valid.txt",
    "data.test_files": "test.txt",
    "data.seq_len": 32,
    "data.batch_size": 4,
    "data.micro_batch": 2,
    "data.workers": 2,
    "model.layers": 1,
    "model.d_model": 16,
    "model.heads": 2,
    "model.dropout": 0.1,
    "train.steps": 40,
    "train.eval_every": 10,
    "train.checkpoint_every": SAVED_EVERY,
    "train.steps_per_call": CALL,
    "optim.warmup": 4,
    "eval.batch_size": 16,
}
# A corpus of megabytes has several parts a split; so has a small one whose pieces are smaller.
SMALL_PIECES = "from lm_jax.data import shards; shards.PIECE = 30_000"
# What a kind of run has beside: flags, and code that comes before the command.
VARIANTS: dict[str, tuple[dict[str, Any], str]] = {
    "char": ({}, ""),
    "other seed": ({"seed": 1}, ""),
    "bpe": ({"tokenizer.kind": "bpe", "tokenizer.vocab_size": 280}, SMALL_PIECES),
    "doctor": ({"doctor": "fast", "train.sample_prompts": "ba du"}, ""),
}
CONFIG = "from lm_jax.config import Config\n\n\ndef get_config():\n    return Config()\n"


def write_corpus(folder: pathlib.Path) -> None:
    """Texts of a made-up language, and a config file beside them, always the same."""
    folder.mkdir(parents=True)
    rng = random.Random(0)
    words = "ba du kilo mefa no pi roso tu wela xi".split()
    for name in ["valid", "test", *(f"train{number:02}" for number in range(30))]:
        lines = (
            " ".join(rng.choices(words, k=8)) for _ in range(300 if name[-1].isdigit() else 20)
        )
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    (folder / "cfg.py").write_text(CONFIG)


@dataclasses.dataclass
class Place:
    """A folder with all that a run writes, and beside it what its processes print."""

    root: pathlib.Path
    corpus: pathlib.Path
    compilations: pathlib.Path
    variant: str = "char"
    planted: str = ""  # code that comes before the command

    @property
    def workdir(self) -> pathlib.Path:
        """Folder of the run."""
        return self.root / "run"

    @property
    def cache(self) -> pathlib.Path:
        """Folder of its tokens."""
        return self.root / "cache"

    def flags(self) -> list[str]:
        """Flags that make the run."""
        places = {"data.source_dir": self.corpus, "data.cache_dir": self.cache}
        fields = FLAGS | VARIANTS[self.variant][0] | places
        return [f"--config.{path}={value}" for path, value in fields.items()]

    def command(self) -> list[str]:
        """The command of the run."""
        before = "; ".join(filter(None, (VARIANTS[self.variant][1], self.planted)))
        code = ["-c", f"{before}\nfrom lm_jax.main import main; main()"]
        program = code if before else ["-m", "lm_jax.main"]
        config = f"--config={self.corpus / 'cfg.py'}"
        return [sys.executable, *program, config, f"--workdir={self.workdir}", *self.flags()]

    def start(self, command: list[str] | None = None) -> "Process":
        """Start the run, or another command, as a process."""
        return Process(self, command or self.command())

    def newest(self) -> int:
        """Updates in the newest finished checkpoint."""
        return rundir.newest_update(self.workdir) or 0

    def logged(self) -> int:
        """The last update in the log."""
        steps = [row["step"] for row in read_metrics(self.workdir) if "train/loss" in row]
        return max(steps, default=0)


class Process:
    """A process of a place, under watch."""

    alive: ClassVar[set["Process"]] = set()
    over: ClassVar[bool] = False

    def __init__(self, place: Place, command: list[str]):
        """Start it.

        Raises:
            RuntimeError: if all were stopped.
        """
        if self.over:
            raise RuntimeError("the soak was stopped")
        self.place, self.saved = place, place.newest()
        self.there = set(place.root.rglob("*"))
        self.rows = place.logged() + random.Random(len(self.there)).randint(9, 20)
        logs = place.root.with_name(f"{place.root.name}-logs")
        logs.mkdir(parents=True, exist_ok=True)
        number = len(list(logs.glob("*.out")))
        self.out, self.err = (logs / f"{number:02}.{kind}" for kind in ("out", "err"))
        self.began = time.monotonic()
        environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(place.compilations),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PLATFORMS": "cpu",
            "SOAK": str(place.root),  # by which `survivors` knows them
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        with self.out.open("wb") as out, self.err.open("wb") as err:
            heard = ["env", "--default-signal=HUP", *command]  # where the soak is under nohup too
            self.process = subprocess.Popen(
                heard, stdout=out, stderr=err, env=environment, start_new_session=True
            )
        self.alive.add(self)

    def said(self) -> str:
        """What it has printed."""
        return "\n" + self.out.read_text(errors="replace")

    def complained(self) -> list[str]:
        """The lines on standard error, but for empty ones and warnings of libraries."""
        lines = self.err.read_text(errors="replace").splitlines()
        return [line for line in lines if line.strip() and not re.match(r"W\d{4} ", line)]

    def reach(self, moment: str, rng: random.Random) -> bool:
        """Wait for a moment of MOMENTS, and a random while; False if the process ended before."""
        there, most = MOMENTS[moment]
        until = time.monotonic() + LIMIT
        while not there(self):
            if self.process.poll() is not None or time.monotonic() > until:
                return False
            time.sleep(0.005)
        time.sleep(rng.uniform(0, most))
        return self.process.poll() is None

    def end(self) -> int:
        """Its return code.

        Raises:
            TimeoutError: if it hangs; then it is killed.
        """
        try:
            return self.process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"hangs: {self.said().splitlines()[-1]}") from None
        finally:
            self.kill()

    def kill(self) -> None:
        """Kill it if it is alive."""
        self.process.kill()
        self.process.wait()
        self.alive.discard(self)

    @classmethod
    def stop(cls) -> None:
        """Kill all, and start none anew."""
        cls.over = True
        for process in list(cls.alive):
            process.kill()

    def wrong(self) -> list[str]:
        """What no process may print, however it ends."""
        text = self.said() + "\n".join(self.complained())
        return ["a traceback"] if "Traceback (most recent call last)" in text else []


def _says(words: str) -> Callable[[Process], bool]:
    return lambda run: f"\n{words}" in run.said()


def _new(pattern: str) -> Callable[[Process], bool]:
    return lambda run: any(path not in run.there for path in run.place.root.glob(pattern))


# When each moment of a run has come, in their order; and how many seconds are waited then at most.
MOMENTS: dict[str, tuple[Callable[[Process], bool], float]] = {
    "importing": (lambda _: True, 1.5),
    "starting JAX": (_says("starting JAX"), 3.0),
    "learning the tokenizer": (_says("learning the tokenizer"), 0.02),
    "tokenising": (_new("cache/stores/*.parts/*-of-*"), 0.05),
    "joining": (_new("cache/stores/*.parts/store"), 0.02),
    "the doctor": (_says("examining"), 5.0),
    "drawing": (_says("drawing the parameters"), 0.3),
    "compiling": (_says("compiling"), 1.0),
    "training": (lambda run: run.place.logged() >= run.rows, 0.1),
    "saving": (_new("run/checkpoints/*orbax-checkpoint-tmp*"), 0.05),
    "evaluating": (_says("scoring valid"), 0.1),
    "saving the best": (_new("run/best/*orbax-checkpoint-tmp*"), 0.05),
    "resuming": (lambda run: run.saved > 0 and " is saved" in run.said(), 5.0),
    "end scores": (_says("training  100%"), 0.3),
    "report": (_new("run/eval_test.json"), 0.5),
}


def halfway(place: Place) -> None:
    """Run until more than half is saved, the best checkpoint too, and stop there.

    Raises:
        RuntimeError: if the run is over before.
    """
    run = place.start()
    while run.process.poll() is None and place.newest() < 24:
        time.sleep(0.005)
    run.process.send_signal(signal.SIGTERM)
    if run.end() != 128 + signal.SIGTERM:
        raise RuntimeError(f"{run.out}: was over before it could be stopped; start again.")


def left(workdir: pathlib.Path, cache: pathlib.Path) -> dict[str, Any]:
    """All that a finished run leaves but clocks and places, by name: states, scores, log, tokens.

    Every leaf of every state is there by the hash of its bytes.
    """
    found: dict[str, Any] = {"files": _names(workdir, "run") | _names(cache, "cache")}
    found["checkpoints"] = rundir.updates(workdir / rundir.CHECKPOINTS)
    for folder in (rundir.CHECKPOINTS, rundir.BEST):
        for update in rundir.updates(workdir / folder):
            path = (workdir / folder / str(update)).absolute()
            found[f"{folder}/{update}"] = json.loads((path / "manifest" / "metadata").read_text())
            for name, leaf in _leaves(path):
                found[f"{folder}/{update} {name}"] = _hash(leaf)
    rows = list(read_metrics(workdir))
    found["logged updates"] = [(row["step"], "train/loss" in row) for row in rows]
    for row in rows:
        kept = {k: v for k, v in row.items() if not k.startswith("perf/") and k != "resumed"}
        found[f"{METRICS} {row['step']} {'train' if 'train/loss' in row else 'valid'}"] = kept
    for path in sorted(workdir.glob("eval_*.json")):
        found[path.name] = json.loads(path.read_text())
    end = found.get("eval_test.json", {"loss": 0})["loss"]
    page = (workdir / "report.html").read_text() if (workdir / "report.html").exists() else ""
    found["report.html"] = "tells the end" if f"{end:.4f}" in page else "tells an earlier state"
    for path in sorted(workdir.glob("documents_*.npz")):
        found[path.name] = {name: _hash(array) for name, array in np.load(path).items()}
    record = json.loads((workdir / rundir.RECORD).read_text())
    for place in ("source_dir", "cache_dir"):
        del record["config"]["data"][place]
    found[rundir.RECORD] = {name: record[name] for name in ("config", "data")}
    tokens = [*sorted(workdir.glob("tokenizer/*")), *sorted(cache.glob("stores/**/*"))]
    files = (path for path in [*tokens, workdir / "samples.jsonl"] if path.is_file())
    for path in files:
        parts = path.relative_to(cache if path.is_relative_to(cache) else workdir)
        found[str(parts)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def _names(folder: pathlib.Path, name: str) -> set[str]:
    """Files and empty folders; names that hold a number of a process, or a hash, without it."""
    ends = (path for path in folder.rglob("*") if path.is_file() or not any(path.iterdir()))
    found = {f"{name}/{path.relative_to(folder)}" for path in ends}
    # What the trainer sets aside is the damaged checkpoint itself.
    own = re.compile(r"run/(sweep\.json|log\.txt)|cache/compilations/|/d/|/\d+\.damaged/")
    unnamed = re.compile(r"\.\d{3,}(-[0-9a-f]{8})?$")
    return {unnamed.sub(".PID", path) for path in found if not own.search(path)}


def _leaves(checkpoint: pathlib.Path) -> list[tuple[str, np.ndarray]]:
    items = dict(state=ocp.PyTreeCheckpointHandler(), manifest=ocp.JsonCheckpointHandler())
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**items)) as reader:
        like = reader.metadata(checkpoint).item_metadata["state"].tree
        how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), like)
        state = ocp.args.PyTreeRestore(restore_args=how)
        tree = reader.restore(checkpoint, args=ocp.args.Composite(state=state))["state"]
    named = jax.tree.leaves_with_path(tree)
    return [(jax.tree_util.keystr(name), np.asarray(leaf)) for name, leaf in named]


def _hash(array: np.ndarray) -> str:
    about = f"{array.dtype} {array.shape} ".encode()
    return hashlib.sha256(about + np.ascontiguousarray(array).tobytes()).hexdigest()


def lost(whole: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """What differs from the run that nobody hurt, in words."""
    if any(update % SAVED_EVERY for update in found["checkpoints"]):
        # A signal came between two: what was saved then stands in the place of an older one.
        whole, found = (_without_older(run) for run in (whole, found))
    junk = sorted(found["files"] - whole["files"])
    missing = sorted(whole["files"] - found["files"])
    words = [f"left over: {name}" for name in junk] + [f"missing: {name}" for name in missing]
    differ = [
        name
        for name in {**whole, **found}
        if name != "files" and whole.get(name) != found.get(name)
    ]
    for head in dict.fromkeys(re.split(r"[ /]", name)[0] for name in differ):
        names = [name for name in differ if re.split(r"[ /]", name)[0] == head]
        more = f" and {len(names) - 1} more" * (len(names) > 1)
        words.append(f"other numbers: {names[0]}{more}")
    return words


def _without_older(run: Mapping[str, Any]) -> dict[str, Any]:
    """All but what is of an older checkpoint than the newest."""
    older = re.compile(rf"(run/)?{rundir.CHECKPOINTS}/(?!{max(run['checkpoints'])}\b)\d")
    names = {name for name in run["files"] if not older.match(name)}
    kept = {key: value for key, value in run.items() if not older.match(key)}
    return kept | {"files": names, "checkpoints": []}


def survivors(root: pathlib.Path) -> list[int]:
    """Processes that were started for a place and live on."""
    found = []
    for entry in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            if f"SOAK={root}\0".encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:  # it has just ended
            continue
    return found


def stopped_wrong(run: Process, code: int, number: signal.Signals, moment: str) -> list[str]:
    """How a run that a signal stopped has ended otherwise than it should."""
    said = run.complained()
    if moment == "importing" and code == -number and not said:
        return []  # before Python has heard of us
    # A second signal may come when the first has done its work, and end what is left of it.
    words = [] if code in (128 + number, -number) else [f"exit code {code} after {number.name}"]
    if len(said) != 1 or not said[0].startswith(f"stopped by {number.name}"):
        words.append(f"said {len(said)} lines on the signal: {' / '.join(said)[-200:]!r}")
    return words
