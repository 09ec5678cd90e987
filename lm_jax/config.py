"""The typed run config: defaults, validation, resolution of durations, hash.

A config file returns a `Config`; every field is documented beside its default with its
unit. Assigning an unknown field or a wrong type raises at once and names the remedy.
"""

import dataclasses
import difflib
import hashlib
import json
import math
import re
import typing
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any


class ConfigError(ValueError):
    """A config field that is unknown, of the wrong type or impossible."""


class Duration(str):
    """A span of training: "2000" or "2000 steps", "2M tokens" or "3 epochs"."""


class Curve(str):
    """A value over the run: "0.7", or "0@0.1, 1@0.4": 0 up to a tenth, linear to 1 at 0.4."""

    def points(self) -> list[tuple[float, float]]:
        """(share of the run, value), in order; linear between them and constant outside.

        Raises:
            ValueError: if the text is no curve.
        """
        parts = [part.split("@") for part in self.split(",")]
        if len(parts) == len(parts[0]) == 1:
            parts[0].append("0")
        points = [(float(share), float(value)) for value, share in parts]
        shares = [share for share, _ in points]
        if shares != sorted(set(shares)) or not 0 <= shares[0] <= shares[-1] <= 1:
            raise ValueError("shares must rise from 0 or more to 1 or less")
        if not all(math.isfinite(value) for _, value in points):
            raise ValueError("values must be finite")
        return points

    @property
    def zero(self) -> bool:
        """Whether it is 0 throughout."""
        return not any(value for _, value in self.points())


