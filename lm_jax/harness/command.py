"""Tasks of EleutherAI's lm-evaluation-harness (`pip install 'lm_jax[eval]'`).

    python -m lm_jax.harness runs/quickstart-0 --tasks=NAME,NAME --include_path=DIR

runs tasks on the best checkpoint of a run, or on a Hugging Face checkpoint, and prints the table of
lm_eval. DIR holds tasks of your own as YAML.
"""

import importlib.util
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from absl import flags

from lm_jax import console, processes
from lm_jax.config.flags import parse_flags
from lm_jax.config.section import close
from lm_jax.door import command
from lm_jax.files import finite_or_none, user_path, write_text
from lm_jax.pretrained import define_model


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run tasks on a model; print their table."""
    given = flags.FlagValues()
    define_model(given)
    flags.DEFINE_list("tasks", None, "Names of tasks, groups or tags, or YAML files.", given)
    flags.mark_flag_as_required("tasks", given)
    flags.DEFINE_string("include_path", None, "Folder with tasks of your own.", given)
    limit = "Most documents of a task, for a trial."
    flags.DEFINE_integer("limit", None, limit, lower_bound=1, flag_values=given)
    shots = "Examples before each question. Default: as the task says."
    flags.DEFINE_integer("num_fewshot", None, shots, lower_bound=0, flag_values=given)
    begins = "Begin a text with the token that opens a document, as in training."
    flags.DEFINE_bool("add_bos_token", True, begins, given)
    rows = "Rows at a time. Default: as in the run's config."
    flags.DEFINE_integer("batch_size", None, rows, lower_bound=1, flag_values=given)
    flags.DEFINE_string("out", None, "File for the results, in JSON.", given)
    parse_flags(given, argv, __doc__, subject=["workdir"])
    out = user_path(given.out) if given.out else None
    processes.only_first("harness")
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(
            "lm_jax.harness needs the package lm_eval: pip install 'lm_jax[eval]', or lm_eval."
        )
    console.use(aside=True)
    # Imported here, for they take seconds and may be missing.
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import handle_non_serializable, make_table

    from lm_jax.harness.model import RunLM

    with console.phase("looking for the tasks"):
        manager = TaskManager(include_path=given.include_path, include_defaults=False)
        if unknown := _unknown(manager, given.tasks):  # the thousands of lm_eval take a while
            manager = TaskManager(include_path=given.include_path)
            unknown = _unknown(manager, unknown)
    if unknown:
        near = "".join(f"; did you mean {name}?" for name in close(unknown[0], manager.all_tasks))
        remedy = near or "; name one of lm_eval, or the folder of yours with --include_path."
        raise ValueError(f"--tasks={unknown[0]}: there is no such task{remedy}")
    with console.phase(f"opening {given.workdir}"):
        model = RunLM(given.workdir, given.checkpoint, given.add_bos_token, given.batch_size)
    results = simple_evaluate(
        model,
        tasks=given.tasks,
        num_fewshot=given.num_fewshot,
        limit=given.limit,
        task_manager=manager,
        log_samples=False,
    )
    print(make_table(results))
    if results.get("groups"):
        print(make_table(results, "groups"))
    if out:
        text = json.dumps(results, default=handle_non_serializable)
        text = json.dumps(finite_or_none(json.loads(text)), indent=2, allow_nan=False)
        write_text(out, text + "\n")
        console.say(f"{out} holds the results")


def _unknown(manager: Any, tasks: Sequence[str]) -> list[str]:
    """The names that a TaskManager does not know and that are no files."""
    others = [name for name in tasks if not pathlib.Path(name).exists()]
    return [name for name in others if not manager.match_tasks([name])]


if __name__ == "__main__":
    main()
