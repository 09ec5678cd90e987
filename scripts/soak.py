"""Hurt small runs in every way there is, run them to their end, and compare with one left alone.

    python scripts/soak.py [--kinds=kills,signals,disks,damage,sweep] [--count=100] [--seed=0]

Kills and signals come in every phase of a run; disks are full, read-only or gone; files of a
workdir, a store and a cache are cut, emptied, removed, or have one bit flipped. Then the same
command goes on, until it has finished. Parameters, state of the optimiser, scores, log and tokens
must be those of a run that nobody hurt, bit for bit, with no file beside that such a run does not
leave. Exit code 1 if anything was lost. `--report` writes the record of the table in the docs.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import datetime
import itertools
import os
import pathlib
import platform
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from records import tabled
from soak_runs import (
    CALL,
    MOMENTS,
    SAVED_EVERY,
    VARIANTS,
    Place,
    Process,
    left,
    lost,
    stopped_wrong,
    survivors,
    write_corpus,
)

from lm_jax import console
from lm_jax.config.manual import script_parser
from lm_jax.door import command
from lm_jax.files import write_json

TRIES = 4  # starts after which a run that does not finish counts as lost
HAND = 5  # kills and signals that one run bears
# Where what XLA compiles is kept, so that the next soak starts quicker.
COMPILATIONS = "~/.cache/lm_jax/soak"
# The kinds that hurt each variant of the run.
NEEDED = {
    "char": {"kills", "signals", "damage", "sweep"},
    "bpe": {"kills", "signals", "disks"},
    "doctor": {"kills"},
    "other seed": {"sweep"},
}
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STOP = signal.SIGTERM


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

    def prepare(self, kinds: Sequence[str]) -> None:
        """Run to their end those that are compared with, and one half, which compiles what goes on.

        Raises:
            RuntimeError: if a run fails that nobody hurts.
        """
        write_corpus(self.folder / "corpus")
        _halfway(self.place("half"))
        for variant in VARIANTS:
            if not NEEDED[variant] & {*kinds}:
                continue
            place = self.place(f"whole {variant}", variant)
            run = place.start()
            if (code := run.end()) or run.wrong():
                raise RuntimeError(f"{run.out}: ended with {code}, though nobody hurt it; read it.")
            self.whole[variant] = left(place.workdir, place.cache)

    def rng(self, story: str) -> random.Random:
        """Chance for one run."""
        return random.Random(f"{self.seed} {story}")

    def finish(self, place: Place, hurt: Hurt, *, finished: bool = False) -> None:
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


def _timed(hurts: list[Hurt], began: float) -> list[Hurt]:
    """Share the seconds of a story, and give what its end has lost to the last that was done."""
    for hurt in hurts:
        hurt.seconds = round((time.monotonic() - began) / len(hurts), 1)
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
    variant = "doctor" if "the doctor" in moments else rng.choice(["char", "bpe"])
    place = soak.place(story, variant)
    hurts, reached = [Hurt("kills", moment, story, moment) for moment in _in_order(moments)], True
    for hurt in hurts:
        if reached:
            with _promised(place, hurt, 2 * SAVED_EVERY + CALL):
                run = place.start()
                reached = run.reach(hurt.what, rng)
                run.kill()
            hurt.lost += run.wrong()
        hurt.missed = not reached
    soak.finish(place, hurts[-1])
    return _timed(hurts, began)


def _in_order(moments: Sequence[str]) -> list[str]:
    return sorted(moments, key=[*MOMENTS].index)


def interrupt(
    soak: Soak, story: str, cases: Sequence[tuple[str, signal.Signals, bool]]
) -> list[Hurt]:
    """A run that is stopped by signals, one or two in a row."""
    rng, began = soak.rng(story), time.monotonic()
    place, hurts, code = soak.place(story, rng.choice(["char", "bpe"])), [], 1
    for case in sorted(cases, key=lambda case: [*MOMENTS].index(case[0])):
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
    soak.finish(place, hurts[-1])
    return _timed(hurts, began)


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
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12):
            with contextlib.suppress(OSError):
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
            _halfway(place)
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
        soak.finish(place, hurt)
    return _timed([hurt], began)


def _no_sentence(run: Process, code: int, named: pathlib.Path) -> list[str]:
    """What is wrong with how a process has refused to go on."""
    said = [line for line in run.complained() if line.strip()]
    words = [] if code in (1, 2) else [f"exit code {code}"]
    if len(said) != 1:
        words.append(f"{len(said)} lines in place of one sentence: {' / '.join(said)[-300:]}")
    if str(named) not in " ".join(said):
        words.append(f"the sentence names no file: {' / '.join(said)[-300:]}")
    return words


def _halfway(place: Place) -> None:
    """Run until more than half is saved, the best checkpoint too, and stop there.

    Raises:
        RuntimeError: if the run is over before.
    """
    run = place.start()
    while run.process.poll() is None and place.newest() < 24:
        time.sleep(0.002)
    run.process.send_signal(STOP)
    if run.end() != 128 + STOP:
        raise RuntimeError(f"{run.out}: was over before it could be stopped; start again.")


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
    soak.finish(place, hurt, finished=code == 0)
    return _timed([hurt], began)


# --- a sweep -------------------------------------------------------------------------------------


def sweep(soak: Soak, story: str, cases: Sequence[tuple[str, bool]]) -> list[Hurt]:
    """A sweep of two runs that is killed, alone or with its runs, and started again."""
    ((moment, alone),) = cases
    rng, began = soak.rng(story), time.monotonic()
    what = f"{'alone' if alone else 'with its runs'}: {moment}"
    hurt, place = Hurt("sweep", what, story, cases[0]), soak.place(story)
    script = pathlib.Path(__file__).with_name("sweep.py")
    words = [sys.executable, str(script), str(place.corpus / "cfg.py"), "--seeds=0,1"]
    words += [f"--root={place.root}", "--jobs=1", "--", *place.flags()]
    run, until = place.start(words), time.monotonic() + 200
    there = {"first run": "cfg-0/metrics.jsonl", "between": "cfg-0/sweep.json"}
    there["second run"] = "cfg-1/metrics.jsonl"
    while not (place.root / there[moment]).exists() and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 1))
    hurt.missed = run.process.poll() is not None
    run.kill()
    for number in () if alone else survivors(place.root):
        os.kill(number, signal.SIGKILL)
    for number in range(TRIES):
        run = place.start(words)
        if (code := run.end()) == 0:
            break
        hurt.lost.append(f"start {number + 2} ends with {code}: {run.said().splitlines()[-1]}")
    hurt.lost += run.wrong()
    for seed, variant in enumerate(("char", "other seed")):
        hurt.lost += lost(soak.whole[variant], left(place.root / f"cfg-{seed}", place.cache))
    return _timed([hurt], began)


# --- all of it -----------------------------------------------------------------------------------


def _deck(kind: str, count: int, rng: random.Random) -> list[Any]:
    """The cases of a kind, shuffled; kills go round until there are enough."""
    wheres = ["starting JAX", "learning the tokenizer", "tokenising", "training", "saving"]
    decks: dict[str, list[Any]] = {
        "kills": [*MOMENTS],
        "signals": [*itertools.product(MOMENTS, SIGNALS, (False, True))],
        "disks": [("full", moment) for moment in (*wheres, "saving the best", "end scores")]
        + [("no workdir", moment) for moment in ("training", "saving", "evaluating")]
        + [("no cache", moment) for moment in ("tokenising", "training")]
        + [("read-only", "going on")],
        "damage": [*itertools.product(FILES, ("cut", "one bit", "emptied", "removed"))],
        "sweep": [*itertools.product(("first run", "between", "second run"), (False, True))],
    }
    deck = decks[kind]
    rng.shuffle(deck)
    enough = {"kills": count, "signals": max(1, count // 3)}.get(kind, min(count, len(deck)))
    return [*itertools.islice(itertools.cycle(deck), enough)]


def hurt_all(soak: Soak, kind: str, count: int, jobs: int) -> list[Hurt]:
    """All cases of a kind, `jobs` runs at a time; those missed again, but not for ever."""
    story, size = STORIES[kind]
    deck, hurts, number = _deck(kind, count, soak.rng(kind)), list[Hurt](), 0
    most = 3 * len(deck) // (2 * size) + 3
    running: dict[concurrent.futures.Future[list[Hurt]], tuple[str, list[Any]]] = {}
    with (
        concurrent.futures.ThreadPoolExecutor(jobs) as pool,
        console.phase(kind, len(deck)) as told,
    ):
        try:
            while running or (deck and number < most):
                while deck and number < most and len(running) < jobs:
                    hand, deck, name = deck[:size], deck[size:], f"{kind} {number}"
                    running[pool.submit(story, soak, name, hand)] = name, hand
                    number += 1
                first = concurrent.futures.FIRST_COMPLETED
                for done in concurrent.futures.wait(running, return_when=first).done:
                    name, hand = running.pop(done)
                    if error := done.exception():
                        words = [f"{type(error).__name__}: {error}"]
                        found = [Hurt(kind, str(hand[0]), name, lost=words)]
                    else:
                        found = done.result()
                    hurts += found
                    deck += [hurt.case for hurt in found if hurt.missed]
                    for hurt in found:
                        for line in hurt.lost:
                            console.say(f"{hurt.story}, {hurt.what}: {line}")
                    tried = sum(not hurt.missed for hurt in hurts)
                    told.update(tried, f"{tried} tried", f"{sum(bool(h.lost) for h in hurts)} lost")
        except BaseException:
            Process.stop()
            raise
    return hurts


def _what(hurt: Hurt) -> str:
    """The row of the table to which one belongs."""
    first, _, rest = hurt.what.partition(": ")
    return rest if hurt.kind == "signals" else hurt.what if hurt.kind != "damage" else first


def tell(hurts: Sequence[Hurt]) -> list[dict[str, Any]]:
    """Rows of the record, one for a kind and a moment, or file."""
    groups: dict[tuple[str, str], list[Hurt]] = collections.defaultdict(list)
    for hurt in hurts:
        groups[hurt.kind, _what(hurt)].append(hurt)
    order = [*STORIES, *MOMENTS, *FILES]
    return [
        {
            "kind": group[0],
            "what": group[1],
            "tried": sum(not hurt.missed for hurt in groups[group]),
            "refused": sum(hurt.refused for hurt in groups[group]),
            "redone": sum(hurt.redone for hurt in groups[group]),
            "seconds": round(sum(hurt.seconds for hurt in groups[group]), 1),
            "lost": sum(bool(hurt.lost) for hurt in groups[group]),
        }
        for group in sorted(
            groups, key=lambda group: [order.index(x) if x in order else len(order) for x in group]
        )
    ]


STORIES: dict[str, tuple[Story, int]] = {
    "kills": (kill, HAND),
    "signals": (interrupt, HAND),
    "disks": (disk, 1),
    "damage": (damage, 1),
    "sweep": (sweep, 1),
}


def _device() -> str:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    kind = next(
        (x.partition(": ")[2] for x in lines if x.startswith("model name")), platform.machine()
    )
    return f"{os.cpu_count()} CPU cores ({kind})"


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Hurt, compare, tell."""
    parser = script_parser(__doc__)
    parser.add_argument("--kinds", default=",".join(STORIES), help="of these, with commas")
    parser.add_argument(
        "--count", type=int, default=100, help="kills; at most so many of the others"
    )
    parser.add_argument("--seed", type=int, default=0, help="of moments, delays and bits")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    parser.add_argument(
        "--folder", type=pathlib.Path, help="of all runs; what lost something stays"
    )
    parser.add_argument("--report", type=pathlib.Path, help="file of the record")
    arguments = list(sys.argv if argv is None else argv)[1:]
    args = parser.parse_args(arguments)
    kinds = args.kinds.split(",")
    if unknown := set(kinds) - set(STORIES):
        parser.error(f"--kinds={args.kinds}: {', '.join(unknown)} is none of {', '.join(STORIES)}.")
    began = time.monotonic()
    folder = (args.folder or pathlib.Path(tempfile.mkdtemp(prefix="soak-"))).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if "disks" in kinds and not may_mount(folder):
        console.say("disks: skipped, for this process may not mount a small one; be root")
        kinds.remove("disks")
    shared = pathlib.Path(os.environ.get("JAX_COMPILATION_CACHE_DIR", COMPILATIONS)).expanduser()
    soak = Soak(folder, shared, args.seed)
    soak.prepare(kinds)
    hurts = [hurt for kind in kinds for hurt in hurt_all(soak, kind, args.count, args.jobs)]
    rows = tell(hurts)
    print(tabled([*rows[0]], [[*row.values()] for row in rows]))
    failed = [dataclasses.asdict(hurt) for hurt in hurts if hurt.lost]
    if args.report:
        record = {
            "device": _device(),
            "date": datetime.date.today().isoformat(),
            "command": shlex.join(["python", "scripts/soak.py", *arguments]),
            "seed": args.seed,
            "seconds": round(time.monotonic() - began),
            "rows": rows,
            "lost": [{key: hurt[key] for key in ("story", "what", "lost")} for hurt in failed],
        }
        write_json(args.report, record)
    if failed:
        console.say(f"{len(failed)} of {len(hurts)} lost something: their folders are in {folder}")
    elif not args.folder:
        shutil.rmtree(folder)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
