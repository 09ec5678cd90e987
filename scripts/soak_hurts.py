"""How `soak.py` hurts a run: kills, signals, disks, damaged files."""

import contextlib
import dataclasses
import pathlib
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from soak_runs import (
    CALL,
    MOMENTS,
    SAVED_EVERY,
    VARIANTS,
    Place,
    Process,
    halfway,
    left,
    lost,
    stopped_wrong,
    survivors,
    write_corpus,
)

from lm_jax import console

TRIES = 4  # starts after which a run that does not finish counts as lost
# The kinds that hurt each variant of the run.
NEEDED = {
    "char": {"kills", "signals", "damage", "sweep"},
    "bpe": {"kills", "signals", "disks"},
    "doctor": {"kills"},
    "other seed": {"sweep"},
}


@dataclasses.dataclass
class Hurt:
    """One attempt, and what came of it."""

    kind: str
    what: str
    story: str  # the run that bore it
    case: Any = None  # to try it again, if it was missed
    missed: bool = False  # the run was over before
    refused: bool = False  # it ended with a sentence that names the file
    redone: int = 0  # updates that were made anew
    seconds: float = 0.0
    lost: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Soak:
    """The folder of all runs, and what each kind leaves when nobody hurts it."""

    folder: pathlib.Path
    compilations: pathlib.Path
    seed: int
    whole: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def place(self, name: str, variant: str = "char") -> Place:
        """A new folder for a run."""
        root = self.folder / name.replace(" ", "-").replace("/", "-")
        root.mkdir(parents=True)
        return Place(root, self.folder / "corpus", self.compilations, variant)

    def either(self, rng: random.Random) -> str:
        """A variant without the doctor, of those that were left alone."""
        return rng.choice([name for name in ("char", "bpe") if name in self.whole])

    def prepare(self, kinds: Sequence[str]) -> None:
        """Run to their end those that are compared with, and one half, which compiles what goes on.

        Raises:
            RuntimeError: if a run fails that nobody hurts.
        """
        write_corpus(self.folder / "corpus")
        with console.phase("running what is compared with"):
            halfway(self.place("half"))
            for variant in [name for name in VARIANTS if NEEDED[name] & {*kinds}]:
                place = self.place(f"whole {variant}", variant)
                run = place.start()
                if (code := run.end()) or run.wrong():
                    raise RuntimeError(f"{run.out}: ended with {code}, though nobody hurt it.")
                self.whole[variant] = left(place.workdir, place.cache)

    def rng(self, story: str) -> random.Random:
        """Chance for one run."""
        return random.Random(f"{self.seed} {story}")

    def finish(self, place: Place, hurt: Hurt, finished: bool = False) -> None:
        """Give the same command until it has finished, and note what differs."""
        for number in () if finished else range(TRIES):
            run = place.start()
            code = run.end()
            hurt.lost += run.wrong()
            if code == 0:
                hurt.lost += [f"finished only at start {number + 1}"] * (number > 0)
                break
            hurt.lost.append(f"exit code {code} on going on: {' / '.join(run.complained())[-300:]}")
        hurt.lost += lost(self.whole[place.variant], left(place.workdir, place.cache))
        until = time.monotonic() + 20
        while (alive := survivors(place.root)) and time.monotonic() < until:
            time.sleep(0.1)
        hurt.lost += [f"process {number} lives on" for number in alive]
        if not hurt.lost:
            shutil.rmtree(place.root, ignore_errors=True)


Story = Callable[[Soak, str, Sequence[Any]], list[Hurt]]


def _end(
    soak: Soak, place: Place, hurts: list[Hurt], began: float, finished: bool = False
) -> list[Hurt]:
    """Finish a story; what its end has lost is noted with the last that was not missed."""
    done = [hurt for hurt in hurts if not hurt.missed] or hurts
    soak.finish(place, done[-1], finished)
    for hurt in done:
        hurt.seconds = round((time.monotonic() - began) / len(done), 1)
    return hurts


