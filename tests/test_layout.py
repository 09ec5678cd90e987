"""The rules of the house: who may import whom, how long things are, where a word may stand."""

import ast
import collections
import io
import pathlib
import tokenize

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "lm_jax"
# A room imports what stands above it, or in its own folder.
ORDER = (
    "collectives cuda marker files console signals door page doctor kernels config rundir "
    "processes together remote mirror places data compilations models sharding memory loss optim "
    "objective metrics step checksum orbax_errors checkpoint workdir pretrained ensemble start "
    "length evaluate decode samples generate harness proof card export history writers trace "
    "distill environment preflight compare curves report run setup progress heartbeat loop main "
    "__main__ __init__"
).split()
FILES = {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
IDS = {path: str(path.relative_to(PACKAGE)) for path in FILES}

CODE_LINES = 23_554


def room(path: pathlib.Path) -> str:
    """The top-level module or folder a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def module(path: pathlib.Path) -> str:
    """Its dotted name."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def imports(path: pathlib.Path) -> set[str]:
    """Modules of lm_jax that a file imports, at any depth of the file."""
    found: set[str] = set()
    for node in ast.walk(FILES[path]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found & {module(other) for other in FILES} - {"lm_jax"}


@pytest.mark.parametrize("path", FILES, ids=IDS.get)
def test_imports_go_one_way(path):
    own = room(path)
    if path.parts[-2:] == ("doctor", "__main__.py"):
        own = "preflight"  # the command alone hands over to it
    for name in imports(path):
        other = name.split(".")[1]
        assert ORDER.index(other) <= ORDER.index(own), f"{IDS[path]} imports {name}"


def test_imports_have_no_circle():
    graph = {module(path): imports(path) for path in FILES if path.name != "__init__.py"}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join((*above, name))
        if name in graph and name not in done:
            for other in graph[name]:
                visit(other, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_functions_and_files_are_short():
    functions, files = set(), set()
    for path, tree in FILES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                if length > (160 if room(path) == "kernels" else 60):
                    functions.add(f"{IDS[path]}:{node.name}")
        if len(path.read_text().splitlines()) > 350:
            files.add(IDS[path])
    assert not functions and not files


def code_lines(path: pathlib.Path) -> int:
    """Lines without docstrings, comments and blanks."""
    described = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings: set[int] = set()
    for node in ast.walk(FILES[path]):
        if isinstance(node, described) and ast.get_docstring(node, clean=False) is not None:
            first = node.body[0]
            docstrings |= set(range(first.lineno, (first.end_lineno or 0) + 1))
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type not in layout | {tokenize.ENDMARKER}:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def test_code_does_not_grow():
    """Lower the number when it falls; a change that raises it says what for in its commit."""
    assert sum(map(code_lines, FILES)) <= CODE_LINES


@pytest.mark.parametrize(
    ("word", "rooms"),
    [
        ("musota", ("models/musota.py", "models/families.py", "config/fields.py")),
        (
            "distill",
            ("distill/", "config/", "environment.py", "setup.py", "preflight/", "doctor/distill/"),
        ),
    ],
)
def test_a_word_stands_in_its_rooms(word, rooms):
    """In code; a docstring may point there."""
    allowed = {"doctor/__init__.py", "workdir.py"}  # examine_distillation, distillation.json
    for path in FILES:
        if not IDS[path].startswith(rooms) and IDS[path] not in allowed:
            names = {
                token.string
                for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
                if token.type == tokenize.NAME and word in token.string.lower()
            }
            assert not names, f"{IDS[path]}: {names}"


def test_the_loop_names_nothing_of_distillation():
    text = (PACKAGE / "loop.py").read_text()
    assert len(text.splitlines()) <= 150
    assert "distill" not in text and "teacher" not in text


def test_no_two_public_functions_share_a_name():
    found = collections.defaultdict(list)
    for path, tree in FILES.items():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                if room(path) not in ("doctor", "__init__"):
                    found[node.name].append(IDS[path])
    shared = {name: where for name, where in found.items() if len(where) > 1}
    shared.pop("main", None)  # of the commands
    assert not shared