_UNITS = {"k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9, "": 1.0}
_DURATION = re.compile(r"(\d+(?:\.\d*)?(?:[eE]\d+)?)\s*([kKMB]?)\s*(steps?|tokens?|epochs?)?")


def _nearest(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
    return close[0] if close else ""


def _typed(where: str, value: Any, expected: Any) -> Any:
    """Return `value` as the field's type, or raise naming the field `where`."""
    if expected is Duration:
        if isinstance(value, bool) or not _DURATION.fullmatch(str(value).strip()):
            raise ConfigError(
                f"config.{where}: {value!r} is no duration; "
                'write a number of steps, or like "2M tokens" or "3 epochs".'
            )
        return Duration(str(value).strip())
    if expected is Curve:
        try:
            Curve(value).points()
        except ValueError as error:
            raise ConfigError(
                f"config.{where}: {value!r} is no curve ({error}); "
                'write a number, or value@share as in "0@0.1, 1@0.4".'
            ) from error
        return Curve(str(value).strip())
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
        raise ConfigError(
            f"config.{where}: {value!r} is a {type(value).__name__}; "
            f"give a {expected.__name__} instead."
        )
    if expected is float and not math.isfinite(value):
        raise ConfigError(f"config.{where}: {value!r} is not finite; give a finite number.")
    return value


class _Section:
    """Base of the config dataclasses: checks names and types on every assignment."""

    def __setattr__(self, name: str, value: Any) -> None:
        hints = typing.get_type_hints(type(self))
        if name not in hints:
            raise ConfigError(unknown_field(_path(self, name), list(hints)))
        object.__setattr__(self, name, _typed(_path(self, name), value, hints[name]))


def _path(section: _Section, name: str) -> str:
    own = type(section).__name__.removesuffix("Config").lower()
    return f"{own}.{name}" if own else name


def unknown_field(path: str, names: Sequence[str]) -> str:
    """The sentence for an unknown field at dotted `path` whose valid siblings are `names`."""
    *parents, last = path.split(".")
    nearest = ".".join([*parents, _nearest(last, names)])
    return f"config.{path}: there is no such field; did you mean config.{nearest}?"


@dataclasses.dataclass
class DataConfig(_Section):
    """What is read and how it is cut into windows."""

    corpus: str = "synthetic"  # synthetic | wikitext2 | wikitext103 | text | tfds:NAME
    source_dir: str = ""  # folder with the corpus's files; empty: download where possible
    files: str = ""  # corpus "text": path or glob of the training files
    valid_files: str = ""  # corpus "text": files held out for validation; empty: a share of files
    test_files: str = ""  # corpus "text": files held out for the test
    # corpus "text": what one document is: file | line | jsonl:FIELD | parquet:FIELD |
    # arrayrecord (each record is a text) | arrayrecord:FIELD (each record is JSON)
    document: str = "file"
    valid_fraction: float = 0.1  # share held out for validation where the corpus has no such split
    test_fraction: float = 0.0  # share held out for the test where the corpus has no such split
    cache_dir: str = "~/.cache/lm_jax"  # prepared corpora and token stores live here
    workers: int = 0  # processes that tokenise a corpus of more than 32 MB; 0: one a core
    seq_len: int = 256  # T, tokens predicted per window
    batch_size: int = 32  # sequences per update, over all devices and micro-batches
    document_mask: bool = True  # attention and positions restart at each document
    window_offset: bool = False  # cut the text into windows elsewhere in every epoch
    threads: int = 1  # threads that assemble batches ahead of the step; 0: in the loop itself


@dataclasses.dataclass
class TokenizerConfig(_Section):
    """How text becomes ids."""

    kind: str = "char"  # byte | char | word | bpe
    vocab_size: int = 0  # ids with the separator, for bpe and word; 0: all types (word)
    sample: int = 0  # characters of the train split that bpe and word learn from; 0: all


@dataclasses.dataclass
class ModelConfig(_Section):
    """The decoder."""

    # dense | musota: gated 8 x 8 matrices (models/musota.py), D 64 and untied whatever stands below
    family: str = "dense"
    layers: int = 4  # blocks
    d_model: int = 128  # D, width of the residual stream
    heads: int = 4  # H, query heads
    kv_heads: int = 0  # key/value heads, a divisor of heads; 0: as many as heads
    d_ff: int = 0  # F, width inside the MLP; 0: 4 D, for swiglu 8/3 D (multiple of 8)
    norm: str = "rmsnorm"  # rmsnorm | layernorm
    norm_eps: float = 1e-6  # added to the mean square
    positions: str = "rotary"  # rotary | learned | none
    rope_theta: float = 10_000.0  # base of the rotary wavelengths
    mlp: str = "swiglu"  # swiglu | gelu | gelu_tanh (as in GPT-2) | relu2 (squared ReLU)
    qk_norm: bool = False  # RMS-normalise queries and keys per head before rotary
    bias: bool = False  # biases in the linear maps of the blocks and in layernorm
    tied: bool = True  # the head is the embedding table
    embedding_rank: int = 0  # r of a token table [V, r] times [r, D]; 0: one table [V, D]
    init: str = "normal"  # normal: N(0, init_std^2) | fan_in: N(0, 1/inputs)
    init_std: float = 0.02  # std of every table, and of matrices under init "normal"
    dropout: float = 0.0  # rate on the residual branches
    attention_dropout: float = 0.0  # rate on the attention probabilities
    embedding_dropout: float = 0.0  # rate on the embedded tokens
    logit_softcap: float = 0.0  # c in c tanh(logits / c); 0: off
    scan_layers: bool = False  # one compiled block scanned over depth: compile time flat in depth
    remat: bool = False  # recompute each block in the backward pass to save memory


@dataclasses.dataclass
class OptimConfig(_Section):
    """Optimiser, schedule and clipping."""

    name: str = "adamw"  # adamw | muon (matrices of the blocks by Muon, the rest by Adam)
    peak_lr: float = 1e-3  # learning rate after warm-up
    warmup: Duration = Duration("100")  # linear from peak / warmup; the first update has LR > 0
    schedule: str = "cosine"  # cosine | linear | constant | wsd
    end_lr: float = 0.1  # learning rate of the last update, as a share of the peak
    decay: Duration = Duration("0")  # schedule "wsd": length of the final linear decay
    weight_decay: float = 0.1  # decoupled, on matrices only
    b1: float = 0.9  # decay of the first moment per update
    b2: float = 0.95  # decay of the second moment per update
    eps: float = 1e-8  # added to the root of the second moment
    clip_norm: float = 1.0  # global gradient norm is cut to this; 0: off
    accumulation: int = 1  # micro-batches per update
    ema_decay: float = 0.0  # weight average used for evaluation; 0: off


@dataclasses.dataclass
class AttentionConfig(_Section):
    """Which attention implementation runs."""

    impl: str = "auto"  # or reference, xla, cudnn, blockwise, pallas, pallas_deterministic


@dataclasses.dataclass
class LossConfig(_Section):
    """How the loss is computed from hidden states and head."""

    impl: str = "auto"  # auto | materialised (all logits at once) | fused (logits in chunks)
    label_smoothing: float = 0.0  # share of each target spread over all ids; not in what is logged


@dataclasses.dataclass
class TrainConfig(_Section):
    """The loop."""

    steps: Duration = Duration("1000")  # length of the run
    eval_every: Duration = Duration("250")  # valid split scored this often and at the end; 0: end
    checkpoint_every: Duration = Duration("250")  # saved this often and at the end; 0: end only
    keep: int = 2  # newest checkpoints kept, beside the best
    log_every: Duration = Duration("10")  # a progress line and, on request, per-layer norms
    layer_norms: bool = False  # log grad_norm/<path> for every parameter
    tensorboard: bool = False  # also write TensorBoard events (extra "tensorboard")
    compute_dtype: str = "float32"  # float32 | bfloat16 | float16 (with dynamic loss scaling)
    matmul_precision: str = "float32"  # float32 | tensorfloat32, of float32 products on a GPU
    steps_per_call: int = 1  # updates in one dispatch; a divisor of the spans above compiles once
    max_nonfinite: int = 10  # stop after this many skipped updates in a row


@dataclasses.dataclass
class EvalConfig(_Section):
    """Exact evaluation of whole splits."""

    batch_size: int = 0  # sequences at a time; 0: as in training
    stride: int = 0  # targets scored per window, the rest is context; 0: data.seq_len
    splits: str = ""  # scored at the end: valid,test or one; empty: those that the corpus has


@dataclasses.dataclass
class MeshConfig(_Section):
    """How devices are arranged."""

    fsdp: int = 1  # devices that share one copy of the parameters; the rest are data-parallel


@dataclasses.dataclass
class DistillConfig(_Section):
    """Training from teachers; the fields of type Curve are raised and lowered over the run."""

    # workdirs of runs or folders of Hugging Face checkpoints, with commas: the mean of their
    # probabilities teaches; empty: no distillation
    teachers: str = ""
    cache: str = ""  # folder that scripts/cache_teacher.py wrote, in place of running teachers
    alone: str = ""  # workdir of the same student without a teacher, for the report
    kind: str = "forward"  # forward | reverse | jsd | skew, see kernels/divergences.py
    beta: float = 0.5  # the teacher's share of the mixture in jsd and skew
    # full vocabulary | top_k ids of the teacher and the rest as one | union of both models' top_k
    support: str = "full"
    top_k: int = 0  # ids of support top_k and union
    temperature: Curve = Curve("2")  # T of both distributions
    kd: Curve = Curve("0.7")  # weight of T^2 times the divergence
    lm: Curve = Curve("0.3")  # weight of the next-token cross-entropy
    feature: Curve = Curve("0")  # weight of the error of projected final states
    layer: Curve = Curve("0")  # the same of the states after each layer
    attention: Curve = Curve("0")  # weight of the divergence of attention maps
    # student layers whose maps are compared, counted from 0 or from the end, with commas
    attention_layers: str = "-1"
    contrastive: Curve = Curve("0")  # weight of telling the rows of a micro-batch apart
    routed_feature: Curve = Curve("0")  # weight of the error against routed teacher layers
    routed_attention: Curve = Curve("0")  # weight of reading the routed states before a token
    router_balance: Curve = Curve("0")  # weight of using all experts evenly
    experts: int = 4  # evenly spaced layers of the teacher between which the router chooses
    router_top_k: int = 4  # experts of a token at the end of the run; 1 at its start
    router_temperature: Curve = Curve("1@0, 0.1@1")  # of the router's choice
    lr: float = 1e-3  # peak learning rate of projections and router, on the schedule of optim


@dataclasses.dataclass
class Config(_Section):
    """One run."""

    seed: int = 0  # of parameters, order of the data and dropout
    doctor: str = "fast"  # checks before a new run starts: off | fast (seconds) | full (minutes)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    attention: AttentionConfig = dataclasses.field(default_factory=AttentionConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    distill: DistillConfig = dataclasses.field(default_factory=DistillConfig)


_CHOICES: dict[str, tuple[str, ...]] = {
    "tokenizer.kind": ("byte", "char", "word", "bpe"),
    "model.family": ("dense", "musota"),
    "model.norm": ("rmsnorm", "layernorm"),
    "model.positions": ("rotary", "learned", "none"),
    "model.mlp": ("swiglu", "gelu", "gelu_tanh", "relu2"),
    "model.init": ("normal", "fan_in"),
    "optim.name": ("adamw", "muon"),
    "optim.schedule": ("cosine", "linear", "constant", "wsd"),
    "attention.impl": tuple(
        "auto reference xla cudnn blockwise pallas pallas_deterministic".split()
    ),
    "doctor": ("off", "fast", "full"),
    "loss.impl": ("auto", "materialised", "fused"),
    "distill.kind": ("forward", "reverse", "jsd", "skew"),
    "distill.support": ("full", "top_k", "union"),
    "train.compute_dtype": ("float32", "bfloat16", "float16"),
    "train.matmul_precision": ("float32", "tensorfloat32"),
}
_POSITIVE = (
    "data.seq_len data.batch_size model.layers model.d_model model.heads model.norm_eps "
    "model.rope_theta model.init_std optim.peak_lr optim.eps optim.accumulation train.keep "
    "train.steps_per_call train.max_nonfinite mesh.fsdp distill.experts distill.router_top_k "
    "distill.lr"
).split()
_SHARE = (  # in [0, 1)
    "data.valid_fraction data.test_fraction model.dropout model.attention_dropout "
    "model.embedding_dropout loss.label_smoothing optim.b1 optim.b2 optim.ema_decay"
).split()
_NOT_NEGATIVE = (
    "seed data.workers data.threads tokenizer.vocab_size tokenizer.sample model.kv_heads "
    "model.d_ff model.embedding_rank model.logit_softcap optim.end_lr optim.weight_decay "
    "optim.clip_norm eval.batch_size eval.stride"
).split()


# What a layer of family musota can be told; the rest of it is fixed.
_MUSOTA = "family layers init_std dropout embedding_dropout logit_softcap scan_layers remat".split()


def fields(section: _Section, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, value) of every leaf field."""
    for field in dataclasses.fields(section):  # type: ignore[arg-type]
        value = getattr(section, field.name)
        if isinstance(value, _Section):
            yield from fields(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", value


def get(cfg: Config, path: str) -> Any:
    """The value at a dotted path."""
    value: Any = cfg
    for name in path.split("."):
        value = getattr(value, name)
    return value


def replace(cfg: Config, **changes: Any) -> Config:
    """A copy with changes; a double underscore stands for the dot (`optim__peak_lr=1e-3`)."""
    copy = from_dict(to_dict(cfg))
    for path, value in changes.items():
        *parents, last = path.split("__")
        section = get(copy, ".".join(parents)) if parents else copy
        setattr(section, last, value)
    return copy


def to_dict(cfg: Config) -> dict[str, Any]:
    """Plain nested dicts, ready for JSON."""
    return dataclasses.asdict(cfg)


def from_dict(tree: dict[str, Any]) -> Config:
    """The inverse of `to_dict`; raises ConfigError on unknown fields."""
    cfg = Config()
    for name, value in tree.items():
        if isinstance(value, dict) and isinstance(getattr(cfg, name, None), _Section):
            for key, leaf in value.items():
                setattr(getattr(cfg, name), key, leaf)
        else:
            setattr(cfg, name, value)
    return cfg


def check_names(paths: Sequence[str]) -> None:
    """Raise ConfigError if a dotted path names no field."""
    for path in paths:
        section: Any = Config
        parts = path.split(".")
        for depth, name in enumerate(parts):
            hints = typing.get_type_hints(section) if _is_section(section) else {}
            if name not in hints:
                valid = list(hints) or [parts[depth - 1]]
                raise ConfigError(unknown_field(".".join(parts[: depth + 1]), valid))
            section = hints[name]


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, _Section)


def validate(cfg: Config) -> Config:
    """Return `cfg`, or raise ConfigError on the first impossible value or combination."""

    def require(ok: bool, path: str, problem: str, remedy: str) -> None:
        if not ok:
            raise ConfigError(f"config.{path}: {get(cfg, path)!r} {problem}; {remedy}.")

    for path, choices in _CHOICES.items():
        value = get(cfg, path)
        if value not in choices:
            raise ConfigError(
                f"config.{path}: {value!r} is none of {', '.join(choices)}; "
                f"did you mean {_nearest(value, choices)!r}?"
            )
    for path in _POSITIVE:
        require(get(cfg, path) > 0, path, "must be above 0", "give a positive number")
    for path in _NOT_NEGATIVE:
        require(get(cfg, path) >= 0, path, "is negative", "give 0 or more")
    for path in _SHARE:
        require(0 <= get(cfg, path) < 1, path, "is no share", "give 0 or more and below 1")

    data, model, optim = cfg.data, cfg.model, cfg.optim
    require(
        (data.corpus == "text") == bool(data.files),
        "data.files",
        f"does not fit config.data.corpus={data.corpus!r}",
        'name the training files with corpus "text", and only there',
    )
    if model.family == "musota":
        for path, default in fields(ModelConfig(), "model."):
            require(
                path.removeprefix("model.") in _MUSOTA or get(cfg, path) == default,
                path,
                "has no meaning for config.model.family='musota'",
                f"leave it at {default!r}",
            )
    held_out = data.valid_fraction + data.test_fraction
    require(held_out < 1, "data.valid_fraction", "and test_fraction leave no text", "lower them")
    require(
        (cfg.tokenizer.kind == "bpe" and cfg.tokenizer.vocab_size > 257)
        or cfg.tokenizer.kind == "word"
        or (cfg.tokenizer.kind in ("byte", "char") and cfg.tokenizer.vocab_size == 0),
        "tokenizer.vocab_size",
        f"does not fit config.tokenizer.kind={cfg.tokenizer.kind!r}",
        "give more than 257 for bpe, 0 or more for word, and 0 for byte and char",
    )
    require(
        cfg.tokenizer.kind in ("bpe", "word") or cfg.tokenizer.sample == 0,
        "tokenizer.sample",
        f"does not fit config.tokenizer.kind={cfg.tokenizer.kind!r}, which must see all characters",
        "give 0",
    )
    _validate_distillation(cfg, require)
    require(
        model.d_model % model.heads == 0,
        "model.heads",
        f"does not divide config.model.d_model={model.d_model}",
        "choose a divisor",
    )
    require(
        model.embedding_rank < model.d_model,
        "model.embedding_rank",
        f"is not below config.model.d_model={model.d_model} and would save nothing",
        "lower it, or give 0 for one table",
    )
    require(
        model.kv_heads == 0 or model.heads % model.kv_heads == 0,
        "model.kv_heads",
        f"does not divide config.model.heads={model.heads}",
        "choose a divisor, or 0 for as many",
    )
    require(
        model.positions != "rotary" or model.d_model // model.heads % 2 == 0,
        "model.heads",
        f"gives an odd head width of {model.d_model // model.heads}, which rotary cannot pair",
        "choose an even head width",
    )
    require(
        data.batch_size % optim.accumulation == 0,
        "optim.accumulation",
        f"does not divide config.data.batch_size={data.batch_size}",
        "choose a divisor",
    )
    require(
        cfg.eval.stride <= data.seq_len,
        "eval.stride",
        f"is longer than config.data.seq_len={data.seq_len} and would leave targets unscored",
        "lower it, or give 0 for the window length",
    )
    require(
        cfg.attention.impl not in ("xla", "cudnn") or model.attention_dropout == 0,
        "model.attention_dropout",
        f"cannot be had from the {cfg.attention.impl} implementation",
        "set it to 0, or config.attention.impl to blockwise",
    )
    for name in eval_splits(cfg):
        require(
            name in ("valid", "test"),
            "eval.splits",
            f"names {name!r}",
            "give valid, test or both with a comma",
        )
    return cfg


ROUTED = "routed_feature routed_attention router_balance".split()
INSIDE = ["layer", "attention", *ROUTED]  # weights of terms on what layers compute
STATES = ["feature", "contrastive", *INSIDE]  # of terms on the states of one teacher


def _validate_distillation(cfg: Config, require: Callable[[bool, str, str, str], None]) -> None:
    """The rules for `config.distill`."""
    distill = cfg.distill
    if not (distill.teachers or distill.cache):
        for path, default in fields(DistillConfig(), "distill."):
            remedy = f"name config.distill.teachers, or leave it at {default!r}"
            require(get(cfg, path) == default, path, "has no meaning without a teacher", remedy)
        return
    used = {name for name in STATES if not getattr(distill, name).zero}
    require(
        not (distill.teachers and distill.cache),
        "distill.cache",
        "stands in the place of config.distill.teachers, which is given too",
        "give one of the two",
    )
    require(0 < distill.beta < 1, "distill.beta", "must lie inside (0, 1)", "give a share")
    require(
        bool(used) or not distill.kd.zero,
        "distill.kd",
        "leaves nothing that the teacher could teach",
        "raise it, or the weight of another term",
    )
    for path, value in fields(distill, "distill."):
        if isinstance(value, Curve):
            lowest = min(value for _, value in value.points())
            positive = path.endswith("temperature")
            require(lowest > 0 or not positive, path, "must stay above 0", "raise it")
            require(lowest >= 0, path, "is negative", "give 0 or more")
    require(
        (distill.support == "full") == (distill.top_k == 0),
        "distill.top_k",
        f"does not fit config.distill.support={distill.support!r}",
        "give 1 or more for top_k and union, and 0 for full",
    )
    for name, with_it, what in (
        ("beta", distill.kind in ("jsd", "skew"), "config.distill.kind jsd or skew"),
        ("attention_layers", "attention" in used, "config.distill.attention"),
        ("experts", used & set(ROUTED), "a routed term"),
        ("router_top_k", used & set(ROUTED), "a routed term"),
        ("router_temperature", used & set(ROUTED), "a routed term"),
        ("lr", used - {"attention"}, "a term with a projection"),
    ):
        require(
            bool(with_it) or getattr(distill, name) == getattr(DistillConfig(), name),
            f"distill.{name}",
            f"has no meaning without {what}",
            "leave it at its default",
        )
    numbers = distill.attention_layers.split(",")
    require(
        all(re.fullmatch(r"\s*-?\d+\s*", number) for number in numbers)
        and all(-cfg.model.layers <= int(number) < cfg.model.layers for number in numbers),
        "distill.attention_layers",
        f"does not name layers of config.model.layers={cfg.model.layers}",
        'write like "0,-1"',
    )
    require(
        distill.router_top_k <= distill.experts,
        "distill.router_top_k",
        f"is above config.distill.experts={distill.experts}",
        "lower it",
    )
    one = bool(distill.teachers) and "," not in distill.teachers
    for name in used:
        require(
            one and (cfg.model.family == "dense" or name not in INSIDE),
            f"distill.{name}",
            "needs the states of one teacher"
            + (" and a student of family 'dense'" if name in INSIDE else ""),
            "set it to 0",
        )
    if distill.cache:
        require(
            distill.support == "top_k" and len(distill.temperature.points()) == 1,
            "distill.cache",
            "holds the most likely ids at one temperature",
            "set config.distill.support to top_k and a constant config.distill.temperature",
        )
        require(
            not distill.alone,
            "distill.alone",
            "is compared with a teacher's states, which config.distill.cache does not hold",
            "leave it empty",
        )
        require(
            not cfg.data.window_offset,
            "data.window_offset",
            "makes windows that are in no cache",
            "set it to False, or name config.distill.teachers",
        )
    require(
        cfg.loss.label_smoothing == 0,
        "loss.label_smoothing",
        "is not used beside a teacher, whose targets are soft already",
        "set it to 0",
    )


def eval_splits(cfg: Config, available: Container[str] = ()) -> list[str]:
    """Names of the splits scored at the end of the run: those named, or those `available`."""
    named = [name.strip() for name in cfg.eval.splits.split(",") if name.strip()]
    return named or [name for name in ("valid", "test") if name in available]


def steps_of(path: str, value: str, *, batch_size: int, seq_len: int, windows: int) -> int:
    """Number of updates in a duration; a part of an update counts as a whole one.

    Args:
        path: the field, for the error message.
        value: the duration as written.
        batch_size: sequences per update.
        seq_len: tokens predicted per sequence.
        windows: sequences in one epoch of the training split.

    Raises:
        ConfigError: if the value is no duration.
    """
    match = _DURATION.fullmatch(value.strip())
    if match is None:
        raise ConfigError(f"config.{path}: {value!r} is no duration; write 2000 or '3 epochs'.")
    amount = float(match[1]) * _UNITS[match[2]]
    unit = (match[3] or "steps").rstrip("s")
    per_step = {"step": 1.0, "token": float(batch_size * seq_len), "epoch": batch_size / windows}
    return math.ceil(amount / per_step[unit] - 1e-9)


def resolve(cfg: Config, *, windows: int) -> Config:
    """Fill in derived values: durations become steps, zeros that mean "as ..." become numbers.

    Args:
        cfg: a valid config.
        windows: windows in one epoch of the training split.

    Raises:
        ConfigError: if warm-up and decay do not fit into the run.
    """
    cfg = from_dict(to_dict(validate(cfg)))
    for path, value in list(fields(cfg)):
        if isinstance(value, Duration):
            steps = steps_of(
                path,
                value,
                batch_size=cfg.data.batch_size,
                seq_len=cfg.data.seq_len,
                windows=windows,
            )
            section, name = path.split(".")
            setattr(getattr(cfg, section), name, str(steps))
    model = cfg.model
    if model.family == "dense":
        model.kv_heads = model.kv_heads or model.heads
        if model.d_ff == 0:
            width = 8 * model.d_model / 3 if model.mlp == "swiglu" else 4 * model.d_model
            model.d_ff = 8 * round(width / 8)
    cfg.eval.batch_size = cfg.eval.batch_size or cfg.data.batch_size
    cfg.eval.stride = cfg.eval.stride or cfg.data.seq_len

    steps, warmup, decay = (
        int(value) for value in (cfg.train.steps, cfg.optim.warmup, cfg.optim.decay)
    )
    if steps < 1:
        raise ConfigError("config.train.steps: the run has no update; give 1 step or more.")
    if cfg.optim.schedule == "wsd" and not 0 < decay <= steps - warmup:
        raise ConfigError(
            f"config.optim.decay: {decay} steps do not fit between warm-up and the end of "
            f"{steps} steps; schedule wsd needs a decay of 1 to {max(1, steps - warmup)} steps."
        )
    if cfg.optim.schedule != "wsd" and decay:
        raise ConfigError(
            f"config.optim.decay: only schedule wsd reads it, not {cfg.optim.schedule}; "
            "set it to 0 or the schedule to wsd."
        )
    if warmup >= steps:
        raise ConfigError(
            f"config.optim.warmup: {warmup} steps leave nothing of a run of {steps} steps; "
            "shorten it below config.train.steps."
        )
    if int(cfg.train.log_every) < 1:
        raise ConfigError("config.train.log_every: must be 1 step or more; give 1 or more.")
    return cfg


def config_hash(cfg: Config) -> str:
    """First 16 hex digits of the sha256 of the config's JSON."""
    text = json.dumps(to_dict(cfg), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def difference(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Lines `path: old -> new` for every leaf at which two config dicts differ."""

    def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for key, value in tree.items():
            if isinstance(value, dict):
                flat |= leaves(value, f"{prefix}{key}.")
            else:
                flat[f"{prefix}{key}"] = value
        return flat

    before, after = leaves(old), leaves(new)
    return [
        f"config.{path}: {before.get(path, 'absent')!r} -> {after.get(path, 'absent')!r}"
        for path in sorted(before | after)
        if before.get(path) != after.get(path) or (path in before) != (path in after)
    ]
