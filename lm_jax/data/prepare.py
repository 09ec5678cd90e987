"""Prepare the tokens of a config on several machines, each of which writes a part.

    python -m lm_jax.data.prepare CONFIG --begin
    python -m lm_jax.data.prepare CONFIG --part=0/8
    python -m lm_jax.data.prepare CONFIG --join=8

All machines see the same folder config.data.cache_dir, and the same files of the corpus. The parts
are 0/8 to 7/8, in any order; one that was killed or is started twice goes on from what is there.
--begin may be left out: then the first part does its work, and the others wait for that.

Fields of a config are set as for `python -m lm_jax.main`, and must be the same every time.
"""

import re
import shutil
from collections.abc import Sequence
from typing import Any

from absl import flags

from lm_jax import console
from lm_jax.config import Config, ConfigError, rules
from lm_jax.config.flags import parse_flags
from lm_jax.data import parts
from lm_jax.data.corpora import Corpus
from lm_jax.data.open import how_tokenised, opened_corpus
from lm_jax.data.parts import Part
from lm_jax.data.recipe import Recipe, learn
from lm_jax.data.references import references
from lm_jax.data.store import Store, finish_store, join_parts, prepare, read_recipe
from lm_jax.data.tokenizers.base import Tokenizer
from lm_jax.door import command
from lm_jax.files import read_json, write_json

_RECIPE = "recipe.json"  # tells parts of several configs apart


def begin(cfg: Config) -> None:
    """Hash the files of a config's corpus, learn its tokenizer, and say how many parts can be.

    Raises:
        ValueError: if the corpus cannot be read, or lacks text to learn from.
    """
    with opened_corpus(cfg) as corpus:
        recipe, _ = _begun(cfg, corpus)
    pieces = len(parts.plan(corpus.splits))
    console.say(f"{recipe.path}: has {pieces} pieces, which up to {pieces} parts can share")


def write_share(cfg: Config, number: int, of: int) -> None:
    """Tokenise every `of`-th piece of a config's corpus, from the one of that number on.

    Pieces that are there already stay as they are.

    Args:
        cfg: the config.
        number: of the share, 0 to `of` - 1.
        of: how many shares there are.

    Raises:
        ValueError: if the corpus cannot be read or tokenised.
        ChildProcessError: if a process that tokenised ended before its work did.
    """
    with opened_corpus(cfg) as corpus:
        recipe, tokenizer = _begun(cfg, corpus)
    if tokenizer is None:
        console.say(f"{recipe.path}: is finished")
        return
    pieces = parts.plan(corpus.splits)
    mine = pieces[number::of]
    try:
        parts.write_all(mine, tokenizer, recipe.shared, cfg.data.workers, alone=False)
    except OSError:
        if not recipe.path.exists():  # else a twin of this process was faster, and all is joined
            raise
    console.say(f"part {number}/{of}: its {len(mine)} of {len(pieces)} pieces are written")


def join_shares(cfg: Config, of: int) -> Store:
    """The finished store of a config, joined from its parts if it is not there yet.

    The references of the splits that are scored are computed too, so that no run waits for them.

    Raises:
        FileNotFoundError: if parts are missing, or do not hold what was written into them.
        ValueError: if the corpus cannot be read, or lacks a split that is to be scored.
        OSError: if the disk does not give back what was written.
    """
    with opened_corpus(cfg) as corpus:
        recipe = read_recipe(corpus, **how_tokenised(cfg))
        if recipe.path.exists():
            store = prepare(corpus, **how_tokenised(cfg))
        else:
            store = _join(recipe, of)
        for name in dict.fromkeys(["valid", *rules.eval_splits(cfg, store.manifest["splits"])]):
            references(store, name)
    console.say(f"{store.path}: is finished and holds what its manifest says")
    return store


def _begun(cfg: Config, corpus: Corpus) -> tuple[Recipe, Tokenizer | None]:
    """The recipe of a store and its tokenizer, learned once; None if the store is finished."""
    recipe = read_recipe(corpus, **how_tokenised(cfg))
    if recipe.path.exists():
        return recipe, None
    tokenizer = learn(recipe, recipe.shared)
    write_json(recipe.shared / _RECIPE, _facts(recipe))
    return recipe, tokenizer


def _facts(recipe: Recipe) -> dict[str, Any]:
    """What tells one recipe from another, by the fields of the config."""
    return {
        "data": recipe.corpus.fingerprint,
        "tokenizer.kind": recipe.tokenizer_kind,
        "tokenizer.folder": recipe.given and recipe.given.content_hash,
        "tokenizer.vocab_size": recipe.vocab_size,
        "tokenizer.sample": recipe.sample,
    }


def _join(recipe: Recipe, of: int) -> Store:
    pieces = parts.plan(recipe.corpus.splits)
    _refuse_incomplete(recipe, pieces, of)
    try:
        with console.phase("joining the parts"):
            join_parts(recipe.corpus, pieces, learn(recipe, recipe.shared), recipe.shared)
    except parts.Damaged as error:
        for folder in error.args:
            console.say(f"{folder} is damaged and is removed")
            shutil.rmtree(folder)
        _refuse_incomplete(recipe, pieces, of)
    return finish_store(recipe.path, recipe.shared)


def _refuse_incomplete(recipe: Recipe, pieces: Sequence[Part], of: int) -> None:
    """Raises FileNotFoundError if a piece is missing."""
    there = {path.name for path in recipe.shared.glob("*-of-*")}
    missing = {n % of for n, piece in enumerate(pieces) if piece.name not in there}
    if missing:
        numbers = ",".join(map(str, sorted(missing)))
        raise FileNotFoundError(
            f"{recipe.shared} lacks parts {numbers} of {of}: start each of them again, as "
            f"--part={min(missing)}/{of}{_others(recipe)}."
        )


def _others(recipe: Recipe) -> str:
    """Names the folders of other configs, and in what these differ."""
    found, own = "", _facts(recipe)
    for path in sorted(recipe.path.parent.glob(f"*.shared/{_RECIPE}")):
        if path.parent != recipe.shared:
            facts = read_json(path)
            fields = " and ".join(f"config.{name}" for name in own if facts.get(name) != own[name])
            found += f"; {path.parent} has parts of a config with another {fields}"
    return found


def _read_part(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    number, of = map(int, match.groups()) if match else (0, 0)
    if not number < of:
        raise ConfigError(
            f"--part={text}: is none of 0/N to N-1/N for a number N of parts; give one of these, "
            "and for Slurm's arrays --array=0-(N-1)."
        )
    return number, of


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Do the step that the flags name."""
    given = flags.FlagValues()
    flags.DEFINE_bool("begin", False, "Hash the files and learn the tokenizer, alone.", given)
    flags.DEFINE_string("part", None, "Write part I of N: I/N, counted from 0.", given)
    flags.DEFINE_integer(
        "join", None, "Make the store of all N parts, or check it.", flag_values=given
    )
    parse_flags(given, argv, __doc__, subject=["config"])
    cfg = given.config
    rules.validate(cfg)
    if [given.begin, given.part is not None, given.join is not None].count(True) != 1:
        raise ConfigError("give one of --begin, --part=I/N and --join=N; see --help.")
    if given.begin:
        begin(cfg)
    elif given.part is not None:
        write_share(cfg, *_read_part(given.part))
    elif given.join < 1:
        raise ConfigError(f"--join={given.join}: is no number of parts; give that of --part.")
    else:
        join_shares(cfg, given.join)


if __name__ == "__main__":
    main()
