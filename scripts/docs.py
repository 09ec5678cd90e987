"""The pages of the documentation that are made from the code, at every build.

    mkdocs serve                        # this file is a hook of mkdocs.yml
    python scripts/docs.py config.md    # print one of these pages
    python scripts/docs.py --links      # list the external links of README.md and docs/

Nothing made here is kept, so nothing can be stale: the fields of the config come from
`lm_jax/config/fields.py`, the checks from the functions of the doctor, the faults from
`lm_jax/doctor/FAULTS.md`, the API from docstrings, the commands from their `--help`, and the errors
from the `raise` statements of the package, where each message is one sentence.
"""

import collections
import contextlib
import dataclasses
import importlib
import inspect
import io
import itertools
import pathlib
import pkgutil
import re
from collections.abc import Callable, Iterator
from typing import Any

from docs_errors import errors, escaped

import lm_jax
from lm_jax import doctor
from lm_jax.__main__ import COMMANDS
from lm_jax.config.fields import Config
from lm_jax.config.manual import meanings, script_parser
from lm_jax.config.section import field_types, get, marks
from lm_jax.doctor.checks import Check, Fixture
from lm_jax.doctor.facts import annotations

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE, SCRIPTS = ROOT / "lm_jax", ROOT / "scripts"

# Of a new run the doctor examines these families at either level, those at level full alone; the
# facts, which are given at level full alone, name the single checks of the former that are added.
FAST = "data model loss optimiser distill".split()
FULL = "training gradient eval".split()
FULL_FACTS = {"readers", "resume", "reference", "update_fn"}
ELSEWHERE = {
    "log": "after every evaluation of a run, and by `--log`",
    "arms": "by `doctor.examine_arms` alone",
}


# What the functions of `lm_jax` return: nobody makes one, and everybody reads its methods.
RETURNED = "run.Run", "history.History", "samples.Sample", "compare.compare.Comparison"


def config_page() -> str:
    """Every field: type, default, choices, and meaning with its unit."""
    lines = [
        "# Config",
        "",
        "Every field of a run. A flag sets one, `--config.optim.peak_lr=1e-3`; so does Python, "
        "`cfg.optim.peak_lr = 1e-3`. Durations are written in updates, tokens or epochs: `2000`, "
        "`2M tokens`, `3 epochs`. Beside its name a field has its type, its default, its choices "
        "and its meaning. One marked with * may change when a run goes on: no number of the "
        "trained model depends on it.",
    ]
    means, found = meanings(), dict(marks(Config))
    for section, paths in itertools.groupby(means, lambda path: path.rpartition(".")[0]):
        kind = field_types(Config)[section] if section else Config
        about = inspect.getdoc(kind) if section else "The run as a whole."
        lines += ["", f"## {section or 'Top level'}", "", str(about), ""]
        for path in paths:
            name = path.rpartition(".")[2]
            default, choices = str(get(Config(), path)), found[path].get("choices", ())
            parts = [
                f"{field_types(kind)[name].__name__}, " + (f"`{default}`" if default else "empty"),
                *([" | ".join(f"`{choice}`" for choice in choices)] if choices else []),
                escaped(means[path]),
            ]
            star = " \\*" * ("incidental" in found[path])
            lines.append(f"- `{path}`{{ #{path} }}{star}: {'; '.join(parts)}")
    return "\n".join(lines) + "\n"


@dataclasses.dataclass
class Family:
    """The checks and fixtures of one folder of the doctor."""

    name: str
    about: str
    facts: set[str]
    checks: dict[str, Check]
    fixtures: dict[str, Fixture]

    def needs(self, body: Callable[..., Any]) -> set[str]:
        """The facts without which a check is skipped, through its fixtures and other checks."""
        found: set[str] = set()
        for name, parameter in inspect.signature(body).parameters.items():
            if parameter.default is not parameter.empty or name == "subject":
                continue
            if name in self.facts:
                found.add(name)
            else:
                made = self.fixtures.get(name) or self.checks[name]
                found |= self.needs(made.body)
        return found

    def level(self, check: Check) -> str:
        """When a run meets the check."""
        if self.name in ELSEWHERE:
            return ELSEWHERE[self.name]
        full = self.name in FULL or FULL_FACTS & self.needs(check.body)
        level = "before a run at level full" if full else "before a run"
        return f"{level} with a teacher" if self.name == "distill" else level


