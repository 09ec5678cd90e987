"""Teachers of a config, opened, aligned and checked before they teach."""

import dataclasses
import json
import math
import pathlib
from typing import Any

import jax
from jax.sharding import Mesh

from lm_jax import config, sharding
from lm_jax.config import INSIDE, Config, ConfigError
from lm_jax.config.section import errors_of
from lm_jax.data.references import references
from lm_jax.data.store import Store, same_data
from lm_jax.distill import alignment, cache
from lm_jax.distill.alignment import Aligner, Retokenised
from lm_jax.distill.teachers import Teacher
from lm_jax.evaluate import Evaluator
from lm_jax.files import write_json
from lm_jax.models import huggingface
from lm_jax.models.families import choose_attention, create_model
from lm_jax.pretrained import open_pretrained
from lm_jax.workdir import SCORES, TEACHER, Trained, open_trained, read_record

TOLERANCE = 1e-3  # of a teacher's loss on another device or in another precision
WHERE = "config.distill.teachers"


def require_teachers(cfg: Config) -> None:
    """Raise ConfigError if a folder that `config.distill` names is not there, or is no teacher."""
    if cfg.distill.cache:
        cache.require_cache(pathlib.Path(cfg.distill.cache))
    named = [(WHERE, name.strip()) for name in cfg.distill.teachers.split(",")]
    for field, name in [*named, ("config.distill.alone", cfg.distill.alone)]:
        if name and not (field == WHERE and huggingface.is_checkpoint(pathlib.Path(name))):
            with errors_of(field):
                read_record(pathlib.Path(name), checkpoints=True)


def open_teacher(cfg: Config, store: Store, mesh: Mesh | None = None) -> Teacher:
    """The teacher of a resolved config, on the student's mesh.

    Raises:
        ConfigError: if a teacher cannot teach this student: not there, fewer positions, another
            tokenizer where the terms need the same, a cache of other windows.
    """
    if cfg.distill.cache:
        return Teacher((), (), (), *cache.open_cache(cfg, store))
    mesh = mesh or sharding.make_mesh(cfg.mesh.fsdp)
    names = tuple(name.strip() for name in cfg.distill.teachers.split(","))
    runs = tuple(_open(name, cfg, mesh) for name in names)
    models = tuple(_as_read(run, cfg).graphdef for run in runs)
    teacher = Teacher(names, models, tuple(run.params for run in runs), runs=runs)
    if cfg.distill.top_k > store.tokenizer.vocab_size:
        raise ConfigError(
            f"config.distill.top_k: {cfg.distill.top_k} is above the {store.tokenizer.vocab_size} "
            "ids of the tokenizer; lower it."
        )
    for name, run in zip(names, runs, strict=True):
        for term in INSIDE:
            if run.cfg.model.family != "dense" and not getattr(cfg.distill, term).zero:
                raise ConfigError(
                    f"config.distill.{term}: {name} is of family {run.cfg.model.family!r}, whose "
                    "layers cannot be compared; set it to 0."
                )
        least = run.cfg.model.window or run.cfg.data.seq_len
        if not cfg.distill.attention.zero and 0 < cfg.model.window < least:
            raise ConfigError(
                f"config.model.window: {cfg.model.window} hides positions from the student that "
                f"{name} attends to; raise it to {least} or set config.distill.attention to 0."
            )
    length = cfg.data.seq_len
    others = (name for name, run in zip(names, runs, strict=True) if not _shares(run, store))
    if other := next(others, None):
        aligner = _align(other, runs, cfg, store)
        length = aligner.length
        first = alignment.first_bytes(aligner.student, aligner.teacher)
        teacher = dataclasses.replace(teacher, extend=aligner, first_bytes=first)
    for name, run in zip(names, runs, strict=True):
        if run.cfg.model.positions == "learned" and run.cfg.data.seq_len < length:
            raise ConfigError(
                f"{WHERE}: {name} has {run.cfg.data.seq_len} positions, but would read rows of "
                f"{length}; lower config.data.seq_len."
            )
    if cfg.distill.alone:  # needed at the end only
        with errors_of("config.distill.alone"):
            run = open_trained(pathlib.Path(cfg.distill.alone), mesh=mesh)
        same = run.cfg.model == cfg.model and run.cfg.data.seq_len == cfg.data.seq_len
        if not (same and _shares(run, store)):
            raise ConfigError(
                f"config.distill.alone: {cfg.distill.alone} has another model, row length or "
                "tokenizer than this run; give the same student's."
            )
    return teacher


def _shares(run: Trained, store: Store) -> bool:
    """True if a run has the tokenizer of a store."""
    return run.tokenizer.content_hash == store.tokenizer.content_hash


def _open(name: str, cfg: Config, mesh: Mesh) -> Trained:
    """A run, or a Hugging Face checkpoint as if it were one."""
    folder = pathlib.Path(name)
    with errors_of(WHERE):
        if not huggingface.is_checkpoint(folder):
            return open_trained(folder, mesh=mesh)
        model, _, max_len = huggingface.read_model(folder)
        if model.positions != "learned":  # any length is possible, and a shorter one costs less
            max_len = min(max_len, cfg.data.seq_len)
        how = config.replace(cfg, data__seq_len=max_len, eval__stride=max_len)
        return open_pretrained(folder, how, mesh)


