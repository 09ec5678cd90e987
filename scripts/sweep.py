"""Run a list of configs with several seeds, each in a folder of its own.

    python scripts/sweep.py configs/phase1.py:emb25 configs/wikitext2_cpu.py --seeds=0,1,2 \\
        --root=runs/study [--jobs=2] [-- --config.data.source_dir=DIR ...]

`FILE:*` stands for all arms of a file that lists them in `ARMS`. A run lives in
ROOT/<config>-<arm>-<seed>, with what it prints in `log.txt`. The same command again goes on: what
is finished is skipped, what was stopped is resumed, and a run that a killed sweep has left alive is
waited for. With --jobs above 1 so many runs train side by side, the next one as soon as the host
has the memory that the largest has used so far; they share a GPU's memory in equal parts.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from lm_jax import console
from lm_jax.config import ConfigError
from lm_jax.config.flags import load_config, load_module
from lm_jax.config.manual import script_parser
from lm_jax.door import command
from lm_jax.rundir import occupied, run_name

HEADROOM = 1.2  # free memory a run needs, over the most that one has used
OWN_FLAGS = ("config", "config.seed", "workdir")  # set by the sweep for every run


@dataclasses.dataclass
class Run:
    """One config with one seed."""

    command: list[str]
    workdir: pathlib.Path
    source: str  # sha256 of the config file
    process: subprocess.Popen | None = None
    began: int = 0  # bytes of metrics.jsonl when it was started
    waits: bool = False  # for another process, which was said

    @property
    def record(self) -> dict[str, Any]:
        """What makes the run: its flags and its config file."""
        flags = [x for x in self.command[3:] if not x.startswith("--workdir=")]
        return {"flags": flags, "config_sha256": self.source}

    @property
    def finished(self) -> bool:
        """Whether it went to its end."""
        return (self.workdir / "sweep.json").exists()

    def free(self) -> bool:
        """Whether nobody trains in its folder, such as a run that a killed sweep has left alive."""
        try:
            with occupied(self.workdir):
                return True
        except ConfigError:
            if not self.waits:
                console.say(f"{self.workdir}: another process trains there; waiting for it")
            self.waits = True
            return False
        except ValueError:  # the lock is none: the run itself says so
            return True

    def start(self, jobs: int) -> None:
        """Start it, or go on where it stopped."""
        self.workdir.mkdir(parents=True, exist_ok=True)
        self.began = self.logged()
        share = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / jobs:.3f}"} if jobs > 1 else {}
        with (self.workdir / "log.txt").open("a") as log:
            self.process = subprocess.Popen(
                self.command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=share | os.environ,
                start_new_session=True,  # Ctrl-C is for the sweep, which then stops its runs
            )

    def logged(self) -> int:
        """Bytes of metrics.jsonl."""
        metrics = self.workdir / "metrics.jsonl"
        return metrics.stat().st_size if metrics.exists() else 0

    def training(self) -> bool:
        """Whether it has logged an update since it was started: nearly all memory is in use."""
        return self.logged() > self.began

    def end(self, code: int) -> bool:
        """Note how it ended; True if it went to its end."""
        whole = code == 0 and any(self.workdir.glob("eval_*.json"))
        if whole:
            (self.workdir / "sweep.json").write_text(json.dumps(self.record) + "\n")
        stopped = code - 128 in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        words = "finished" if whole else "stopped" if stopped else f"failed with exit code {code}"
        console.say(f"{self.workdir}: {words}, see {self.workdir / 'log.txt'}")
        return whole


def arms(spec: str) -> list[str]:
    """The config itself, or all arms of `FILE:*`."""
    path, _, arm = spec.partition(":")
    if arm != "*":
        return [spec]
    listed = getattr(load_module(pathlib.Path(path)), "ARMS", None)
    if listed is None:
        raise ValueError(f"{path}: lists no ARMS; name the configs one by one.")
    return [f"{path}:{name}" for name in listed]


def plan(specs: Sequence[str], seeds: Sequence[int], root: pathlib.Path, flags: list[str]):
    """The runs, seed by seed, so that a sweep that is stopped has whole comparisons.

    Raises:
        ValueError: if a finished run in the way was another one, if two runs would share a folder,
            or for a flag that the sweep sets itself.
        FileNotFoundError: if there is no such config file.
    """
    for flag in flags:
        if flag.lstrip("-").partition("=")[0] in OWN_FLAGS:
            raise ValueError(f"{flag}: the sweep sets it for every run; leave it out.")
    runs = []
    for seed in seeds:
        for spec in itertools.chain.from_iterable(map(arms, specs)):
            workdir = root / run_name(spec, seed)
            command = [sys.executable, "-m", "lm_jax.main", f"--config={spec}"]
            command += [f"--config.seed={seed}", f"--workdir={workdir}", *flags]
            source = pathlib.Path(spec.partition(":")[0])
            load_config(spec)  # so that a mistake shows now and not when its turn comes
            run = Run(command, workdir, hashlib.sha256(source.read_bytes()).hexdigest())
            if run.finished and json.loads((workdir / "sweep.json").read_text()) != run.record:
                raise ValueError(
                    f"{workdir}: was finished with other flags or another text of {source}; give "
                    "another --root, or delete the folder."
                )
            runs.append(run)
    folders = [run.workdir for run in runs]
    for folder in folders:
        if folders.count(folder) > 1:
            raise ValueError(f"{folder}: two runs would share it; name every config and seed once.")
    return runs


def peak_bytes(process: subprocess.Popen) -> int:
    """The most memory that a live process has held."""
    try:
        lines = pathlib.Path(f"/proc/{process.pid}/status").read_text().splitlines()
    except FileNotFoundError:  # it has just ended
        return 0
    return next((1024 * int(x.split()[1]) for x in lines if x.startswith("VmHWM")), 0)


def free_bytes() -> int:
    """Memory that new processes can have."""
    lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    return next(1024 * int(x.split()[1]) for x in lines if x.startswith("MemAvailable"))


def sweep(runs: Sequence[Run], jobs: int) -> bool:
    """Run all; True if all finished."""
    waiting = [run for run in runs if not run.finished]
    before = len(runs) - len(waiting)
    console.say(f"{len(runs)} runs, {before} finished before")
    running: list[Run] = []
    failed, largest = False, 0
    try:
        with console.phase("running", len(runs), before) as all_runs:
            while waiting or running:
                for run in list(running):
                    assert run.process is not None
                    largest = max(largest, peak_bytes(run.process))
                    if (code := run.process.poll()) is not None:
                        running.remove(run)
                        # One that a killed sweep has left may take its lock late.
                        if code and not run.free():
                            waiting.insert(0, run)
                        else:
                            failed |= not run.end(code)
                settled = all(run.training() for run in running)
                fits = not running or (settled and free_bytes() > HEADROOM * largest)
                if waiting and len(running) < jobs and fits and waiting[0].free():
                    running.append(waiting.pop(0))
                    running[-1].start(jobs)
                names = ", ".join(run.workdir.name for run in running)
                ended = len(runs) - len(waiting) - len(running)
                all_runs.update(ended, f"{ended} of {len(runs)}", names)
                time.sleep(0.2)
    finally:
        for process in _alive(running):
            process.send_signal(signal.SIGTERM)  # saves and stops
        for process in _alive(running):
            process.wait()
    return not failed


def _alive(runs: Sequence[Run]) -> Iterator[subprocess.Popen]:
    return (run.process for run in runs if run.process is not None and run.process.poll() is None)


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Plan the runs and run them."""
    parser = script_parser(__doc__)
    parser.add_argument("configs", nargs="+", help="FILE, FILE:ARM or FILE:*")
    parser.add_argument("--seeds", default="0", help="numbers with commas")
    parser.add_argument("--root", type=pathlib.Path, default="runs", help="folder of the runs")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    arguments, flags = list(sys.argv if argv is None else argv)[1:], []
    if "--" in arguments:
        cut = arguments.index("--")
        arguments, flags = arguments[:cut], arguments[cut + 1 :]
    args = parser.parse_args(arguments)
    if not re.fullmatch(r"\d+(,\d+)*", args.seeds):
        parser.error(f"--seeds={args.seeds}: give numbers with commas, as 0,1,2.")
    seeds = [int(seed) for seed in args.seeds.split(",")]
    runs = plan(args.configs, seeds, args.root, flags)
    complete = sweep(runs, max(1, args.jobs))
    folders = [run.workdir for run in runs if run.finished]
    splits = ("test", "valid")
    scored = [s for s in splits if all((f / f"eval_{s}.json").exists() for f in folders)]
    if folders and scored:
        words = ["python", "-m", "lm_jax.compare", f"--split={scored[0]}", *map(str, folders)]
        print(shlex.join(words))
    sys.exit(0 if complete else 1)


if __name__ == "__main__":
    main()
