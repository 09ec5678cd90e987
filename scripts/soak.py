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
import datetime
import itertools
import os
import pathlib
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from records import tabled
from soak_hurts import (
    FILES,
    Hurt,
    Soak,
    Story,
    damage,
    disk,
    interrupt,
    kill,
    may_mount,
)
from soak_runs import LIMIT, MOMENTS, Process, left, lost, survivors

from lm_jax import console
from lm_jax.config.manual import script_parser
from lm_jax.door import command
from lm_jax.files import write_json

HAND = 5  # kills and signals that one run bears
# Where what XLA compiles is kept, so that the next soak starts quicker.
COMPILATIONS = "~/.cache/lm_jax/soak"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def sweep(soak: Soak, story: str, cases: Sequence[tuple[str, bool]]) -> list[Hurt]:
    """A sweep of two runs that is killed, alone or with its runs, and started again."""
    ((moment, alone),) = cases
    rng, began = soak.rng(story), time.monotonic()
    what = f"{'alone' if alone else 'with its runs'}: {moment}"
    hurt, place = Hurt("sweep", what, story, cases[0]), soak.place(story)
    script = pathlib.Path(__file__).with_name("sweep.py")
    words = [sys.executable, str(script), str(place.corpus / "cfg.py"), "--seeds=0,1"]
    words += [f"--root={place.root}", "--jobs=1", "--", *place.flags()]
    run, until = place.start(words), time.monotonic() + LIMIT
    there = {"first run": "cfg-0/metrics.jsonl", "between": "cfg-0/sweep.json"}
    file = place.root / there.get(moment, "cfg-1/metrics.jsonl")
    while not file.exists() and run.process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 1))
    hurt.missed = run.process.poll() is not None
    run.kill()
    for number in () if alone else survivors(place.root):
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(number, signal.SIGKILL)
    run = place.start(words)
    if code := run.end():
        hurt.lost.append(f"the second start ends with {code}: {run.said().splitlines()[-1]}")
    hurt.lost += run.wrong()
    for seed, variant in enumerate(("char", "other seed")):
        hurt.lost += lost(soak.whole[variant], left(place.root / f"cfg-{seed}", place.cache))
    hurt.seconds = round(time.monotonic() - began, 1)
    return [hurt]


STORIES: dict[str, tuple[Story, int]] = {
    "kills": (kill, HAND),
    "signals": (interrupt, HAND),
    "disks": (disk, 1),
    "damage": (damage, 1),
    "sweep": (sweep, 1),
}


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
    args = parser.parse_args(list(sys.argv if argv is None else argv)[1:])
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
    print(tabled([*rows[0]], [[*row.values()] for row in rows]) if rows else "nothing was tried")
    failed = [hurt for hurt in hurts if hurt.lost]
    if args.report:
        told = f"--kinds={','.join(kinds)} --count={args.count} --seed={args.seed}"
        record = {
            "device": _device(),
            "date": datetime.date.today().isoformat(),
            "command": f"python scripts/soak.py {told}",
            "seconds": round(time.monotonic() - began),
            "rows": rows,
            "lost": [
                {
                    "story": hurt.story,
                    "what": hurt.what,
                    "lost": [line.replace(f"{folder}/", "") for line in hurt.lost],
                }
                for hurt in failed
            ],
        }
        write_json(args.report, record)
    if failed:
        console.say(f"{len(failed)} of {len(hurts)} lost something: their folders are in {folder}")
    elif not args.folder:
        shutil.rmtree(folder)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