def _as_read(run: Trained, cfg: Config) -> Trained:
    """The run with the student's windows, and a model for rows that are cut so."""
    how = config.replace(
        run.cfg,
        data__document_mask=cfg.data.document_mask,
        data__window_offset=cfg.data.window_offset,
    )
    # It reads without dropout.
    teaching = config.replace(cfg, model=run.cfg.model, model__attention_dropout=0.0)
    vocab_size = run.tokenizer.vocab_size
    graphdef, _ = create_model(how, vocab_size, choose_attention(teaching)[0])
    windows = config.replace(
        how,
        data__seq_len=cfg.data.seq_len,
        eval__batch_size=cfg.eval.batch_size,
        eval__stride=cfg.eval.stride,
    )
    return dataclasses.replace(run, cfg=windows, graphdef=graphdef)


def _align(name: str, runs: tuple[Trained, ...], cfg: Config, store: Store) -> Aligner:
    """The aligner for a teacher with another tokenizer."""
    other = f"{WHERE}: {name} has another tokenizer than the student"
    if len(runs) > 1:
        raise ConfigError(f"{other}, so it cannot teach beside others; name it alone.")
    maps = not (cfg.distill.attention.zero and cfg.distill.routed_attention.zero)
    if cfg.distill.support != "full" or maps:
        raise ConfigError(
            f"{other}, so there are no common ids and no common positions to attend to; set "
            "config.distill.support to full, config.distill.attention and routed_attention to 0."
        )
    limit = runs[0].cfg.data.seq_len if runs[0].cfg.model.positions == "learned" else None
    teacher = runs[0].tokenizer
    try:
        return alignment.open_aligner(cfg, store, teacher, limit)
    except ValueError as error:
        raise ConfigError(f"{other}, and cannot be aligned: {error}") from error


def score_teacher(run: Trained, store: Store, split: str) -> dict[str, Any]:
    """Exact evaluation of a run on a split of some store, in the run's own tokens and windows."""
    if not _shares(run, store):
        store = Retokenised(store.path, store.manifest, run.tokenizer, store)
    return Evaluator.of(run, store)(run.params, split)


def _windows(cfg: Config) -> tuple[Any, ...]:
    return cfg.data.seq_len, cfg.data.document_mask, cfg.eval.stride


def verify(teacher: Teacher, cfg: Config, store: Store) -> list[str]:
    """Score each model on the valid split, and say what share of tokens is aligned.

    The record of a run is about its own corpus and windows, so the teacher is scored on those of
    the student too.

    Returns:
        Lines to print.

    Raises:
        ConfigError: if a teacher's loss is not the one on its own record, or on the student's text
            no better than that of the frequencies of tokens.
    """
    split = store.split("valid")
    nats = len(split.tokens) * math.log(references(store, "valid")["unigram"])
    unigram = nats / split.bytes / math.log(2)
    lines = []
    for name, run in zip(teacher.names, teacher.runs, strict=True):
        result = score_teacher(run, store, "valid")
        own = _shares(run, store) and same_data(run.data, store.manifest)
        said, record = "no record of it", pathlib.Path(name) / SCORES.format("valid")
        recorded = json.loads(record.read_text()) if record.exists() else {}
        same_windows = recorded.get("stride") == run.cfg.eval.stride
        if same_windows and recorded["step"] == run.step and recorded["loss"] is not None:
            loss = (result if own else score_teacher(run, run.store, "valid"))["loss"]
            said = f"on its record {recorded['loss']:.4f}, found {loss:.4f}"
            if not abs(loss - recorded["loss"]) <= TOLERANCE * loss:
                raise ConfigError(
                    f"{WHERE}: {name} has a valid loss of {loss:.4f}, but {record} says "
                    f"{recorded['loss']:.4f}; restore the run."
                )
        if _shares(run, store) and _windows(run.cfg) != _windows(cfg):
            result = score_teacher(_as_read(run, cfg), store, "valid")
            said += ", here in the student's windows"
        if not result["bits_per_byte"] < unigram:
            raise ConfigError(
                f"{WHERE}: {name} needs {result['bits_per_byte']:.4f} bits per byte of the valid "
                f"split, no better than the {unigram:.4f} of the frequencies of tokens; "
                "train it first, on such text."
            )
        lines.append(
            f"teacher {name}: valid loss {result['loss']:.4f} ({said}), bits per byte "
            f"{result['bits_per_byte']:.4f}"
            + (f", word ppl {result['word_ppl']:.2f}" if math.isfinite(result["word_ppl"]) else "")
        )
    if isinstance(teacher.extend, Aligner):
        (name,), (run,), length = teacher.names, teacher.runs, teacher.extend.length
        share = alignment.aligned_share(teacher.extend, cfg, store)
        if length > run.cfg.data.seq_len:
            lines.append(
                f"teacher {name} learned from rows of {run.cfg.data.seq_len} tokens and reads rows "
                f"of {length}, where it may know less; lower config.data.seq_len"
            )
        lines.append(
            f"teacher {name} has another tokenizer: {share:.1%} of the tokens of "
            f"{alignment.WINDOWS} windows end where a teacher token ends, and there the next byte "
            "is taught"
        )
    return lines


def record_teacher(workdir: pathlib.Path, teacher: Teacher, *, resuming: bool) -> None:
    """Write `teacher.json`, or compare with that of the run to be resumed.

    Raises:
        ConfigError: if what teaches has changed.
    """
    path = workdir / TEACHER
    if not resuming:
        if jax.process_index() == 0:
            write_json(path, teacher.identity)
    elif json.loads(path.read_text()) != teacher.identity:
        raise ConfigError(
            f"{path}: the run there learned from another teacher than it is now; restore that one "
            "or give another --workdir."
        )
