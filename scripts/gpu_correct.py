"""Whether attention, loss and a whole update compute on this device what they are defined to.

    python scripts/gpu_correct.py [--impls=xla,cudnn,blockwise] [--jsonl=FILE] [--seconds=S] [--toy]

Exact is the plain implementation in float32 with the highest precision of products. An
implementation is right if its distance from that is at most twice the one of the plain
implementation in its own dtype, and a little. A pallas kernel is run ten times more: what it adds
up in a fixed order must have the same bits. Exit code 1 if anything is wrong.

Values only: compilations run in threads and choose no fast algorithms, which takes long.
"""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"

import concurrent.futures
import pathlib
import sys
import time
from typing import Any

import benchmark
import jax
import numpy as np
from gpu_checks import Check, Planned, Values, plan

from lm_jax.config.manual import script_parser

PALLAS = ("pallas", "pallas_deterministic")
NEVER = "never begun"  # of every check until it is


def distance(a: Any, b: Any) -> float:
    """|a - b| / |b| in the Euclidean norm; of lists of arrays as a whole."""
    if not isinstance(b, list):
        a, b = [a], [b]
    pairs = [(np.float32(x), np.float32(y)) for x, y in zip(a, b, strict=True)]
    error = np.linalg.norm([np.linalg.norm((x - y).ravel()) for x, y in pairs])
    return float(error / max(np.linalg.norm([np.linalg.norm(y.ravel()) for _, y in pairs]), 1e-30))


def errors(got: Values, exact: Values) -> Values:
    """The distance of each value, and the largest of a leaf where there are several."""
    found = {name: distance(got[name], exact[name]) for name in exact}
    for name in [name for name in exact if isinstance(exact[name], list)]:
        leaves = [distance(x, y) for x, y in zip(got[name], exact[name], strict=True)]
        found[f"{name}, worst leaf"] = float(np.max(leaves))  # NaN stays
    return found


def moved(impl: str, compiled: Any, args: tuple[Any, ...], got: Values) -> tuple[bool, int]:
    """Whether ten more runs give the same, and how many have another gradient by the queries.

    pallas adds that one up in no fixed order.
    """
    fine, other = True, 0
    for _ in range(10 if impl in PALLAS and "dq" in got else 0):
        again = jax.device_get(compiled(*args))
        same = {name: np.array_equal(again[name], got[name], equal_nan=True) for name in got}
        other += not same["dq"]
        if impl == "pallas":
            same["dq"] = distance(again["dq"], got["dq"]) < 1e-2
        fine &= all(same.values())
    return fine, other


class Judge:
    """Compiles checks ahead in threads and writes a row about every implementation."""

    def __init__(self, path: pathlib.Path | None, seconds: float):
        """Rows go to a file of JSON lines; nothing is begun after so many seconds."""
        self.path, self.until = path, time.perf_counter() + seconds
        self.pool = concurrent.futures.ThreadPoolExecutor(max(1, (os.cpu_count() or 2) - 1))
        self.wrong: list[str] = []

    def left(self) -> float:
        """Seconds."""
        return self.until - time.perf_counter()

    def say(self, check: Check | Planned, impl: str, **row: Any) -> None:
        """Write a row."""
        benchmark.append(self.path, {"part": "correct", "case": check.name, "impl": impl, **row})
        if row.get("ok") is False:
            self.wrong.append(f"{impl}: {check.name}")
        if "running" not in row and row.get("not_run") != NEVER:
            print(check.name, impl, row, flush=True)

    def begin(self, check: Check) -> dict[str, concurrent.futures.Future]:
        """Start all compilations of a check."""

        def truth(*args: Any) -> tuple[Values, Values]:
            return check.exact(*args), check.plain(*args)

        lowered: dict[str, Any] = {}
        for impl, function in check.functions.items():
            try:
                lowered[impl] = jax.jit(function).lower(*check.args)
            except Exception as error:
                if str(error).startswith("attention.impl"):  # it says that it cannot do this
                    self.say(check, impl, refused=str(error))
                else:
                    self.say(check, impl, ok=False, raised=benchmark.words(error))
        if lowered:
            lowered = {"": jax.jit(truth).lower(*check.args), **lowered}
        return {impl: self.pool.submit(found.compile) for impl, found in lowered.items()}

    def judge(self, check: Check, compiled: dict[str, concurrent.futures.Future]) -> None:
        """Run and compare."""
        if not compiled:
            return
        try:
            truth = compiled.pop("").result(timeout=max(0.1, self.left()))
            exact, plain = jax.device_get(truth(*check.args))
        except Exception as error:
            late = isinstance(error, concurrent.futures.TimeoutError)
            reason = "out of time" if late else f"the definition: {benchmark.words(error)}"
            for impl in compiled:
                self.say(check, impl, not_run=reason)
            return
        limit = {}
        for name, allowed in errors(plain, exact).items():
            limit[name] = 2 * allowed + check.slack[name.split(",")[0]]
        for impl, future in compiled.items():
            try:
                function = future.result(timeout=max(0.1, self.left()))
                self.say(check, impl, running=True)
                got = jax.device_get(function(*check.args))
                distances = errors(got, exact)
                fine, other = moved(impl, function, check.args, got)
            except concurrent.futures.TimeoutError:
                self.say(check, impl, not_run="not compiled in time")
                continue
            except Exception as error:
                self.say(check, impl, ok=False, raised=benchmark.words(error))
                continue
            ok = fine and all(distances[name] <= limit[name] for name in limit)  # NaN is not <=
            row = dict(ok=bool(ok), error=distances, limit=limit)
            self.say(check, impl, **row, **({"dq_moved": other} if impl in PALLAS else {}))


def main() -> None:
    """Check everything."""
    parser = script_parser(__doc__)
    parser.add_argument("--impls", default="xla,cudnn,blockwise", help="of attention")
    parser.add_argument("--jsonl", type=pathlib.Path, help="file to which each check adds a line")
    parser.add_argument("--seconds", type=float, default=600, help="begin nothing after so many")
    parser.add_argument("--toy", action="store_true", help="sizes for a CPU")
    args = parser.parse_args()
    judge = Judge(args.jsonl, args.seconds)
    begun = []
    planned = plan(args.impls.split(","), args.toy)
    for found in planned:
        for impl in found.impls:
            judge.say(found, impl, not_run=NEVER)
    for found in planned:
        if judge.left() < 3:
            break
        check = found.make()
        begun.append((check, judge.begin(check)))
        while begun and all(future.done() for future in begun[0][1].values()):
            judge.judge(*begun.pop(0))
    for check, compiled in begun:
        judge.judge(check, compiled)
    print("wrong:", judge.wrong or "nothing")
    sys.stdout.flush()
    os._exit(bool(judge.wrong))  # not waiting for compilations that nobody needs any more


if __name__ == "__main__":
    main()
