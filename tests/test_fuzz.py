"""Every reader on damaged files: what was written, or one sentence that names the file.

Never another error, an endless loop, or more memory than the file has bytes for.
"""

import contextlib
import copy
import functools
import json
import math
import pathlib
import resource
import shutil
import signal
from collections.abc import Callable
from typing import Any, NamedTuple

import hypothesis
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import strategies as st

from lm_jax import config, rundir
from lm_jax.compare.runs import load_run
from lm_jax.config.resolve import resolve
from lm_jax.data import files as data_files
from lm_jax.data.corpora import open_corpus
from lm_jax.data.open import open_data
from lm_jax.data.references import in_nats, references
from lm_jax.data.store import open_store
from lm_jax.data.tokenizers.hf import HfTokenizer
from lm_jax.data.tokenizers.load import load_tokenizer, train_tokenizer
from lm_jax.data.windows import Windows
from lm_jax.distill import cache as distill_cache
from lm_jax.models import huggingface
from lm_jax.workdir import read_metrics, read_record, record_config
from tests.helpers import small
from tests.hugging_face import GPT2, LLAMA, random_tensors, save_checkpoint, save_pretrained

MEMORY = 4 << 30  # bytes beyond what the process has: files here have some thousands
SECONDS = 60
TEXTS = [f"text {i} é of some words" for i in range(30)]


# --- damage --------------------------------------------------------------------------------------

NUMBERS = [0, 1, -1, 2, 0.5, -0.5, 1e308, 10**15, 1 << 31, 1 << 63, -(1 << 63), 10**400]
LEAVES: list[Any] = [
    *NUMBERS,
    math.nan,
    math.inf,
    None,
    True,
    "",
    "a",
    "\x00",
    "\ud800",
    "../a",
    [],
    {},
    [[]],
]


@st.composite
def damaged_bytes(draw, whole):
    """Bytes with one to three flips, cuts, insertions or repetitions."""
    found = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        first = draw(st.integers(0, max(0, len(found) - 1)))
        end = min(len(found), first + draw(st.sampled_from([1, 2, 8, 100, len(whole)])))
        match draw(st.sampled_from(["flip", "set", "cut", "end", "insert", "repeat"])):
            case "flip" if found:
                found[first] ^= 1 << draw(st.integers(0, 7))
            case "set" if found:
                found[first] = draw(st.sampled_from([0, 0x7F, 0x80, 0xFF, 0x0A, 0x22]))
            case "cut":
                del found[first:end]
            case "end":
                del found[first:]
            case "insert":
                found[first:first] = draw(st.binary(max_size=9))
            case "repeat":
                found[first:first] = found[first:end]
    return bytes(found)


def places(tree, path=()):
    """The paths of all parts of a tree of JSON."""
    yield path
    if isinstance(tree, dict | list):
        for key, part in tree.items() if isinstance(tree, dict) else enumerate(tree[:20]):
            yield from places(part, (*path, key))


def replaced(tree, path, change):
    """A copy of the tree with another part at a path; `change` gets what holds it, and the key."""
    outer = {"": copy.deepcopy(tree)}
    part, way = outer, ["", *path]
    for key in way[:-1]:
        part = part[key]
    change(part, way[-1])
    return outer.get("")


@st.composite
def damaged_tree(draw, tree):
    """A tree of JSON with one or two parts replaced, removed, repeated or nested."""
    for _ in range(draw(st.integers(1, 2))):
        path = draw(st.sampled_from(list(places(tree))))
        leaf = draw(st.sampled_from(LEAVES))
        other = draw(st.sampled_from(list(places(tree))))
        kind = draw(st.sampled_from(["leaf", "leaf", "leaf", "remove", "swap", "nest", "key"]))

        def change(holder, key, kind=kind, leaf=leaf, other=other, tree=tree):
            if kind == "leaf":
                holder[key] = leaf
            elif kind == "remove" and len(holder):
                del holder[key]
            elif kind == "swap":
                part = tree
                for step in other:
                    part = part[step]
                holder[key] = copy.deepcopy(part)
            elif kind == "nest":
                holder[key] = [holder[key]]
            elif isinstance(holder, dict):
                holder[f"{key}x"] = leaf

        tree = replaced(tree, path, change)
    return tree


def as_json(tree):
    """The text of a tree, which may hold what JSON has no number for."""
    return json.dumps(tree).encode("utf-8", "surrogatepass")


