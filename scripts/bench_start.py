"""Seconds from the command to the first update, of a first start and of later ones.

    python scripts/bench_start.py --source_dir=DIR [--config=wikitext2_cpu] [--repeats=3]

The text is tokenised before. Findings and compilations lie in a cache of its own, which is empty at
the first start. An update is made when its row stands in `metrics.jsonl`; then the run is stopped.
"""

import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time

from lm_jax import config
from lm_jax.config.flags import load_config
from lm_jax.config.manual import script_parser
from lm_jax.data.open import open_data


def seconds_to_first_update(command: list[str], workdir: pathlib.Path) -> float:
    """Start a training in a new workdir and stop it after its first logged update.

    Raises:
        RuntimeError: if it ends by itself.
    """
    began = time.perf_counter()
    process = subprocess.Popen([*command, f"--workdir={workdir}"], stdout=subprocess.DEVNULL)
    metrics = workdir / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size):
        if process.poll() is not None:
            raise RuntimeError(f"{command}: ended with exit code {process.returncode}; run it.")
        time.sleep(0.02)
    seconds = time.perf_counter() - began
    process.send_signal(signal.SIGINT)
    process.wait()
    return seconds


def main() -> None:
    """Start several times and print the seconds."""
    parser = script_parser(__doc__)
    parser.add_argument("--config", default="wikitext2_cpu", help="file or name")
    parser.add_argument("--source_dir", default="", help="folder of the corpus")
    parser.add_argument("--repeats", type=int, default=3, help="later starts")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = {"data__source_dir": args.source_dir, "data__cache_dir": folder}
        open_data(config.replace(load_config(args.config), **data))
        command = [sys.executable, "-m", "lm_jax.main", args.config]
        command += [f"--config.data.source_dir={args.source_dir}"]
        command += [f"--config.data.cache_dir={folder}"]
        starts = [
            seconds_to_first_update(command, pathlib.Path(folder, f"run-{number}"))
            for number in range(args.repeats + 1)
        ]
    first, *later = starts
    told = ", ".join(f"{seconds:.2f}" for seconds in later)
    print(f"first start {first:.1f} s; later {told}, median {statistics.median(later):.1f} s")


if __name__ == "__main__":
    main()
