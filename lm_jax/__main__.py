"""The command `lm-jax`, or `python -m lm_jax`: one word for each thing to do with a run."""

import pkgutil
import sys
from collections.abc import Sequence

from lm_jax.config.section import advice

# Name: the module whose `main` it is, and what it does.
COMMANDS = {
    "train": ("lm_jax.main", "train, evaluate and save a run, or go on with one that was stopped"),
    "prepare": ("lm_jax.data.prepare", "tokenise a corpus before, on several machines if need be"),
    "doctor": ("lm_jax.preflight.command", "look for what is wrong in a config, a run or a log"),
    "evaluate": ("lm_jax.evaluate", "score a whole split of a run, each token once"),
    "harness": ("lm_jax.harness.command", "run tasks of lm-evaluation-harness on a run"),
    "generate": ("lm_jax.generate", "print samples of a run"),
    "export": ("lm_jax.export", "write a run as a folder that Hugging Face transformers loads"),
    "report": ("lm_jax.report", "write the page of a run, as training does at every evaluation"),
    "compare": ("lm_jax.compare.compare", "put finished runs side by side and rank them"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Hand the arguments over to the command that the first one names."""
    name, *rest = (sys.argv if argv is None else argv)[1:] or ["--help"]
    if name in ("-h", "--help"):
        print("usage: lm-jax COMMAND ...; `lm-jax COMMAND --help` lists its flags\n")
        for command, (_, does) in COMMANDS.items():
            print(f"  {command:10}{does}")
        print("\nExample: lm-jax train configs/quickstart.py")
    elif name in COMMANDS:
        pkgutil.resolve_name(f"{COMMANDS[name][0]}:main")([f"lm-jax {name}", *rest])
    else:
        print(f"{name}: no such command; {advice(name, list(COMMANDS))}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