@contextlib.contextmanager
def _promised(place: Place, hurt: Hurt, most: int) -> Iterator[None]:
    """Note the updates that end with the process in the block; more than promised are lost."""
    logged, undone = place.logged(), place.logged() - place.newest()
    yield
    if place.logged() != logged:
        hurt.redone, undone = place.logged() - place.newest(), 0
    if hurt.redone > most + undone:
        hurt.lost.append(f"{hurt.redone} updates to be made anew, {most} are promised")


def kill(soak: Soak, story: str, moments: Sequence[str]) -> list[Hurt]:
    """A run that is killed at each of these moments."""
    rng, began = soak.rng(story), time.monotonic()
    place = soak.place(story, "doctor" if "the doctor" in moments else soak.either(rng))
    trained = ["training"] * _wants_training(moments)
    hurts, reached = [], True
    for moment in sorted([*moments, *trained], key=[*MOMENTS].index):
        hurts.append(hurt := Hurt("kills", moment, story, moment))
        if reached:
            with _promised(place, hurt, 2 * SAVED_EVERY + CALL):
                run = place.start()
                reached = run.reach(moment, rng)
                run.kill()
            hurt.lost += run.wrong()
        hurt.missed = not reached
    return _end(soak, place, hurts, began)


def _wants_training(moments: Sequence[str]) -> bool:
    return "resuming" in moments and "training" not in moments


Signal = tuple[str, signal.Signals, bool]  # the moment, which, and whether it comes twice


def interrupt(soak: Soak, story: str, cases: Sequence[Signal]) -> list[Hurt]:
    """A run that is stopped by signals, one or two in a row."""
    rng, began = soak.rng(story), time.monotonic()
    place, hurts, code = soak.place(story, soak.either(rng)), [], 1
    moments = [case[0] for case in cases]
    trained = [("training", signal.SIGTERM, False)] * _wants_training(moments)
    for case in sorted([*cases, *trained], key=lambda case: [*MOMENTS].index(case[0])):
        moment, number, twice = case
        what = f"{number.name}{' twice' * twice}: {moment}"
        hurts.append(hurt := Hurt("signals", what, story, case))
        if code:
            with _promised(place, hurt, 2 * SAVED_EVERY + CALL if twice else 0):
                run = place.start()
                if run.reach(moment, rng):
                    run.process.send_signal(number)
                    if twice:
                        time.sleep(rng.uniform(0, 0.3))
                        run.process.send_signal(number)
                code = run.end()
            hurt.lost += run.wrong() + (stopped_wrong(run, code, number, moment) if code else [])
        hurt.missed = code == 0
    return _end(soak, place, hurts, began)


