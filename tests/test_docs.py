"""README.md and docs/: figures are current and have a record, links and names lead somewhere."""

import importlib.util
import inspect
import pathlib
import pkgutil
import re
import sys

import pytest

import lm_jax
from lm_jax.__main__ import COMMANDS
from lm_jax.config.fields import Config
from lm_jax.config.section import field_types, marks
from tests.helpers import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import figures

import docs

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
UNIT = r"""(?:ms|us|s|seconds|min|minutes|h|hours|[kM]?\ ?tokens(?:/s|\ a\ second|\ per\ second)
    |[KMGT]i?B(?:/s)?|[MGT]FLOP/s|%|x|times|nats|bits\ per\ byte)"""
MEASURED = re.compile(
    rf"""(?<![\w.$])\d[\d.,]*\s?{UNIT}(?![\w/])
    |(?:perplexity|loss|ratio|speed)\s(?:of|is|was|reaches)\s(?:about\s)?\d[\d.,]*""",
    re.VERBOSE,
)
# What looks like a measurement and is none, and why.
ALLOWED = {
    "8 x 8": "the shape of a matrix",
    "32 MB": "data/parts.py cuts a corpus into pieces of this size",
    "64 MiB": "the limit from which the loss is fused",
    "25, 35 and 45 %": "shares that configs/phase1.py sets",
    "every 5 seconds": "console.py shows a sign of life this often",
    "95 %": "the level of an interval",
    "100 %": "all of a share",
}


def prose(text: str) -> str:
    """Markdown without blocks of figures, code and comments."""
    text = figures.BLOCK.sub("", text)
    text = re.sub(r"^(```|~~~).*?^\1$", "", text, flags=re.M | re.S)
    return re.sub(r"`[^`\n]*`|<!--.*?-->", "", text)


def measurements(text: str) -> list[str]:
    """Numbers with a unit that stand in prose, beside those allowed."""
    text = prose(text)
    for words in ALLOWED:
        text = text.replace(words, "")
    return [match[0] for match in MEASURED.finditer(text)]


