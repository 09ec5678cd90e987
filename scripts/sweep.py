"""Run a list of configs with several seeds, each in a folder of its own.

    python scripts/sweep.py configs/phase1.py:emb25 configs/wikitext2_cpu.py --seeds=0,1,2 \
        --root=runs/study [--jobs=2] [-- --config.data.source_dir=DIR ...]

`FILE:*` stands for all arms of a file that lists them in `ARMS`. A run lives in
ROOT/<config>-<arm>-<seed>, with what it prints in `log.txt`. The same command again goes on: what
is finished is skipped, what was stopped is resumed. With --jobs above 1 so many runs train side by
side, the next one as soon as the host has the memory that the largest has used so far; they share
a GPU's memory in equal parts.
"""

import argparse
import dataclasses
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

from lm_jax.flags import load_module, run_name

HEADROOM = 1.2  # free memory a run needs, over the most that one has used


@dataclasses.dataclass
class Run:
    """One config with one seed."""

    command: list[str]
    workdir: pathlib.Path
    process: subprocess.Popen | None = None

    @property
    def finished(self) -> bool:
        """Whether the last run of the command went to its end."""
        return (self.workdir / "sweep.json").exists()

    def start(self, jobs: int) -> None:
        """Start it, or go on where it stopped."""
        self.workdir.mkdir(parents=True, exist_ok=True)
        share = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / jobs:.3f}"} if jobs > 1 else {}
        with (self.workdir / "log.txt").open("a") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=subprocess.STDOUT, env=share | os.environ
            )

    def training(self) -> bool:
        """Whether the first update is done, when nearly all memory is in use."""
        metrics = self.workdir / "metrics.jsonl"
        return metrics.exists() and metrics.stat().st_size > 0

    def end(self, code: int) -> None:
        """Note how it ended."""
        if code == 0:
            (self.workdir / "sweep.json").write_text(json.dumps(self.command) + "\n")
        words = "finished" if code == 0 else f"failed with exit code {code}"
        print(f"{self.workdir}: {words}, see {self.workdir / 'log.txt'}", flush=True)


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
        ValueError: if a finished run in the way had another command, or two runs one folder.
    """
    runs = []
    for seed in seeds:
        for spec in itertools.chain.from_iterable(map(arms, specs)):
            workdir = root / run_name(spec, seed)
            command = [sys.executable, "-m", "lm_jax.main", f"--config={spec}"]
            command += [f"--config.seed={seed}", f"--workdir={workdir}", *flags]
            run = Run(command, workdir)
            if run.finished:
                before = json.loads((workdir / "sweep.json").read_text())
                if before[1:] != command[1:]:
                    raise ValueError(
                        f"{workdir}: was finished with `{' '.join(before[1:])}`, not with "
                        f"`{' '.join(command[1:])}`; give another --root."
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
    print(f"{len(runs)} runs, {len(runs) - len(waiting)} finished before", flush=True)
    running: list[Run] = []
    failed, largest = False, 0
    try:
        while waiting or running:
            for run in list(running):
                assert run.process is not None
                largest = max(largest, peak_bytes(run.process))
                if (code := run.process.poll()) is not None:
                    run.end(code)
                    failed |= code != 0
                    running.remove(run)
            settled = all(run.training() for run in running)
            fits = not running or (settled and free_bytes() > HEADROOM * largest)
            if waiting and len(running) < jobs and fits:
                running.append(waiting.pop(0))
                running[-1].start(jobs)
            time.sleep(0.2)
    finally:
        for process in _alive(running):
            process.send_signal(signal.SIGTERM)  # saves and stops
        for process in _alive(running):
            process.wait()
    return not failed


def _alive(runs: Sequence[Run]) -> Iterator[subprocess.Popen]:
    return (run.process for run in runs if run.process is not None and run.process.poll() is None)


def main() -> None:
    """Plan the runs and run them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("configs", nargs="+", help="FILE, FILE:ARM or FILE:*")
    parser.add_argument("--seeds", default="0", help="numbers with commas")
    parser.add_argument("--root", type=pathlib.Path, default=pathlib.Path("runs"))
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    arguments, flags = sys.argv[1:], []
    if "--" in arguments:
        cut = arguments.index("--")
        arguments, flags = arguments[:cut], arguments[cut + 1 :]
    args = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        seeds = [int(seed) for seed in args.seeds.split(",")]
        runs = plan(args.configs, seeds, args.root, flags)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{error}\n")
    complete = sweep(runs, max(1, args.jobs))
    print(f"python -m lm_jax.compare {' '.join(str(run.workdir) for run in runs)}")
    sys.exit(0 if complete else 1)


if __name__ == "__main__":
    main()