def families() -> Iterator[Family]:
    """All families of the doctor, those that a run meets first."""
    for name in (*FAST, *FULL, *ELSEWHERE):
        package = importlib.import_module(f"lm_jax.doctor.{name}")
        subject = importlib.import_module(f"{package.__name__}.subject").Subject
        facts = {field.name for field in annotations(subject)}
        family = Family(name, inspect.getdoc(package) or "", facts, {}, {})
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            for key, value in vars(importlib.import_module(module.name)).items():
                if not isinstance(value, Check | Fixture) or value.body.__module__ != module.name:
                    continue
                kind: dict = family.checks if isinstance(value, Check) else family.fixtures
                kind[key] = value
        yield family


def checks_page() -> str:
    """Every check: what it looks at, when, what it needs and what to do if it fails."""
    every = list(families())
    lines = [
        "# Checks",
        "",
        f"The doctor has {sum(len(family.checks) for family in every)} checks in {len(every)} "
        "families. Each tests one claim. It passes, warns where a healthy run could look the same, "
        "or fails; without the facts that it needs it is skipped. See [the doctor](doctor.md) for "
        "how to run them and [the faults](faults.md) for what each was seen to catch.",
    ]
    for family in every:
        lines += ["", f"## {family.name}", "", family.about]
        for check in family.checks.values():
            needs = ", ".join(f"`{fact}`" for fact in sorted(family.needs(check.body)))
            lines += [
                "",
                f"### `{check.name}` {{ #{_anchor(check.name)} }}",
                "",
                escaped(" ".join((inspect.getdoc(check.body) or "").split())),
                "",
                f"- If it fails: {escaped(check.remedy)}",
                f"- Looked at: {family.level(check)}",
                *([f"- Needs: {needs}"] if needs else []),
            ]
    return "\n".join(lines) + "\n"


def _anchor(check: str) -> str:
    return check.replace(".", "-")


def faults_page() -> str:
    """The table of planted faults, with links to the checks."""
    text = (PACKAGE / "doctor" / "FAULTS.md").read_text()
    return re.sub(
        r"\| `([a-z]+\.\w+)` \|",
        lambda match: f"| [`{match[1]}`](checks.md#{_anchor(match[1])}) |",
        text,
    )


def api_page() -> str:
    """The public names of `lm_jax` and of its doctor."""
    lines = ["# API", "", _first(lm_jax), "", "## lm_jax", ""]
    lines += ["Every field of `lm_jax.Config` is on [its own page](config.md).", ""]
    skipped = ("__version__", "doctor")
    for name in (name for name in lm_jax.__all__ if name not in skipped):
        lines += [f"::: lm_jax.{name}", ""]
    lines += ["## What they return", ""]
    for name in RETURNED:
        lines += [f"::: lm_jax.{name}", ""]
    lines += ["## lm_jax.doctor", "", f"{_first(doctor)} See [the doctor](doctor.md).", ""]
    for name in doctor.__all__:
        if name.startswith("examine_"):
            lines += [_examination(name), ""]
        else:
            lines += [f"::: lm_jax.doctor.{name}", ""]
    return "\n".join(lines)


def _first(described: Any) -> str:
    """The first sentence of a docstring."""
    return (inspect.getdoc(described) or "").partition("\n")[0]


