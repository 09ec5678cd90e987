"""A run as a folder that Hugging Face transformers loads.

    python -m lm_jax.export runs/quickstart-0 --to=exported/quickstart

writes config.json, model.safetensors (float32), the tokenizer and a model card. Before the folder
gets its name, transformers, if it is installed with PyTorch, opens it and must give the same ids,
the same logits and the same perplexity of the test split as the run.
"""

import os
import pathlib
from collections.abc import Sequence

from absl import flags

from lm_jax import console, processes
from lm_jax.card import model_card
from lm_jax.config import ConfigError
from lm_jax.config.flags import parse_flags
from lm_jax.data.tokenizers.base import FILE_NAME, Tokenizer
from lm_jax.door import command
from lm_jax.evaluate import PLACES, define_fields, given_fields
from lm_jax.files import user_path, whole_folder, write_json, write_text
from lm_jax.models.huggingface import architecture, is_checkpoint, write_model
from lm_jax.places import pulled
from lm_jax.pretrained import define_model, open_model
from lm_jax.proof import prove
from lm_jax.workdir import Trained


def export(
    run: Trained, workdir: pathlib.Path, to: str | os.PathLike, *, scored: bool = True
) -> pathlib.Path:
    """Write a run as a folder for Hugging Face transformers, whole or not at all.

    Args:
        run: what is exported, with the parameters of its checkpoint.
        workdir: its folder, for the figures on the model card.
        to: the folder, new or empty.
        scored: whether transformers must also give the perplexity of the test split, which on the
            CPU takes as long as an evaluation there.

    Returns:
        The path of the folder.

    Raises:
        ConfigError: if no architecture of transformers computes the model.
        ValueError: if `to` is not empty.
        RuntimeError: if transformers computes something else; nothing is written then.
    """
    to, cfg, separator = user_path(to), run.cfg, run.tokenizer.separator
    kind = architecture(cfg.model)
    with whole_folder(to) as folder:
        console.say(f"{workdir} after update {run.step:,} becomes a {kind} model in {to}")
        with console.phase("writing"):
            ids = {"bos_token_id": separator, "eos_token_id": separator}
            sizes = run.tokenizer.vocab_size, cfg.data.seq_len
            write_model(folder, cfg.model, *sizes, run.params, ids)
            write_tokenizer(folder, run.tokenizer, cfg.data.seq_len)
            write_json(folder / "generation_config.json", ids | {"pad_token_id": separator})
        proof = prove(run, workdir, folder, scored=scored)
        for sentence in proof:
            console.say(sentence)
        write_text(folder / "README.md", model_card(run, workdir, to, kind, proof))
    console.say(f"{to} is written")
    return to


def write_tokenizer(folder: pathlib.Path, tokenizer: Tokenizer, max_len: int) -> None:
    """Write tokenizer.json and tokenizer_config.json, with which transformers opens a tokenizer.

    It puts the separator before a text, as evaluation does. Text that spells the separator is text
    (`split_special_tokens`), as it was in training.
    """
    library = tokenizer.to_library()
    library.save(str(folder / FILE_NAME))
    separator = library.id_to_token(tokenizer.separator)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": separator,
        "eos_token": separator,
        "pad_token": separator,
        "add_bos_token": True,
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_len,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    write_json(folder / "tokenizer_config.json", settings)


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Export a run and say what was compared."""
    given = flags.FlagValues()
    define_model(given, "Folder of the run.")
    flags.DEFINE_string("to", None, "Folder that is written, new or empty.", given, required=True)
    scored = "Let transformers compute the perplexity of the whole test split too."
    flags.DEFINE_bool("scored", True, scored, given)
    define_fields(PLACES, given)
    parse_flags(given, argv, __doc__, subject=["workdir"])
    to = user_path(given.to)
    processes.only_first("export")
    folder = pulled(given.workdir, given.checkpoint)
    if is_checkpoint(folder):
        raise ConfigError(f"--workdir={folder}: is a Hugging Face checkpoint already; name a run.")
    with console.phase(f"opening {folder}"):
        changes = given_fields(PLACES, given)
        run = open_model(folder, checkpoint=given.checkpoint, **changes)
    export(run, folder, to, scored=given.scored)


if __name__ == "__main__":
    main()