@st.composite
def damaged_json(draw, whole):
    """A file of JSON, damaged as a tree, as bytes, or nested beyond all readers."""
    kind = draw(st.sampled_from(["tree"] * 6 + ["bytes", "deep"]))
    if kind == "bytes":
        return draw(damaged_bytes(whole))
    if kind == "deep":
        return draw(st.sampled_from([b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000]))
    return as_json(draw(damaged_tree(json.loads(whole))))


@st.composite
def damaged_lines(draw, whole):
    """A file of lines of JSON, one of them damaged."""
    lines = whole.splitlines(keepends=True)
    number = draw(st.integers(0, len(lines) - 1))
    lines[number] = draw(damaged_json(lines[number])) + draw(st.sampled_from([b"\n", b""]))
    return b"".join(lines)


@st.composite
def damaged_safetensors(draw, whole):
    """The header as a tree, with its right length; or the bytes."""
    if draw(st.booleans()):
        return draw(damaged_bytes(whole))
    size = int.from_bytes(whole[:8], "little")
    header = draw(damaged_json(whole[8 : 8 + size]))
    return len(header).to_bytes(8, "little") + header + whole[8 + size :]


@st.composite
def damaged_npy(draw, whole):
    """The header with another shape, type or order; or the bytes."""
    if draw(st.booleans()):
        return draw(damaged_bytes(whole))
    size = int.from_bytes(whole[8:10], "little")
    shape = draw(st.lists(st.sampled_from(NUMBERS), max_size=3))
    kind = draw(st.sampled_from(["<u8", "<f4", "|O", "<U9", "|V9", "<u2", "|b1"]))
    header = str({"descr": kind, "fortran_order": draw(st.booleans()), "shape": tuple(shape)})
    return whole[:8] + len(header).to_bytes(2, "little") + header.encode() + whole[10 + size :]


DAMAGE = {".json": damaged_json, ".jsonl": damaged_lines, ".npy": damaged_npy}
DAMAGE[".safetensors"] = damaged_safetensors


class Damaged(bytes):
    """A file whose beginning alone is printed."""

    def __repr__(self):
        return f"{len(self)} bytes: {bytes(self[:400])!r}"


# --- readers -------------------------------------------------------------------------------------


class Reader(NamedTuple):
    """What is read, from which files of a folder that `made` fills.

    With `hashed` what is read is what was written, or it is refused.
    """

    made: Callable[[pathlib.Path], Any]
    read: Callable[[pathlib.Path, Any], Any]
    files: list[str]
    hashed: bool = False


def a_store(folder, kind="char"):
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.txt").write_text(text)
    fields = {"data__cache_dir": str(folder / "cache"), "tokenizer__kind": kind}
    cfg = small(folder, **fields)
    store = open_data(cfg)
    shutil.move(store.path, folder / "store")
    return cfg


def a_record(folder):
    cfg = a_store(folder)
    resolved = resolve(cfg, windows=9)
    record_config(folder, resolved, open_store(folder / "store"), asked=cfg)
    (folder / "checkpoints" / "12").mkdir(parents=True)
    tokens = {"data/tokens": 9.0, "perf/tokens_per_second": 5.0, "perf/step_ms": 2.0}
    rows = [{"step": i, "train/loss": 2.0 / i, "valid/loss": 1.0} | tokens for i in (1, 6, 12)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores = {"loss": 2.0, "token_count": 3, "stride": 32, "step": 12, "word_ppl": None}
    scores |= {"token_ppl": 7.4, "bits_per_byte": 1.5, "accuracy": 0.5, "split_token_count": 3}
    scores["references"] = {"uniform": 9.0, "unigram": 8.0, "kn2": 7.0, "kn3": 6.0}
    (folder / "eval_test.json").write_text(json.dumps(scores))
    np.savez(folder / "documents_test.npz", nats=np.array([6.0]), tokens=np.array([3]))


def a_tokenizer(kind):
    def made(folder):
        train_tokenizer(kind, TEXTS, 270 if kind == "bpe" else 0).save(folder)

    return Reader(made, lambda folder, _: load_tokenizer(folder).content_hash, ["tokenizer.json"])


def of_hugging_face(folder):
    shutil.copytree(save_pretrained(folder)["llama"], folder, dirs_exist_ok=True)


def a_corpus(document, write):
    def read(folder, _):
        options = {"files": str(folder / "a.data"), "document": document}
        corpus = open_corpus("text", cache_dir=str(folder / "cache"), valid_fraction=0.2, **options)
        return [text for split in corpus.splits for text in corpus.documents(split)]

    return Reader(lambda folder: write(folder / "a.data"), read, ["a.data"])


def array_record(path):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for text in TEXTS:
        writer.write(json.dumps({"text": text}).encode())
    writer.close()


def parquet(path):
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), path, row_group_size=10)


