"""What several tests share."""

import contextlib
import hashlib
import html
import html.parser
import json
import os
import pathlib
import re
import signal
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm_jax import config
from lm_jax.config import Config, rules
from lm_jax.config.flags import load_module
from lm_jax.config.resolve import resolve
from lm_jax.data import synthetic, windows
from lm_jax.data.open import open_data
from lm_jax.preflight import distill, run
from lm_jax.workdir import open_trained

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = sorted(p.stem for p in (ROOT / "configs").glob("*.py"))


def shared_data(name: str) -> pathlib.Path:
    """A file or folder of the shared data; the test is skipped where it is not there."""
    default = ROOT.parent / "shared" / "data"
    path = pathlib.Path(os.environ.get("LM_JAX_SHARED_DATA", default)) / name
    if not path.exists():
        pytest.skip(f"{name} is not in LM_JAX_SHARED_DATA or ../shared/data")
    return path


def batch_hash(batch: dict) -> str:
    """A short hash of a batch's names, types, shapes and values."""
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(batch):
        value = np.ascontiguousarray(batch[name])
        digest.update(f"{name} {value.dtype} {value.shape};".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()


def every(families):
    """Names of model families; those that take long to compile are left to the slow tests."""
    slow = ("scanned", "factorised", "musota")
    return [pytest.param(name, marks=pytest.mark.slow if name in slow else ()) for name in families]


def tiny_config(**changes):
    """A resolved config of a model small enough to differentiate coordinate by coordinate."""
    base = dict(
        data__seq_len=11,
        data__batch_size=6,
        model__layers=2,
        model__d_model=16,
        model__heads=4,
        model__init="fan_in",
        train__steps="20",
        optim__warmup="3",
    )
    return resolve(config.replace(Config(), **base | changes), windows=50)


def examine_distillation_of(cfg):
    """That part of the preflight alone, for the others compile about as long again."""
    store = open_data(rules.validate(cfg))
    cfg = resolve(cfg, windows=50)
    return distill.examine_teaching(cfg, run.Small(cfg, store).cfg, store)


def random_batch(rng, shape, vocab_size, *, documents=3, padded=0):
    """A batch of windows [..., T + 1] cut into documents, with `padded` columns at the end."""
    *rows, width = shape
    segment_ids = np.sort(rng.integers(1, documents + 1, shape), axis=-1).astype(np.int32)
    weights = (rng.random(shape) < 0.8).astype(np.float32)
    tokens = rng.integers(1, vocab_size, shape).astype(np.int32)
    if padded:
        for array in (segment_ids, weights, tokens):
            array[..., width - padded :] = 0
    return {"tokens": tokens, "segment_ids": segment_ids, "weights": weights}


def randomise(params, seed, std=0.3):
    """Noise of the shapes of `params`, so that nothing hides behind a zero or a one.

    Drawn by NumPy, for JAX compiles a program for every shape.
    """
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, std, x.shape), x.dtype), params)


def source_symbols(text):
    """The symbols of a text that a MarkovSource wrote, int32."""
    codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
    return codes.astype(np.int32) - synthetic.FIRST_CHARACTER


def source_nats(source, symbols):
    """-log p of each symbol given all before it, float64; inf where the source cannot go.

    The parity before a document's first symbol is unknown, so the first two symbols are scored
    under the stationary distribution, with that parity summed out.
    """
    before, current, following = symbols[:-2], symbols[1:-1], symbols[2:]
    marginal_S = source.stationary_CS.sum(0)
    pair_SS = (source.stationary_CS[..., None] * source.probability_CSS).sum(0)
    p = np.empty(len(symbols))
    p[:1] = marginal_S[symbols[:1]]
    p[1:2] = pair_SS[symbols[:-1][:1], symbols[1:2]] / marginal_S[symbols[:-1][:1]]
    p[2:] = source.probability_CSS[before % 2, current, following]
    with np.errstate(divide="ignore"):
        return -np.log(p)


ADDED = dict(
    model__key_offset=True,
    model__embedding_values=True,
    model__embedding_skip=True,
    model__head_gate=True,
    model__kv_heads=2,
)  # the options that add to the plain layer
FAMILIES = {
    "llama": {},
    "gpt2": dict(
        model__norm="layernorm", model__positions="learned", model__mlp="gelu", model__bias=True
    ),
    "grouped": dict(model__kv_heads=2, model__qk_norm=True, model__tied=False),
    "plain": dict(model__positions="none", model__logit_softcap=5.0),
    "added": ADDED,
    "scanned": dict(model__scan_layers=True, model__remat=True),
    "factorised": dict(model__embedding_rank=7),
    "musota": dict(
        model__family="musota", model__d_model=128, model__heads=4, model__init="normal"
    ),
}


STRANGE = [
    "",
    " ",
    "  two  spaces  ",
    "\n\n \n",
    "line\r\nline\r\n",
    "NUL \x00 and \x1c\x1d separators",
    "tab\tand\u00a0no-break\u3000wide",
    "naïve café – 北京 👩‍👩‍👧 🇩🇪",
    "combining e\u0301 and \u200b zero width",
    "<unk> <eos> <sep> <|endoftext|> <s> </s> [SEP] <separator>",
    "Ġ Ċ ▁ ĠĠ Āā",
    "'s 't don't I'LL 12345 ___ !!!",
]


