"""The model card of an exported run: what was measured, how it was trained, how it is loaded."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import lm_jax
from lm_jax import config
from lm_jax.config.section import field_rows
from lm_jax.evaluate import among_references, knowledge
from lm_jax.files import read_json
from lm_jax.models.families import size
from lm_jax.page import markdown_table
from lm_jax.workdir import RECORD, SCORES, Trained, read_record

# https://huggingface.co/docs/hub/model-cards#model-card-metadata
_HEADER = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- lm_jax
---
"""
_USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER")
ids = model.generate(**tokenizer("The", return_tensors="pt"), max_new_tokens=50, do_sample=True)
print(tokenizer.decode(ids[0], skip_special_tokens=True))
```"""
# What a user of the tokenizer must know, by its kind.
_TOKENIZERS = {
    "byte": "A token is a byte.",
    "char": "A token is a character; one that the training text lacks is an error.",
    "word": "A token is a word or a line end; the white space between words comes back as one "
    "space, and words that are not in the vocabulary as `<unk>`, or as an error if there is "
    "none.",
    "bpe": "Byte-level byte-pair encoding; any text comes back as it was.",
    "hf": "The tokenizer of another checkpoint, without a space before the text.",
}


def model_card(
    run: Trained, workdir: pathlib.Path, folder: pathlib.Path, kind: str, proof: Sequence[str]
) -> str:
    """The card in Markdown, with the metadata of the Hugging Face Hub; it names no licence.

    Args:
        run: what is exported.
        workdir: its folder, whose figures of this checkpoint are shown.
        folder: where it is exported to.
        kind: its `model_type` in transformers.
        proof: what `lm_jax.proof.prove` found.
    """
    cfg, data = run.cfg, run.data
    # A factorised table is multiplied out.
    exported = dataclasses.replace(cfg.model, embedding_rank=0)
    parameters = size(exported, data["vocab_size"], cfg.data.seq_len)
    parts = [
        f"# {folder.name}",
        f"A {kind} language model of {parameters.total:,} parameters ({parameters.table:,} in "
        f"tables, {parameters.positions:,} of positions, {parameters.blocks:,} in blocks), trained "
        f"with lm_jax {read_json(workdir / RECORD)['versions']['lm_jax']} on {data['corpus']}.",
        "## Use",
        _USE.replace("FOLDER", folder.name),
        f"The model was trained on windows of {cfg.data.seq_len:,} tokens; a longer context is not "
        f"measured. {_TOKENIZERS[data['tokenizer_kind']]} Every text begins with the token "
        f"`{run.tokenizer.to_library().id_to_token(run.tokenizer.separator)}`, which stands before "
        "each document in training and evaluation; the tokenizer puts it there. Text that spells "
        "it is encoded as text. The model is not trained to end a text with it.",
        "## Results",
        *_results(run, workdir),
        "## Compared with the run" if proof else "",
        "\n".join(f"- {sentence}" for sentence in proof),
        "## Training",
        markdown_table(_training(run, workdir)),
        *_changed(workdir, cfg),
    ]
    return _HEADER + "\n" + "\n\n".join(filter(None, parts)) + "\n"


def _results(run: Trained, workdir: pathlib.Path) -> list[str]:
    """The scored splits among their reference lines."""
    parts: list[str] = []
    for name in ("valid", "test"):
        path = workdir / SCORES.format(name)
        if not path.is_file() or (result := read_json(path)).get("step") != run.step:
            continue
        parts += [
            f"{name.capitalize()} split: {result['token_count']:,} tokens, each scored once, in "
            f"windows of {run.cfg.data.seq_len:,} at a stride of {result['stride']:,}, after "
            f"update {run.step:,}.",
            markdown_table(among_references(result)),
        ]
    if not parts:
        return [f"No split was scored after update {run.step:,}, which this model is of."]
    return [*parts, knowledge(result["references"])]


def _training(run: Trained, workdir: pathlib.Path) -> list[dict[str, str]]:
    """Facts of the run, as rows of a table."""
    cfg, data, record = run.cfg, run.data, read_json(workdir / RECORD)
    splits = (f"{counts['tokens']:,} {name} tokens" for name, counts in data["splits"].items())
    windows = f"{cfg.data.batch_size:,} windows of {cfg.data.seq_len:,} tokens"
    versions = (f"{package} {version}" for package, version in record["versions"].items())
    facts: dict[str, Any] = {
        "data": f"{data['corpus']}: {', '.join(splits)}",
        "tokenizer": f"{data['tokenizer_kind']}, {data['vocab_size']:,} ids",
        "updates": f"{run.step:,} of {windows}",
        "device": f"{', '.join(dict.fromkeys(record['devices']))}, {cfg.train.compute_dtype}",
        "begun": record["started"],
        "config hash": record["hash"],
        "versions": ", ".join(versions),
        "git revision": record["git_revision"],
        "exported with": f"lm_jax {lm_jax.__version__}",
    }
    return [{"": name, "value": fact} for name, fact in facts.items() if fact]


def _changed(workdir: pathlib.Path, cfg: config.Config) -> list[str]:
    """The fields that were set, but those on which no number depends."""
    _, changed = field_rows(read_record(workdir).asked or cfg)
    incidental = config.incidental_fields()
    rows = [row for row in changed if row["field"] not in incidental]
    if not rows:
        return ["Every field of the config has its default."]
    return ["Fields of the config that differ from their defaults:", markdown_table(rows)]