def anchors(text: str) -> set[str]:
    """Ids of the headings, and those written as { #id }."""
    found = set(re.findall(r"\{ ?#([\w.-]+)", text)) | set(re.findall(r"^::: (\S+)", text, re.M))
    code = re.sub(r"^(```|~~~).*?^\1$", "", text, flags=re.M | re.S)
    for title in re.findall(r"^#+ (.*)$", code, re.M):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title.partition(" {")[0])
        found.add(re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", words).strip().lower()))
    return found


@pytest.fixture(scope="module")
def texts():
    """The Markdown of every page, those made from the code among them."""
    made = {ROOT / "docs" / name: page() for name, page in docs.PAGES.items()}
    return made | {page: page.read_text() for page in PAGES}


def broken_links(page: pathlib.Path, text: str, texts: dict[pathlib.Path, str]) -> list[str]:
    """Internal links of a page whose file or heading does not exist."""
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        if re.match(r"\w+:", target):
            continue
        place, _, anchor = target.partition("#")
        path = (page.parent / place).resolve() if place else page
        if path not in texts and not path.exists():
            broken.append(target)
        elif anchor and anchor not in anchors(texts.get(path, "")):
            broken.append(target)
    return broken


def missing_names(text: str) -> list[str]:
    """Names of the package, its config, its commands and files that do not exist."""
    fields = {path for path, _ in marks(Config)}
    sections = {name for name, kind in field_types(Config).items() if field_types(kind)}
    checks = {check.name for family in docs.families() for check in family.checks.values()}
    missing = [
        f"config.{name}"
        for name in re.findall(r"--config\.([a-z][\w.]*\w)", text)
        if name not in fields
    ]
    missing += [
        name
        for name in re.findall(r"`([a-z]+\.[a-z_]+\w)(?:=[^`]*)?`", text)
        if name.partition(".")[0] in sections and name not in fields | checks
        if not name.endswith((".json", ".safetensors"))
    ]
    for name in re.findall(r"-m (lm_jax[\w.]*\w)", text):
        if importlib.util.find_spec(name) is None:
            missing.append(f"-m {name}")
    missing += [
        f"lm-jax {name}"
        for name in re.findall(r"(?:`|^)lm-jax (\w+)", text, re.M)
        if name not in COMMANDS
    ]
    for name in re.findall(r"(?<![\w./-])lm_jax(?:\.[A-Za-z_]\w*)+", text):
        try:
            pkgutil.resolve_name(name)
        except (ImportError, AttributeError):
            missing.append(name)
    for name in re.findall(r"(?<![\w./-])(?:lm_jax|configs|scripts|tests)/[\w/.-]*\w", text):
        if not (ROOT / name).exists():
            missing.append(name)
    return missing


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_figures_are_current(page):
    assert not figures.stale([page]), "run `python scripts/figures.py`"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_measured_figures_stand_in_blocks(page):
    assert not measurements(page.read_text())


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_internal_links_lead_somewhere(page, texts):
    assert not broken_links(page, page.read_text(), texts)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_what_is_named_exists(page):
    assert not missing_names(page.read_text())


def test_generated_pages_link_to_what_exists(texts):
    made = {page: text for page, text in texts.items() if page not in PAGES}
    inside = {page: [t for t in broken_links(page, text, texts)] for page, text in made.items()}
    prose_pages = {"doctor.md"}  # written by hand, beside those made here
    assert {t for found in inside.values() for t in found} <= prose_pages


def test_every_check_has_an_entry_and_every_fault_a_check(texts):
    checks = texts[ROOT / "docs" / "checks.md"]
    assert len(re.findall(r"^### ", checks, re.M)) == len(set(re.findall(r"\{ #(\S+) \}", checks)))
    linked = set(re.findall(r"checks\.md#([\w-]+)", texts[ROOT / "docs" / "faults.md"]))
    assert len(linked) > 50 and linked <= anchors(checks)


def test_every_field_has_an_entry(texts):
    found = re.findall(r"^- `([\w.]+)`", texts[ROOT / "docs" / "config.md"], re.M)
    assert found == [path for path, _ in marks(Config)]


def test_what_public_functions_return_is_on_the_api_page(texts):
    public = [getattr(lm_jax, name) for name in lm_jax.__all__]
    kinds = [inspect.signature(one).return_annotation for one in public if inspect.isfunction(one)]
    shown = set(re.findall(r"^::: (?:\w+\.)+(\w+)$", texts[ROOT / "docs" / "api.md"], re.M))
    assert {"Run", "Comparison"} <= {getattr(kind, "__name__", kind) for kind in kinds} <= shown


def test_errors_are_told_with_their_remedy():
    told = docs.errors()
    assert "*path*: no such file; give a path as configs/quickstart.py." in told
    assert "config.model.heads: does not divide config.model.d_model=*D*; choose a divisor" in told


def test_every_block_names_its_record():
    for name, block in figures.BLOCKS.items():
        assert re.search(r"Measured|python scripts|pytest|seed 0", block()), name
    assert set(re.findall(r"^\| `([a-z0-9-]+)` \|", figures.__doc__, re.M)) == set(figures.BLOCKS)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("It takes 8.05 ms.", ["8.05 ms"]),
        ("It is 1.25x the speed, 41M tokens a second.", ["1.25x", "41M tokens a second"]),
        ("a test perplexity of 79.71", ["perplexity of 79.71"]),
        ("0.5 % of the step; `12 ms`; T 512, 8 x 8 blocks, jax 0.11.2", ["0.5 %"]),
        ("<!-- figures: loop -->\n\n3 s\n\n<!-- end -->\n", []),
        ("```\n3 s\n```\n", []),
    ],
)
def test_measurements_are_seen(text, found):
    assert measurements(text) == found


def test_what_is_broken_is_seen(texts):
    page = ROOT / "docs" / "x.md"
    text = "[a](config.md#optim) [b](config.md#nothing) [c](nowhere.md) ![d](d.png) [e](https://e)"
    assert broken_links(page, text, texts) == ["config.md#nothing", "nowhere.md", "d.png"]
    text = "`lm_jax.Config` `lm_jax.Confg` --config.optim.lr=1 `optim.peak_lr` `optim.rate` "
    text += "python -m lm_jax.nothing; scripts/nothing.py `model.suffix_swap` `lm-jax tran`"
    assert set(missing_names(text)) == {
        *("lm_jax.Confg", "config.optim.lr", "optim.rate", "-m lm_jax.nothing"),
        *("lm_jax.nothing", "scripts/nothing.py", "lm-jax tran"),
    }


def test_a_block_that_cannot_be_filled_is_refused():
    with pytest.raises(ValueError, match=r"nothing is no block; write one of .*quickstart"):
        figures.filled("<!-- figures: nothing -->\n\n<!-- end -->\n")
    with pytest.raises(ValueError, match="loop has no end; write <!-- end --> after it"):
        figures.filled("<!-- figures: loop -->\n\n<!-- figures: start -->\n\n<!-- end -->\n")


def test_a_stale_block_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- figures: start -->\n\nIt took 1 s.\n\n<!-- end -->\n")
    text = figures.stale([page])[page]
    assert "It took 1 s." not in text and "bench_start.py" in text
    page.write_text(text)
    assert not figures.stale([page])