def random_texts(seed, n):
    rng = np.random.default_rng(seed)
    ranges = [(0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000)]
    for _ in range(n):
        low_high = [ranges[i] for i in rng.integers(0, 5, rng.integers(1, 40))]
        text = "".join(chr(rng.integers(*bounds)) for bounds in low_high)
        yield " ".join([text[:7], text[7:]]) + ["", " ", "\n", "\r\n"][rng.integers(4)]


TEXTS = [*STRANGE, *random_texts(0, 60)]

LONG = [pytest.mark.slow, pytest.mark.long]


def thirds(cases):
    """Of the cases of a test each third for every check, and all for the long one."""
    each = [x if isinstance(x, tuple) else (x,) for x in cases]
    return [pytest.param(*x, marks=LONG if n % 3 else []) for n, x in enumerate(each)]


def small(text, **changes):
    """A run of a second or two on the fixture `text`."""
    base = dict(
        doctor="off",
        data__corpus="text",
        data__source_dir=str(text),
        data__files="*.txt",
        data__valid_fraction=0.2,
        data__test_fraction=0.2,
        data__cache_dir=str(text / "cache"),
        data__seq_len=32,
        data__batch_size=4,
        data__micro_batch=2,
        tokenizer__kind="char",
        model__layers=1,
        model__d_model=16,
        model__heads=2,
        model__dropout=0.1,
        train__steps="12",
        train__eval_every="6",
        train__checkpoint_every="4",
        train__log_every="5",
        train__steps_per_call=2,
        optim__warmup="2",
    )
    return config.replace(Config(), **base | changes)


def record_batches(monkeypatch):
    """Hashes of all batches that are fed to the step from now on."""
    seen, real = [], windows.train_batches

    def train_batches(*args, **options):
        for stacked in real(*args, **options):
            seen.extend(
                batch_hash({k: v[i] for k, v in stacked.items()})
                for i in range(len(stacked["tokens"]))
            )
            yield stacked

    monkeypatch.setattr(windows, "train_batches", train_batches)
    return seen


class StopAfter:
    """Stands for `signals.agreed`: the signal comes while update `count` is under way."""

    def __init__(self, count):
        self.count = count

    def __call__(self):
        self.count -= 2
        return signal.SIGTERM if self.count <= 0 else None


def rows(workdir):
    lines = (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def final_state(workdir):
    run = open_trained(pathlib.Path(workdir), checkpoint="last")
    assert run.step == int(run.cfg.train.steps)
    return [np.asarray(x) for x in jax.tree.leaves(run.params)]


def equations(jaxpr, inside=""):
    """All equations at any depth, with the names of the primitives around them."""
    for eqn in jaxpr.eqns:
        yield inside, eqn
        for sub in jax.tree.leaves(eqn.params, is_leaf=lambda p: hasattr(p, "eqns")):
            if hasattr(sub, "eqns"):
                yield from equations(sub, f"{inside}/{eqn.primitive.name}")


def load_config(name):
    """The module of a shipped config."""
    return load_module(ROOT / "configs" / f"{name}.py")


def words(source):
    """The text of a page."""
    return html.unescape(re.sub(r"<style>.*?</style>|<[^>]+>", " ", source, flags=re.DOTALL))


class Page(html.parser.HTMLParser):
    """A page that needs nothing but itself, as tags with attributes and the legends in words."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.open, self.legends = [], [], []
        self.feed(source)
        assert not self.open
        for tag, attributes in self.tags:
            assert not {"src", "href"} & set(attributes) and tag not in ("script", "link", "img")
            assert not attributes.get("xlink:href", "#").startswith("http")
        assert "@import" not in source and not re.search(r"url\((?!#)", source)
        figures = [a for tag, a in self.tags if tag == "svg"]
        assert all(a["role"] == "img" and a["aria-label"] for a in figures)
        assert len(figures) == len(self.legends) and all(self.legends)
        heads = [a for tag, a in self.tags if tag == "th"]
        assert heads and all(a["scope"] in ("col", "row") for a in heads)
        ids = [a["id"] for _, a in self.tags if "id" in a]
        assert set(re.findall(r"url\(#([\w-]+)\)|href=\"#([\w-]+)\"", source)) or not ids
        assert not figures or "currentColor" in source
        assert "prefers-color-scheme: dark" in source
        assert not re.search(r"(fill|stroke): #(000000|ffffff)", source)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if ("class", "legend") in attributes:
            self.legends.append([])
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.open[-1:] == ["li"] and "figure" in self.open:
            self.legends[-1].append(data)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@contextlib.contextmanager
def read_only_folder():
    """A folder, and a context of a user who may read it and write nothing of it.

    Root may write everything, and is another user there.
    """
    root = os.getuid() == 0

    @contextlib.contextmanager
    def as_nobody():
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        if root:
            os.setresuid(65534, 65534, 0)
        try:
            yield
        finally:
            if root:
                os.setresuid(0, 0, 0)
            for path in [folder, *folder.rglob("*")]:
                path.chmod(0o755 if path.is_dir() else 0o644)

    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        folder.chmod(0o755)
        yield folder, as_nobody
