"""The typed run config: defaults, copies, hash.

A config file returns a `Config`; every field is documented beside its default with its
unit. Assigning an unknown field or a wrong type raises at once and names the remedy.
"""

import dataclasses
import difflib
import hashlib
import json
import math
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from lm_jax.config.values import Curve, Duration


class ConfigError(ValueError):
    """A config field that is unknown, of the wrong type or impossible."""


def nearest(name: str, names: Sequence[str]) -> str:
    """The one of `names` that is spelt most like `name`."""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
    return close[0] if close else ""


def _typed(where: str, value: Any, expected: Any) -> Any:
    """Return `value` as the field's type, or raise naming the field `where`."""
    if expected is Duration:
        try:
            Duration(value).parts()
        except ValueError as error:
            raise ConfigError(
                f"config.{where}: {value!r} is no duration; "
                'write a number of steps, or like "2M tokens" or "3 epochs".'
            ) from error
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
    meant = ".".join([*parents, nearest(last, names)])
    return f"config.{path}: there is no such field; did you mean config.{meant}?"


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
    # most sequences that a device computes at a time, and so the number of micro-batches; 0: all
    micro_batch: int = 0
    document_mask: bool = True  # attention and positions restart at each document
    window_offset: bool = False  # cut the text into windows elsewhere in every epoch
    threads: int = 1  # threads that assemble batches ahead of the step; 0: in the loop itself


@dataclasses.dataclass
class TokenizerConfig(_Section):
    """How text becomes ids."""

    kind: str = "char"  # byte | char | word | bpe | hf (of a Hugging Face checkpoint)
    folder: str = ""  # of that checkpoint, with tokenizer.json and config.json
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

    # adamw | muon: the matrices of the blocks by Muon (whose iteration is in bfloat16 on a GPU that
    # knows it, whatever train.compute_dtype is), the rest by Adam
    name: str = "adamw"
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
    # auto (what the device is fast in) | float32 | bfloat16 | float16 (with dynamic loss scaling)
    compute_dtype: str = "auto"
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
    """One run.

    Example:
        ```python
        cfg = lm_jax.Config(doctor="off")  # a tiny model of the synthetic corpus
        cfg.model.layers, cfg.model.d_model, cfg.data.seq_len = 1, 16, 32
        cfg.optim.peak_lr = 1e-2
        cfg.optim.warmup, cfg.train.steps = "5", "20"
        ```
    """

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


ROUTED = "routed_feature routed_attention router_balance".split()
INSIDE = ["layer", "attention", *ROUTED]  # weights of terms on what layers compute
STATES = ["feature", "contrastive", *INSIDE]  # of terms on the states of one teacher


def named_fields(section: _Section, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, value) of every leaf field."""
    for field in dataclasses.fields(section):  # type: ignore[arg-type]
        value = getattr(section, field.name)
        if isinstance(value, _Section):
            yield from named_fields(value, f"{prefix}{field.name}.")
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


def from_record(record: dict[str, Any]) -> Config:
    """The config in a run's `config.json`.

    Version 0.1 wrote the number of micro-batches there, this one writes their size on a device.
    """
    tree = record["config"]
    optim = dict(tree.get("optim", {}))
    if count := optim.pop("accumulation", 0):
        data = dict(tree["data"])
        if count > 1:
            data["micro_batch"] = data["batch_size"] // (count * len(record["devices"]))
        tree = {**tree, "optim": optim, "data": data}
    return from_dict(tree)


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