def json_lines(path):
    path.write_text("".join(json.dumps({"text": text, "n": 1}) + "\n" for text in TEXTS))


def a_memory_of_hashes(folder):
    (folder / "a.txt").write_text("one")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_files, "SETTLED", -1)
        (whole,) = data_files.hash_files([folder / "a.txt"], folder, text=True)
    return whole.sha256


def read_hashes(folder, _):
    (found,) = data_files.hash_files([folder / "a.txt"], folder, text=True)
    assert isinstance(found.sha256, str)


def a_teacher_cache(folder):
    cfg = resolve(a_store(folder), windows=9)
    cfg = config.replace(cfg, distill__cache=str(folder / "kept"), distill__top_k=3)
    store = open_store(folder / "store")

    def most_likely(batch):
        shape = (*batch["tokens"][:, 1:].shape, 3)
        ids = np.broadcast_to(np.arange(3), shape)
        return ids, np.full((*shape[:-1], 4), math.log(0.25), np.float32)

    distill_cache.write_cache(folder / "kept", cfg, store, most_likely, {})
    return cfg


def read_teacher_cache(folder, cfg):
    cfg = config.replace(cfg, distill__cache=str(folder / "kept"))
    store = open_store(folder / "store")
    extend, _ = distill_cache.open_cache(cfg, store)
    batch = Windows(store.split("train"), cfg.data.seq_len, True).batch(np.arange(2))
    return {name: x.tolist() for name, x in extend(batch).items()}


def read_store(folder, _):
    store = open_store(folder / "store")
    splits = [store.split(name) for name in store.manifest["splits"]]
    return store.manifest, [(split.tokens.tolist(), split.words) for split in splits]


def with_references(folder):
    a_store(folder)
    references(open_store(folder / "store"), "test")


READERS = {
    "store": Reader(
        a_store,
        read_store,
        [f"store/{name}" for name in ("manifest.json", "tokenizer/tokenizer.json")]
        + ["store/test.tokens.npy", "store/test.documents.npy"],
        hashed=True,
    ),
    "record": Reader(
        a_record,
        lambda folder, _: (read_record(folder), rundir.read_state(folder)),
        ["config.json"],
    ),
    "metrics": Reader(a_record, lambda folder, _: list(read_metrics(folder)), ["metrics.jsonl"]),
    "scores": Reader(a_record, lambda folder, _: rundir.read_scores(folder), ["eval_test.json"]),
    "compared": Reader(
        a_record,
        lambda folder, _: load_run(folder, "test"),
        ["eval_test.json", "documents_test.npz", "metrics.jsonl", "config.json"],
    ),
    "references": Reader(
        with_references,
        lambda folder, _: in_nats(references(open_store(folder / "store"), "test")),
        ["store/references_test.json"],
        hashed=True,
    ),
    "hashes": Reader(a_memory_of_hashes, read_hashes, ["file_hashes.json"]),
    "teacher cache": Reader(
        a_teacher_cache,
        read_teacher_cache,
        [f"kept/{name}" for name in ("manifest.json", "hashes.npy", "ids.npy", "log_p.npy")],
        hashed=True,
    ),
    **{f"tokenizer {kind}": a_tokenizer(kind) for kind in ("byte", "char", "word", "bpe")},
    "tokenizer hf": Reader(
        of_hugging_face,
        lambda folder, _: HfTokenizer.from_folder(folder).content_hash,
        ["tokenizer.json", "tokenizer_config.json", "config.json"],
    ),
    "llama": Reader(
        lambda folder: save_checkpoint(folder, LLAMA, random_tensors(LLAMA)),
        lambda folder, _: huggingface.load(folder),
        ["config.json", "model.safetensors"],
    ),
    "gpt2 in shards": Reader(
        lambda folder: save_checkpoint(folder, GPT2, random_tensors(GPT2), shards=2),
        lambda folder, _: huggingface.load(folder),
        ["config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors"],
    ),
    "file": a_corpus("file", lambda path: path.write_text("\n".join(TEXTS))),
    "line": a_corpus("line", lambda path: path.write_text("\n".join(TEXTS))),
    "jsonl": a_corpus("jsonl:text", json_lines),
    "parquet": a_corpus("parquet:text", parquet),
    "arrayrecord": a_corpus("arrayrecord:text", array_record),
}


