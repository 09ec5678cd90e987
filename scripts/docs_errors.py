"""The list of errors in the documentation, from the `raise` statements of the package."""

import ast
import collections
import pathlib
import re
from collections.abc import Iterable, Iterator

PACKAGE = pathlib.Path(__file__).parents[1] / "lm_jax"
AREAS = {
    "Config and flags": "config rundir workdir start length memory __main__ door",
    "Data and tokenizers": "data",
    "Models, attention and losses": "models kernels loss optim objective sharding step",
    "Training": "setup loop progress heartbeat checksum orbax_errors checkpoint marker files "
    "writers trace environment main metrics remote mirror places processes together",
    "Evaluation and samples": "evaluate ensemble pretrained decode generate samples run history",
    "The page of a run": "report curves page",
    "Export": "export harness card proof",
    "Distillation": "distill",
    "Comparing": "compare",
    "The doctor": "doctor preflight",
}
ERRORS = "ValueError ConfigError OSError FileNotFoundError FileExistsError RuntimeError Broken"


def errors() -> str:
    """The sentences of the errors that the package raises, by area."""
    area_of = {room: area for area, rooms in AREAS.items() for room in rooms.split()}
    found: dict[str, set[str]] = collections.defaultdict(set)
    for path in sorted(PACKAGE.rglob("*.py")):
        place = path.relative_to(PACKAGE)
        area = area_of.get(place.parts[0].removesuffix(".py"), "Elsewhere")
        tree = ast.parse(path.read_text())
        known = _texts(tree.body)
        for function in (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)):
            nodes = list(ast.walk(function))
            texts = known | _texts(nodes)
            found[area] |= {_sentence(message, texts) for message in _messages(nodes)} - {""}
    text = (
        "Each is one sentence that names the field, the flag or the file and what to do. Words in "
        "*italics* stand for what your message has in their place: search this page for a few of "
        "the others. After the name of a config field your message has its value too.\n"
    )
    for area in (*AREAS, "Elsewhere"):
        if found[area]:
            lines = (f"- {sentence}\n" for sentence in sorted(found[area], key=_letters))
            text += f"\n### {area}\n\n{''.join(lines)}"
    return text


def escaped(text: str) -> str:
    """Prose in which what Markdown would take for markup is none."""
    return re.sub(r"([*<>\[\]])", r"\\\1", text)


def _letters(line: str) -> str:
    """What a line is sorted by."""
    return line.replace("*", "").replace("\\", "").lower()


def _texts(nodes: Iterable[ast.AST]) -> dict[str, str]:
    """The names that stand for one text, and that text."""
    found: dict[str, list[ast.expr]] = collections.defaultdict(list)
    for node in nodes:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id].append(node.value)
    return {
        name: value.value
        for name, (value, *others) in found.items()
        if isinstance(value, ast.Constant) and isinstance(value.value, str) and not others
    }


def _messages(nodes: Iterable[ast.AST]) -> Iterator[list[ast.expr]]:
    """The parts of what is raised, and of what the rules of the config yield to be raised."""
    for node in nodes:
        prefix, message = "", None
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            if ast.unparse(node.exc.func).rpartition(".")[2] in ERRORS.split():
                message = node.exc.args[0]
        elif isinstance(node, ast.Yield):
            prefix, message = "config.", node.value
        if isinstance(message, ast.Constant):
            yield [ast.Constant(prefix), message]
        elif isinstance(message, ast.JoinedStr):
            yield [ast.Constant(prefix), *message.values]


def _sentence(parts: list[ast.expr], texts: dict[str, str]) -> str:
    """A message as Markdown; empty if it has hardly a word of its own."""
    text, own = "", 0
    for part in parts:
        said = part.value if isinstance(part, ast.Constant) else texts.get(_name(part))
        if said is not None:
            text, own = text + escaped(str(said)), own + len(str(said).split())
        elif not text.endswith("*"):  # two in a row are one
            text += f"*{_name(part).strip('_').replace('_', ' ')}*"
    return text if own > 2 else ""


def _name(part: ast.expr) -> str:
    """The last name of a replaced expression: that of the field for `cfg.train.steps`."""
    names = re.findall(r"[A-Za-z]\w*", ast.unparse(part.value))  # type: ignore[attr-defined]
    return names[-1] if names else "value"
