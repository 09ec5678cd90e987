"""Teachers of a config, opened, aligned and checked before they teach."""

import dataclasses
import math
import pathlib
from typing import Any

import jax
from jax.sharding import Mesh

from lm_jax import config, sharding
from lm_jax.config import INSIDE, STATES, Config, ConfigError
from lm_jax.config.section import errors_of
from lm_jax.data.references import references
from lm_jax.data.store import Store, same_data
from lm_jax.distill import alignment, cache
from lm_jax.distill.alignment import Aligner, Retokenised
from lm_jax.distill.teachers import Teacher
from lm_jax.ensemble import Named, each_run
from lm_jax.evaluate import Evaluator
from lm_jax.files import read_json, write_json
from lm_jax.models import huggingface
from lm_jax.models.families import choose_attention, create_model
from lm_jax.pretrained import open_pretrained
from lm_jax.workdir import SCORES, TEACHER, Trained, open_trained, read_record

TOLERANCE = 1e-3  # of a teacher's loss on another device or in another precision
# Share of common tokens above which other ids are taken for a mistake: tokenizers that learned from
# other text, or to other sizes, have far fewer in common, and versions of one nearly all.
NEARLY = 0.9
WHERE = "config.distill.teachers"


def require_teachers(cfg: Config) -> None:
    """Raise ConfigError if a folder that `config.distill` names is not there, or is no teacher."""
    if cfg.distill.cache:
        cache.require_cache(pathlib.Path(cfg.distill.cache))
    named = [(WHERE, one.folder) for one in each_run(cfg.distill.teachers)]
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
    mesh = mesh or sharding.mesh_that_fits(cfg.mesh)
    named = each_run(cfg.distill.teachers)
    names = tuple(one.folder for one in named)
    used = [name for name in STATES if not getattr(cfg.distill, name).zero]
    if used and len(named) > 1:
        raise ConfigError(
            f"config.distill.{used[0]}: needs the states of one teacher, not of {len(named)}; set "
            "it to 0."
        )
    runs = tuple(_open(one, cfg, mesh) for one in named)
    for name, run in zip(names, runs, strict=True):
        _require_rows(name, run, store)
    read = [_as_read(run, cfg, store) for run in runs]
    models, params = (tuple(getattr(r, part) for r in read) for part in ("graphdef", "params"))
    teacher = Teacher(names, models, params, runs=runs)
    if cfg.distill.top_k > store.tokenizer.vocab_size:
        raise ConfigError(
            f"config.distill.top_k: {cfg.distill.top_k} is above the {store.tokenizer.vocab_size} "
            "ids of the tokenizer; lower it."
        )
    for name, run in zip(names, runs, strict=True):
        _require_fit(name, run, cfg)
    length = cfg.data.seq_len
    others = [pair for pair in zip(names, runs, strict=True) if not _shares(pair[1], store)]
    if others:
        aligner = _align(*others[0], cfg, store)
        length = aligner.length
        first = alignment.first_bytes(aligner.student, aligner.teacher)
        teacher = dataclasses.replace(teacher, extend=aligner, first_bytes=first)
    elif cfg.distill.next_bytes:
        raise ConfigError(
            f"config.distill.next_bytes: {names[0]} has the student's tokenizer and can teach all "
            "its ids; leave it False."
        )
    for name, run in zip(names, runs, strict=True):
        if run.cfg.model.positions == "learned" and run.cfg.data.seq_len < length:
            raise ConfigError(
                f"{WHERE}: {name} has {run.cfg.data.seq_len} positions, but would read rows of "
                f"{length}; lower config.data.seq_len."
            )
    if cfg.distill.alone:  # needed at the end only
        _require_alone(cfg, store, mesh)
    return teacher


def _require_alone(cfg: Config, store: Store, mesh: Mesh) -> None:
    with errors_of("config.distill.alone"):
        run = open_trained(pathlib.Path(cfg.distill.alone), mesh=mesh)
    same = run.cfg.model == cfg.model and run.cfg.data.seq_len == cfg.data.seq_len
    if not (same and _shares(run, store) and not _extra_rows(run, store)):
        raise ConfigError(
            f"config.distill.alone: {cfg.distill.alone} has another model, row length or "
            "tokenizer than this run; give the same student's."
        )


def _shares(run: Trained, store: Store) -> bool:
    """True if a run's tokenizer does what that of a store does; one may have more rows."""
    return run.tokenizer.identity == store.tokenizer.identity


def _extra_rows(run: Trained, store: Store) -> int:
    """Rows of a run's table beyond those of the student, for the ids of one tokenizer."""
    return (run.tokenizer.vocab_size - store.tokenizer.vocab_size) * _shares(run, store)


