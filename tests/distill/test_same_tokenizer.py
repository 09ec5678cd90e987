"""A teacher with the student's tokenizer in another file, and one that has nearly the same."""

import json
import shutil

import jax
import numpy as np
import pytest

from lm_jax import config
from lm_jax.config import ConfigError
from lm_jax.config.resolve import resolve
from lm_jax.data import windows
from lm_jax.data.open import open_data
from lm_jax.data.store import same_data
from lm_jax.distill.objective import distilled
from lm_jax.distill.opening import open_teacher
from lm_jax.export import write_tokenizer
from lm_jax.models import huggingface
from lm_jax.models.families import create_model
from lm_jax.start import find_origin
from lm_jax.workdir import record_config, resume_record
from tests.helpers import small
from tests.hugging_face import (
    LLAMA,
    byte_level,
    random_tensors,
    save_checkpoint,
    save_tokenizer,
)

FIELDS = LLAMA | {"vocab_size": 300, "bos_token_id": 0, "max_position_embeddings": 64}
TABLES = ("model.embed_tokens.weight", "lm_head.weight")


def save(folder, tree, tensors, vocab_size=300):
    save_tokenizer(folder, tree, special="<|endoftext|>")
    return save_checkpoint(folder, FIELDS | {"vocab_size": vocab_size}, tensors)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint, the same with a padded table, and with its tokenizer saved anew."""
    root, tree, tensors = tmp_path_factory.mktemp("same"), byte_level(), random_tensors(FIELDS)
    padded = dict(tensors)
    for name in TABLES:  # as resize_token_embeddings does: rows that something may be drawn into
        rows = np.random.default_rng(1).normal(0, 1, (20, 24)).astype(np.float32)
        padded[name] = np.concatenate([tensors[name], rows])
    framed = tree | {"post_processor": {"type": "ByteLevel", "add_prefix_space": True,
                                        "trim_offsets": False, "use_regex": True}}  # fmt: skip
    framed["truncation"] = {
        "direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0,
    }  # fmt: skip
    return {
        "original": save(root / "original", tree, tensors),
        "padded": save(root / "padded", tree, padded, 320),
        "saved anew": save(root / "anew", framed, tensors),
    }


def student(text, folder, **changes):
    own = {"kind": "hf", "folder": str(folder), "vocab_size": 0}
    own = {f"tokenizer__{name}": value for name, value in own.items()}
    return small(text, **own | dict(model__dropout=0.0, model__d_model=8) | changes)


def opened(cfg, folder):
    cfg = config.replace(cfg, distill__teachers=str(folder))
    store = open_data(cfg)
    cfg = resolve(cfg, windows=50)
    return cfg, store, open_teacher(cfg, store)


def test_the_same_tokenizer_in_another_file_teaches_all_ids(text, folders):
    """And all losses are exactly the same."""
    cfg, store, original = opened(student(text, folders["original"]), folders["original"])
    batch = windows.Windows(store.split("train"), cfg.data.seq_len, True).batch(np.arange(4))
    graphdef, init = create_model(cfg, store.tokenizer.vocab_size, "reference")
    params, objective = init(jax.random.key(0)), distilled(cfg, graphdef, init, original)

    @jax.jit
    def losses(reads, batch):
        return objective.sums(params, batch, objective.plan(batch, 0), None, reads)[1]

    logged = {}
    for name, folder in folders.items():
        *_, teacher = opened(student(text, folders["original"]), folder)
        assert teacher.models == original.models
        found = losses(teacher.params, teacher.extend(batch))
        logged[name] = {term: float(value) for term, value in found.items()}
    assert logged["original"]["kd"] > 1
    assert logged["padded"] == logged["saved anew"] == logged["original"]


def test_a_student_with_more_rows_than_its_teacher_is_refused(text, folders):
    with pytest.raises(ConfigError, match="original lacks 20 rows .* in config.tokenizer.folder"):
        opened(student(text, folders["padded"]), folders["original"])


def test_a_run_goes_on_with_its_tokenizer_saved_anew(text, folders, tmp_path):
    def data(name):
        cfg = student(text, folders[name])
        return resolve(cfg, windows=50), open_data(cfg)

    cfg, store = data("original")
    record_config(tmp_path, cfg, store, asked=cfg)
    again, anew = data("saved anew")
    assert anew.manifest["tokenizer_hash"] != store.manifest["tokenizer_hash"]
    resume_record(tmp_path, again, anew, asked=again, position=4)
    assert open_data(again, store.manifest).path == anew.path
    padded, other = data("padded")
    with pytest.raises(ConfigError, match="trained on another corpus or tokenizer"):
        resume_record(tmp_path, padded, other, asked=padded, position=4)


def test_data_with_another_separator_are_other_data(text, tmp_path):
    """Though the ids of all texts are the same."""
    tree = byte_level()
    other = tree["added_tokens"][0] | {"id": 300, "content": "<s>"}
    tree["added_tokens"].append(other)
    one, two = (
        open_data(student(text, save_tokenizer(tmp_path / name, tree, special, vocab_size=301)))
        for name, special in (("a", "<|endoftext|>"), ("b", "<s>"))
    )
    assert one.manifest["splits"] == two.manifest["splits"]
    assert not same_data(one.manifest, two.manifest)
    old = one.manifest.keys() - {"tokenizer_identity"}  # of version 0.3
    assert same_data({key: one.manifest[key] for key in old}, one.manifest)


def test_nearly_the_same_tokenizer_is_refused_unless_asked_for(text, folders, tmp_path):
    tree = json.loads((folders["original"] / "tokenizer.json").read_text())
    merges = tree["model"]["merges"]
    merges[3], merges[4] = merges[4], merges[3]
    other = tmp_path / "other"
    shutil.copytree(folders["original"], other)
    (other / "tokenizer.json").write_text(json.dumps(tree))
    cfg = student(text, folders["original"])
    said = r"though 100.0% of their tokens are the same \(they differ in: merges\); .*next_bytes"
    with pytest.raises(ConfigError, match=said):
        opened(cfg, other)
    cfg = config.replace(cfg, distill__next_bytes=True)
    assert opened(cfg, other)[2].first_bytes is not None
    with pytest.raises(ConfigError, match="next_bytes: .*original has the student's tokenizer"):
        opened(cfg, folders["original"])


def test_a_run_and_its_export_have_one_tokenizer(text, tmp_path):
    """Of kind bpe here and of kind hf there, which also may start from each other."""
    cfg = small(text, tokenizer__kind="bpe", tokenizer__vocab_size=275, model__dropout=0.0)
    tokenizer = open_data(cfg).tokenizer
    fields = FIELDS | {"vocab_size": 275}
    save_checkpoint(tmp_path, fields, random_tensors(fields))
    write_tokenizer(tmp_path, tokenizer, 64)
    _, store, teacher = opened(cfg, tmp_path)
    assert teacher.first_bytes is None and teacher.runs[0].tokenizer.kind == "hf"
    model, *_ = huggingface.read_model(tmp_path)
    cfg = config.replace(cfg, model=model, train__start_from=str(tmp_path))
    assert find_origin(resolve(cfg, windows=50), store) is not None