def _examination(name: str) -> str:
    """An entry point of the doctor, whose signature and docstring are made of its facts."""
    function = getattr(doctor, name)
    about, *sections = re.split(r"^(Args|Raises):\n", inspect.getdoc(function) or "", flags=re.M)
    parts = [f'### lm_jax.doctor.{name} {{ #lm_jax.doctor.{name} data-toc-label="{name}" }}']
    arguments = list(inspect.signature(function).parameters.values())
    named = [p for p in arguments if p.kind is p.KEYWORD_ONLY]
    lines = [*arguments[: len(arguments) - len(named)], *(["*"] if named else []), *named]
    parts.append("\n".join([f"```python\n{name}(", *(f"    {line}," for line in lines), ")\n```"]))
    parts.append(about.strip())
    for title, body in zip(sections[::2], sections[1::2], strict=True):
        body = re.sub(r"\n {8}", " ", body)
        parts.append(f"{title}:")
        parts.append(re.sub(r"^ {4}(\w+): (.*)$", r"- `\1`: \2", body, flags=re.M).strip())
    return "\n\n".join(parts)


def commands_page() -> str:
    """What each command prints for `--help`, without the fields of the config."""
    lines = [
        "# Commands",
        "",
        "`lm-jax NAME` and `python -m MODULE` are the same. Flags are written `--flag=value` or "
        "`--flag value`. Exit codes: 0 done, 1 a failed run or check, 2 a command or an input that "
        "is wrong, 128 + the signal's number when stopped. An error is one sentence; `--debug` "
        "gives the traceback.",
    ]
    for name, (module, does) in COMMANDS.items():
        told = io.StringIO()
        with contextlib.redirect_stdout(told), contextlib.suppress(SystemExit):
            pkgutil.resolve_name(f"{module}:main")([f"lm-jax {name}", "--help"])
        text = told.getvalue().partition("\nConfigs\n")[0].strip()
        lines += ["", f"## {name}", "", f"{does[0].upper()}{does[1:]}.", ""]
        lines += ["```text", text, "```"]
        if "\nConfigs\n" in told.getvalue():
            lines += ["", "The fields of a config are on [their own page](config.md)."]
    return "\n".join(lines) + "\n"


PAGES: dict[str, Callable[[], str]] = {
    "config.md": config_page,
    "checks.md": checks_page,
    "faults.md": faults_page,
    "api.md": api_page,
    "commands.md": commands_page,
}
ERRORS_HERE = "<!-- generated: errors -->"


def on_files(files: Any, config: Any) -> Any:
    """Hook of MkDocs: the generated pages, and what the others link to in scripts/."""
    from mkdocs.structure.files import File

    for name, page in PAGES.items():
        files.append(File.generated(config, name, content=page()))
    for pattern in ("results/*.md", "results/*.png", "*.ipynb"):
        for path in sorted(SCRIPTS.glob(pattern)):
            name = path.relative_to(SCRIPTS).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Hook of MkDocs: the list of errors in its place, and links to scripts/."""
    if ERRORS_HERE in markdown:
        markdown = markdown.replace(ERRORS_HERE, errors())
    return markdown.replace("](../scripts/", "](")


def external_links() -> dict[str, list[str]]:
    """Every https address in README.md and docs/, with the files that hold it."""
    found: dict[str, list[str]] = collections.defaultdict(list)
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for address in sorted(set(re.findall(r"https?://[^\s)\"'>`]+", path.read_text()))):
            found[address].append(str(path.relative_to(ROOT)))
    return dict(sorted(found.items()))


def main() -> None:
    """Print a page or the links."""
    parser = script_parser(__doc__)
    parser.add_argument("page", nargs="?", choices=[*PAGES, "errors"], help="print this one")
    parser.add_argument("--links", action="store_true", help="list the external links")
    args = parser.parse_args()
    if args.links:
        for address, places in external_links().items():
            print(f"{address}  {', '.join(places)}")
    elif args.page:
        print({**PAGES, "errors": errors}[args.page]())
    else:
        parser.error("name a page, or --links")


if __name__ == "__main__":
    main()