def _require_fit(name: str, run: Trained, cfg: Config) -> None:
    """Raise ConfigError if the layers of a teacher cannot teach this student."""
    for term in INSIDE:
        if run.cfg.model.family != "dense" and not getattr(cfg.distill, term).zero:
            raise ConfigError(
                f"config.distill.{term}: {name} is of family {run.cfg.model.family!r}, whose "
                "layers cannot be compared; set it to 0."
            )
    model = run.cfg.model
    parts = math.gcd(model.heads, model.kv_heads, model.d_ff)
    if model.family == "dense" and parts % cfg.mesh.tensor:
        raise ConfigError(
            f"config.mesh.tensor: {cfg.mesh.tensor} devices cannot share the heads and the MLP "
            f"of {name}; choose a divisor of {parts}."
        )
    least = run.cfg.model.window or run.cfg.data.seq_len
    if not cfg.distill.attention.zero and 0 < cfg.model.window < least:
        raise ConfigError(
            f"config.model.window: {cfg.model.window} hides positions from the student that "
            f"{name} attends to; raise it to {least} or set config.distill.attention to 0."
        )


def _require_rows(name: str, run: Trained, store: Store) -> None:
    if (missing := -_extra_rows(run, store)) > 0:
        raise ConfigError(
            f"{WHERE}: the table of {name} lacks {missing} rows that the student's has for "
            "padding, with the same tokenizer; name a checkpoint without them in "
            "config.tokenizer.folder."
        )


def _open(named: Named, cfg: Config, mesh: Mesh) -> Trained:
    """A run, or a Hugging Face checkpoint as if it were one."""
    folder = pathlib.Path(named.folder)
    with errors_of(WHERE):
        if not huggingface.is_checkpoint(folder):
            return open_trained(folder, checkpoint=named.checkpoint, mesh=mesh)
        model, _, max_len = huggingface.read_model(folder)
        if model.positions != "learned":  # any length is possible, and a shorter one costs less
            max_len = min(max_len, cfg.data.seq_len)
        how = config.replace(cfg, data__seq_len=max_len, eval__stride=max_len)
        return open_pretrained(folder, how, mesh)


def _as_read(run: Trained, cfg: Config, store: Store) -> Trained:
    """The run with the student's windows, and a model for rows that are cut so.

    With the student's tokenizer it has the student's ids: further rows of its table stand for
    nothing, and would take a share of every probability.
    """
    how = config.replace(
        run.cfg,
        data__document_mask=cfg.data.document_mask,
        data__window_offset=cfg.data.window_offset,
    )
    # It reads without dropout.
    teaching = config.replace(cfg, model=run.cfg.model, model__attention_dropout=0.0)
    tokenizer, params = run.tokenizer, run.params
    if _shares(run, store):
        tokenizer = store.tokenizer
    impl = choose_attention(teaching)[0]
    if impl == "pallas" and run.mesh.size > 1:
        impl = "cudnn"  # the doctor and a cache read it where the compiler splits the rows
    graphdef, init = create_model(how, tokenizer.vocab_size, impl)
    if _extra_rows(run, store):
        like = jax.eval_shape(init, jax.random.key(0))
        params = jax.tree.map(lambda x, cut: x[tuple(map(slice, cut.shape))], params, like)
        params = jax.device_put(params, sharding.places(run.mesh, params))
    windows = config.replace(
        how,
        data__seq_len=cfg.data.seq_len,
        eval__batch_size=cfg.eval.batch_size,
        eval__stride=cfg.eval.stride,
    )
    parts = {"tokenizer": tokenizer, "graphdef": graphdef, "params": params}
    return dataclasses.replace(run, cfg=windows, **parts)


def _align(name: str, run: Trained, cfg: Config, store: Store) -> Aligner:
    """The aligner for a teacher with another tokenizer."""
    teacher = run.tokenizer
    other = f"{WHERE}: {name} has another tokenizer than the student"
    share = alignment.common_tokens(store.tokenizer, teacher)
    if share > NEARLY and not cfg.distill.next_bytes:
        mine, theirs = store.tokenizer.behaviour(), teacher.behaviour()
        parts = ", ".join(part for part in mine if mine[part] != theirs[part])
        raise ConfigError(
            f"{other}, though {share:.1%} of their tokens are the same (they differ in: {parts}); "
            "give the student that of the teacher, or set config.distill.next_bytes to True to "
            "learn no more than its next bytes."
        )
    if len(each_run(cfg.distill.teachers)) > 1:
        raise ConfigError(f"{other}, so it cannot teach beside others; name it alone.")
    maps = not (cfg.distill.attention.zero and cfg.distill.routed_attention.zero)
    if cfg.distill.support != "full" or maps:
        raise ConfigError(
            f"{other}, so there are no common ids and no common positions to attend to; set "
            "config.distill.support to full, config.distill.attention and routed_attention to 0."
        )
    limit = run.cfg.data.seq_len if run.cfg.model.positions == "learned" else None
    try:
        return alignment.open_aligner(cfg, store, teacher, limit)
    except ValueError as error:
        raise ConfigError(f"{other}, and cannot be aligned: {error}") from error