# --- disks ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def _disk(folder: pathlib.Path) -> Iterator[None]:
    mount = ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(folder)]
    subprocess.run(mount, check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def may_mount(folder: pathlib.Path) -> bool:
    """Whether this process may mount a small disk."""
    try:
        with tempfile.TemporaryDirectory(dir=folder) as there, _disk(pathlib.Path(there)):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def _fill(path: pathlib.Path) -> None:
    """Take all room of a disk."""
    for size in (1 << 16, 1):
        with contextlib.suppress(OSError), path.open("ab", buffering=0) as file:
            while file.write(bytes(size)):
                pass


def disk(soak: Soak, story: str, cases: Sequence[tuple[str, str]]) -> list[Hurt]:
    """A run whose disk is full, or whose folder is gone, from a moment on."""
    ((how, moment),) = cases
    rng, began = soak.rng(story), time.monotonic()
    place, hurt = soak.place(story, "bpe"), Hurt("disks", f"{how}: {moment}", story, cases[0])
    with _disk(place.root):
        filler = place.root / "filler"
        if how == "read-only":
            halfway(place)
            subprocess.run(["mount", "-o", "remount,ro", str(place.root)], check=True)
        run = place.start()
        if how != "read-only":
            hurt.missed = not run.reach(moment, rng)
            if how == "full":
                _fill(filler)
            else:
                shutil.rmtree(place.workdir if how == "no workdir" else place.cache, True)
        code = run.end()
        if how == "read-only":
            subprocess.run(["mount", "-o", "remount,rw", str(place.root)], check=True)
        filler.unlink(missing_ok=True)
        hurt.lost += run.wrong()
        hurt.refused = code != 0
        hurt.lost += _no_sentence(run, code, place.root) if code else []
        return _end(soak, place, [hurt], began)


def _no_sentence(run: Process, code: int, named: pathlib.Path) -> list[str]:
    """What is wrong with how a process has refused to go on."""
    said = run.complained()
    words = [] if code in (1, 2) else [f"exit code {code}"]
    if len(said) != 1:
        words.append(f"{len(said)} lines in place of one sentence: {' / '.join(said)[-300:]}")
    if str(named) not in " ".join(said):
        words.append(f"the sentence names no file: {' / '.join(said)[-300:]}")
    return words


# --- damaged files -------------------------------------------------------------------------------


def _largest(paths: Iterator[pathlib.Path]) -> pathlib.Path:
    return max(paths, key=lambda path: path.stat().st_size)


def _newest(place: Place) -> pathlib.Path:
    return place.workdir / "checkpoints" / str(place.newest())


# The files that are damaged.
FILES: dict[str, Callable[[Place], pathlib.Path]] = {
    "state of the newest checkpoint": lambda p: _largest((_newest(p) / "state").rglob("d/*")),
    "its list of arrays": lambda p: _newest(p) / "state" / "_METADATA",
    "its manifest": lambda p: _newest(p) / "manifest" / "metadata",
    "state of the best checkpoint": lambda p: _largest((p.workdir / "best").rglob("state/**/d/*")),
    "manifest of the best checkpoint": lambda p: next(
        (p.workdir / "best").glob("*/manifest/meta*")
    ),
    "config.json": lambda p: p.workdir / "config.json",
    "metrics.jsonl": lambda p: p.workdir / "metrics.jsonl",
    "tokenizer of the run": lambda p: p.workdir / "tokenizer" / "tokenizer.json",
    "tokens": lambda p: next(p.cache.glob("stores/*/train.tokens.npy")),
    "starts of documents": lambda p: next(p.cache.glob("stores/*/train.documents.npy")),
    "manifest of the store": lambda p: next(p.cache.glob("stores/*/manifest.json")),
    "tokenizer of the store": lambda p: next(p.cache.glob("stores/*/tokenizer/tokenizer.json")),
    "references": lambda p: next(p.cache.glob("stores/*/references_valid.json")),
    "compilations": lambda p: _largest(p.compilations.glob("*-cache")),
}


def _damage(path: pathlib.Path, way: str, rng: random.Random) -> None:
    if way == "removed":
        path.unlink()
        return
    content = bytearray(path.read_bytes())
    if way == "one bit":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    else:
        del content[len(content) // 2 * (way == "cut") :]
    path.write_bytes(content)


def damage(soak: Soak, story: str, cases: Sequence[tuple[str, str]]) -> list[Hurt]:
    """A run, half done, of which one file is damaged before it goes on."""
    ((file, way),) = cases
    rng, began = soak.rng(story), time.monotonic()
    hurt, place = Hurt("damage", f"{file}: {way}", story, cases[0]), soak.place(story)
    half = dataclasses.replace(place, root=soak.folder / "half")
    shutil.copytree(half.root, place.root, dirs_exist_ok=True)
    shutil.copytree(soak.compilations, place.root / "cache" / "compilations")
    place.compilations = place.root / "cache" / "compilations"
    path = FILES[file](place)
    before = path.read_bytes()
    _damage(path, way, rng)
    run = place.start()
    code = run.end()
    hurt.lost += run.wrong()
    if code:
        hurt.refused = True
        inside = path.relative_to(place.root).parts[:3]  # the checkpoint, the store, or the file
        hurt.lost += _no_sentence(run, code, place.root.joinpath(*inside))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(before)
    hurts = _end(soak, place, [hurt], began, finished=code == 0)
    if file == "metrics.jsonl" and (way == "one bit" or "lacks the rows" in run.out.read_text()):
        # Nothing has the rows a second time, so what is told is not lost; a digit has no checksum.
        hurt.lost = [words for words in hurt.lost if not _of_rows(words)]
    return hurts


def _of_rows(words: str) -> bool:
    return words.startswith(("other numbers: metrics.jsonl", "other numbers: logged updates"))