@contextlib.contextmanager
def bounded():
    """Little memory and time: MemoryError or TimeoutError where a reader wants more."""

    def stop(*_):
        raise TimeoutError(f"it took more than {SECONDS} s")

    used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGALRM, handler)


def examine(read, folder, made, path):
    """What is read, or None after an error of ours: one sentence that names the file."""
    try:
        with bounded():
            return read(folder, made)
    except TimeoutError:
        raise
    except (ValueError, OSError) as error:
        said = str(error)
        assert path.name in said or path.parent.name in said, f"no file is named: {error!r}"
        assert isinstance(error, OSError) or said.rstrip()[-1] in ".)", f"no sentence: {error!r}"
    return None


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """A function from the name of a reader to a folder for it, and what was given back of it."""

    @functools.cache
    def folder_of(name):
        folder = tmp_path_factory.mktemp("folder") / "7f3a9c"
        folder.mkdir()
        return folder, READERS[name].made(folder)

    return folder_of


@pytest.mark.parametrize(
    "examples", [3, pytest.param(700, marks=[pytest.mark.slow, pytest.mark.long])]
)
@pytest.mark.parametrize(
    ("name", "file"),
    [(name, file) for name, reader in READERS.items() for file in reader.files],
)
def test_a_damaged_file_is_told_or_read(name, file, examples, folder_of):
    (folder, given), reader = folder_of(name), READERS[name]
    path, written = folder / file, reader.read(folder, given)
    whole = path.read_bytes()
    kind = DAMAGE.get(path.suffix, damaged_bytes)

    @hypothesis.settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],  # making it smaller takes long
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(kind(whole).map(Damaged))
    def damage(damaged):
        path.write_bytes(damaged)
        found = examine(reader.read, folder, given, path)
        assert not reader.hashed or found in (None, written)

    try:
        damage()
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize(
    "changes", [{"vocab_size": 10**15}, {"vocab_size": -1}, {"vocab": 1 << 31}]
)
def test_ids_that_no_model_has_take_no_memory(tmp_path, changes):
    of_hugging_face(tmp_path)
    for name in ("config.json", "tokenizer.json"):
        tree = json.loads((tmp_path / name).read_text())
        if name == "config.json":
            tree |= {"vocab_size": changes.get("vocab_size", 320)}
        elif "vocab" in changes:
            tree["model"]["vocab"]["low"] = changes["vocab"]
        (tmp_path / name).write_text(json.dumps(tree))
    with bounded(), pytest.raises(ValueError, match=r"vocab_size is|is no id, nor a number of ids"):
        HfTokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"merges": [["Ġlow", "Ġnewest"]]},  # longer than every token
        {"merges": ["low new"]},
        {"continuing_subword_prefix": "x" * 19},
        {"vocab": {"Ġlow": 3, "l": 3}},
    ],
)
def test_a_model_at_which_the_library_panics_is_refused(tmp_path, changes):
    of_hugging_face(tmp_path)
    path = tmp_path / "tokenizer.json"
    tree = json.loads(path.read_text())
    vocab = tree["model"]["vocab"] | changes.pop("vocab", {})
    tree["model"] |= {"vocab": vocab} | changes
    path.write_text(json.dumps(tree))
    said = r"tokenizer\.json cannot be read .*(of other tokens than those|two tokens have one id)"
    with pytest.raises(ValueError, match=said):
        HfTokenizer.from_folder(tmp_path)


def test_merges_of_no_tokens_do_not_reach_the_library(tmp_path):
    train_tokenizer("bpe", TEXTS, 270).save(tmp_path)
    path = tmp_path / "tokenizer.json"
    tree = json.loads(path.read_text())
    for number in (5, len(tree["vocabulary"]) - 1):
        vocabulary = [*tree["vocabulary"]]
        vocabulary[number] = ""
        path.write_text(json.dumps(tree | {"vocabulary": vocabulary}))
        with pytest.raises(ValueError, match=r"tokenizer\.json is not a complete tokenizer file"):
            load_tokenizer(tmp_path)