def score_teacher(run: Trained, store: Store, split: str) -> dict[str, Any]:
    """Exact evaluation of a run on a split of some store, in the run's own tokens and windows.

    With `documents_left_out`, the number of those that its tokenizer would change.
    """
    documents = len(store.split(split).document_starts) - 1
    if not _shares(run, store):
        store = Retokenised(store.path, store.manifest, run.tokenizer, store)
    result, nats_D = Evaluator.of(run, store).score(run.params, split)
    return result | {"documents_left_out": documents - len(nats_D)}


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
        result, said = _score(name, run, cfg, store)
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
        lines += _aligned(teacher.names[0], teacher.runs[0], teacher.extend, cfg, store)
    return lines


def _score(name: str, run: Trained, cfg: Config, store: Store) -> tuple[dict[str, Any], str]:
    """A teacher's scores on the student's valid split, and what its own record says, in words."""
    here, said = run, "no record of it"
    other_windows = _shares(run, store) and _windows(run.cfg) != _windows(cfg)
    if other_windows or _extra_rows(run, store):
        here = _as_read(run, cfg, store)
    result = score_teacher(here, store, "valid")
    record = pathlib.Path(name) / SCORES.format("valid")
    with errors_of(WHERE):
        recorded = read_json(record) if record.exists() else {}
    same_windows = recorded.get("stride") == run.cfg.eval.stride
    told = isinstance(recorded.get("loss"), float)
    if same_windows and recorded.get("step") == run.step and told:
        own = same_data(run.data, store.manifest)
        found = result
        if not own or here is not run:
            found = score_teacher(run, store if own else run.store, "valid")
        loss = found["loss"]
        said = f"on its record {recorded['loss']:.4f}, found {loss:.4f}"
        if not abs(loss - recorded["loss"]) <= TOLERANCE * loss:
            raise ConfigError(
                f"{WHERE}: {name} has a valid loss of {loss:.4f}, but {record} says "
                f"{recorded['loss']:.4f}; restore the run."
            )
    said += ", here in the student's windows" * other_windows
    if missing := result["documents_left_out"]:
        said += f", without {missing} of the documents, which its tokenizer would change"
    return result, said


def _aligned(name: str, run: Trained, aligner: Aligner, cfg: Config, store: Store) -> list[str]:
    """What is to be said of a teacher with another tokenizer."""
    lines, made_for = [], run.cfg.data.seq_len
    if huggingface.is_checkpoint(pathlib.Path(name)):  # opened for shorter rows than it can read
        *_, made_for = huggingface.read_model(pathlib.Path(name))
    if aligner.length > made_for:
        lines.append(
            f"teacher {name} learned from rows of {made_for} tokens and reads rows of "
            f"{aligner.length}, where it may know less; lower config.data.seq_len"
        )
    aligned, untaught = alignment.aligned_shares(aligner, cfg, store)
    lines.append(
        f"teacher {name} has another tokenizer: {aligned:.1%} of the tokens of "
        f"{alignment.WINDOWS} windows end where a teacher token ends, and there the next byte "
        f"is taught; for {untaught:.1%} it has no state"
    )
    return lines


def record_teacher(workdir: pathlib.Path, teacher: Teacher, *, resuming: bool) -> None:
    """Write `teacher.json`, or compare with that of the run to be resumed.

    Raises:
        ConfigError: if what teaches has changed, or the file is missing or damaged.
    """
    path = workdir / TEACHER
    if not resuming:
        if jax.process_index() == 0:
            write_json(path, teacher.identity)
        return
    try:
        kept = read_json(path)
    except ValueError as error:
        raise ConfigError(
            f"{path}: is missing or damaged, so that it does not tell which teacher the run there "
            "learned from; restore the file or give another --workdir."
        ) from error
    if kept != teacher.identity:
        raise ConfigError(
            f"{path}: the run there learned from another teacher than it is now; restore that one "
            "or give another --workdir."
        )
