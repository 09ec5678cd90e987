"""Which values and combinations a config may have.

A rule yields "path of a field: what is wrong with its value; the remedy".
"""

import re
from collections.abc import Container, Iterator

from lm_jax.config.fields import INSIDE, ROUTED, STATES, Config, DistillConfig, ModelConfig
from lm_jax.config.section import ConfigError, advice, get, marks, named_fields
from lm_jax.config.values import Curve
from lm_jax.files import is_url

_INDICES = 1 << 31  # elements of an array that XLA reaches
_UNROLLED = 512  # layers
_IDS = 1 << 24  # of bpe; the library takes their memory at once, and aborts if it is not there


def validate(cfg: Config) -> Config:
    """Return `cfg`, or raise ConfigError on the first impossible value or combination."""
    rules = _values, _paths, _data, _spans, _tokenizer, _distillation, _model, _mesh, _cluster
    for rule in (*rules, _start, _evaluation):
        for found in rule(cfg):
            path, _, problem = found.partition(": ")
            end = "" if problem[-1] in ".?" else "."
            raise ConfigError(f"config.{path}: {get(cfg, path)!r} {problem}{end}")
    return cfg


def _values(cfg: Config) -> Iterator[str]:
    """The choices or the bound of each field."""
    for path, found in marks(Config):
        value, choices, bound = get(cfg, path), found.get("choices"), found.get("bound")
        if choices and value not in choices:
            yield f"{path}: does not exist; {advice(value, choices)}"
        if bound and not bound.holds(value):
            yield f"{path}: {bound.otherwise}"


def _paths(cfg: Config) -> Iterator[str]:
    for path in (
        *("data.cache_dir", "tokenizer.folder", "train.start_from"),
        *("distill.teachers", "distill.cache", "distill.alone"),
    ):
        if any(is_url(name.strip()) for name in get(cfg, path).split(",")):
            yield f"{path}: is a URL, and only paths are read here; mount the bucket, and give one"


def _data(cfg: Config) -> Iterator[str]:
    data = cfg.data
    if (data.corpus == "text") != bool(data.files):
        yield (
            f"data.files: does not fit config.data.corpus={data.corpus!r}; "
            'name the training files with corpus "text", and only there'
        )
    for split in {"valid", *eval_splits(cfg)} & {"valid", "test"} if data.corpus == "text" else ():
        if not getattr(data, f"{split}_files") and not getattr(data, f"{split}_fraction"):
            remedy = f"raise it, or name config.data.{split}_files"
            yield f"data.{split}_fraction: leaves no {split} split, which is scored; {remedy}"
    row = data.seq_len + 1
    for path, rows in (
        ("data.batch_size", data.batch_size),
        ("train.steps_per_call", data.batch_size * cfg.train.steps_per_call),
        ("eval.batch_size", cfg.eval.batch_size),
    ):
        if rows * row >= _INDICES:
            most = _INDICES // row * get(cfg, path) // rows
            remedy = f"give at most {most:,}" if most else "lower config.data.seq_len first"
            yield f"{path}: makes arrays of {rows * row:,} tokens, past 32-bit indices; {remedy}"
    if data.seq_len % 8 and data.growth.parts()[0]:
        yield (
            f"data.growth: cuts windows in eighths, and config.data.seq_len={data.seq_len} has "
            "none; give a multiple of 8, or no growth"
        )
    if data.valid_fraction + data.test_fraction >= 1:
        yield "data.valid_fraction: and test_fraction leave no text; lower them"


def _spans(cfg: Config) -> Iterator[str]:
    """Durations that are nothing in any unit."""
    decays, schedule = bool(cfg.optim.decay.parts()[0]), cfg.optim.schedule
    if not cfg.train.steps.parts()[0]:
        yield "train.steps: is no update; give 1 or more"
    if schedule == "wsd" and not decays:
        yield "optim.decay: is nothing, but schedule wsd ends with it; give a part of the run"
    if schedule != "wsd" and decays:
        yield (
            f"optim.decay: is read by schedule wsd alone, not by {schedule}; "
            "set it to 0, or config.optim.schedule to wsd"
        )


def _tokenizer(cfg: Config) -> Iterator[str]:
    kind, size = cfg.tokenizer.kind, cfg.tokenizer.vocab_size
    unfit = f"does not fit config.tokenizer.kind={kind!r}"
    if kind != "word" and (not 257 <= size <= _IDS if kind == "bpe" else size):
        yield (
            f"tokenizer.vocab_size: {unfit}; "
            f"give 257 to {_IDS:,} for bpe, 0 or more for word, and 0 for byte, char and hf"
        )
    if (kind == "hf") != bool(cfg.tokenizer.folder):
        remedy = "name the folder of the checkpoint with kind hf, and only there"
        yield f"tokenizer.folder: {unfit}; {remedy}"
    if kind not in ("bpe", "word") and cfg.tokenizer.sample:
        yield f"tokenizer.sample: {unfit}, which learns from no sample; give 0"


def _mesh(cfg: Config) -> Iterator[str]:
    """Devices of the axis `tensor` share heads and the MLP."""
    model, tensor = cfg.model, cfg.mesh.tensor
    if tensor == 1:
        return
    if model.family != "dense":
        yield f"mesh.tensor: has nothing to share in config.model.family={model.family!r}; give 1"
    for name, value in (
        ("heads", model.heads),
        ("kv_heads", model.kv_heads or model.heads),
        ("d_ff", model.d_ff or 8),
    ):
        if value % tensor:
            what = f"={value}" if getattr(model, name) else ", a multiple of 8 where it is 0"
            yield f"mesh.tensor: does not divide config.model.{name}{what}; choose a divisor"
    if not cfg.distill.attention.zero:
        yield (
            "mesh.tensor: shares the heads whose maps config.distill.attention compares; give 1, "
            "or set that to 0"
        )


def _model(cfg: Config) -> Iterator[str]:
    model, impl = cfg.model, cfg.attention.impl
    D, H, K = model.d_model, model.heads, model.kv_heads
    for name, default in named_fields(ModelConfig()):
        if getattr(model, name) != default and not model.reads(name):
            family = f"config.model.family={model.family!r}"
            yield f"model.{name}: has no meaning for {family}; leave it at {default!r}"
    if model.layers > _UNROLLED and not model.scan_layers:
        yield (
            f"model.layers: would be compiled one by one, more than {_UNROLLED} for hours; "
            "set config.model.scan_layers to True"
        )
    if D % H and not model.head_dim:
        yield (
            f"model.heads: does not divide config.model.d_model={D}; choose a divisor, or give "
            "config.model.head_dim"
        )
    if model.embedding_rank >= D:
        yield (
            f"model.embedding_rank: is not below config.model.d_model={D} and would save nothing; "
            "lower it, or give 0 for one table"
        )
    if K and H % K:
        remedy = "choose a divisor, or 0 for as many"
        yield f"model.kv_heads: does not divide config.model.heads={H}; {remedy}"
    if model.positions == "rotary" and (C := model.head_dim or D // H) % 2:
        yield (
            f"model.{'head_dim' if model.head_dim else 'heads'}: gives an odd head width of {C}, "
            "which rotary cannot pair; choose an even head width"
        )
    if model.key_offset and (model.head_dim or D // H) < 4:
        yield (
            "model.key_offset: needs two rotary pairs in a head; give config.model.head_dim of 4 "
            "or more, or leave it at False"
        )
    if model.bias_in != "all" and not model.bias:
        why = "has no meaning without config.model.bias"
        yield f"model.bias_in: {why}; set that to True, or leave this at 'all'"
    if impl in ("xla", "cudnn") and model.attention_dropout:
        yield (
            f"model.attention_dropout: cannot be had from the {impl} implementation; "
            "set it to 0, or config.attention.impl to blockwise"
        )


def _start(cfg: Config) -> Iterator[str]:
    if cfg.train.start_state and not cfg.train.start_from:
        why = "has no meaning without config.train.start_from"
        yield f"train.start_state: {why}; name a run there, or leave it at False"


def _evaluation(cfg: Config) -> Iterator[str]:
    if cfg.eval.stride > cfg.data.seq_len:
        yield (
            f"eval.stride: is longer than config.data.seq_len={cfg.data.seq_len} and would leave "
            "targets unscored; lower it, or give 0 for the window length"
        )
    for name in eval_splits(cfg):
        if name not in ("valid", "test"):
            yield f"eval.splits: names {name!r}; give valid, test or both with a comma"


def _cluster(cfg: Config) -> Iterator[str]:
    for word in cfg.cluster.xla_flags.split():
        if cfg.cluster.xla_flags != "auto" and not re.match(r"--xla_\w", word):
            yield (
                f"cluster.xla_flags: holds {word!r}, which is no flag of XLA; write "
                "--xla_NAME=VALUE with spaces between them, auto, or nothing"
            )


def _distillation(cfg: Config) -> Iterator[str]:
    distill = cfg.distill
    if not distill.taught:
        for name, default in named_fields(DistillConfig()):
            if getattr(distill, name) != default:
                remedy = f"name config.distill.teachers, or leave it at {default!r}"
                yield f"distill.{name}: has no meaning without a teacher; {remedy}"
        return
    used = {name for name in STATES if not getattr(distill, name).zero}
    yield from _teachers(cfg, used)
    yield from _divergence(cfg)
    yield from _options(cfg, used)
    yield from _states(cfg, used)
    if distill.cache:
        yield from _cache(cfg)
    if cfg.loss.label_smoothing:
        why = "is not used beside a teacher, whose targets are soft already"
        yield f"loss.label_smoothing: {why}; set it to 0"


def _teachers(cfg: Config, used: set[str]) -> Iterator[str]:
    distill = cfg.distill
    if distill.teachers and distill.cache:
        yield (
            "distill.cache: stands in the place of config.distill.teachers, which is given too; "
            "give one of the two"
        )
    if distill.kd.zero and not used:
        remedy = "raise it, or the weight of another term"
        yield f"distill.kd: leaves nothing that the teacher could teach; {remedy}"
    names = [name.strip() for name in distill.teachers.split(",")]
    if len(set(names)) < len(names) or not (all(names) or names == [""]):
        why = "names one of them twice, or nothing between two commas"
        yield f"distill.teachers: {why}; name each once"


def _divergence(cfg: Config) -> Iterator[str]:
    distill = cfg.distill
    if not 0 < distill.beta < 1:
        yield "distill.beta: must lie inside (0, 1); give a share"
    for name, curve in named_fields(distill):
        if isinstance(curve, Curve):
            lowest = min(value for _, value in curve.points())
            if name.endswith("temperature") and lowest <= 0:
                yield f"distill.{name}: must stay above 0; raise it"
            if lowest < 0:
                yield f"distill.{name}: is negative; give 0 or more"
    if (distill.support == "full") != (distill.top_k == 0):
        yield (
            f"distill.top_k: does not fit config.distill.support={distill.support!r}; "
            "give 1 or more for top_k and union, and 0 for full"
        )


def _options(cfg: Config, used: set[str]) -> Iterator[str]:
    """The options of terms that are off must keep their defaults."""
    distill = cfg.distill
    for names, with_it, what in (
        ("kind support temperature", not distill.kd.zero, "config.distill.kd"),
        ("beta", distill.kind in ("jsd", "skew"), "config.distill.kind jsd or skew"),
        ("attention_layers", "attention" in used, "config.distill.attention"),
        ("experts router_top_k router_temperature", used & set(ROUTED), "a routed term"),
        ("lr", used - {"attention"}, "a term with a projection"),
    ):
        for name in names.split():
            if not with_it and getattr(distill, name) != getattr(DistillConfig(), name):
                yield f"distill.{name}: has no meaning without {what}; leave it at its default"


def _states(cfg: Config, used: set[str]) -> Iterator[str]:
    """The terms on the states of a teacher."""
    distill, L = cfg.distill, cfg.model.layers
    numbers = distill.attention_layers.split(",")
    if (
        not all(re.fullmatch(r"\s*-?\d+\s*", number) for number in numbers)
        or not all(-L <= int(number) < L for number in numbers)
        or len({int(number) % L for number in numbers}) < len(numbers)
    ):
        why = f"does not name layers of config.model.layers={L}, each once"
        yield f'distill.attention_layers: {why}; write like "0,-1"'
    if distill.router_top_k > distill.experts:
        why = f"is above config.distill.experts={distill.experts}"
        yield f"distill.router_top_k: {why}; lower it"
    if "contrastive" in used and cfg.data.batch_size == 1:
        remedy = "raise config.data.batch_size"
        yield f"distill.contrastive: tells rows apart, of which there is one; {remedy}"
    one = bool(distill.teachers) and "," not in distill.teachers
    dense = cfg.model.family == "dense"
    for name in sorted(used):
        if not one or (name in INSIDE and not dense):
            student = " and a student of family 'dense'" if name in INSIDE else ""
            yield f"distill.{name}: needs the states of one teacher{student}; set it to 0"


def _cache(cfg: Config) -> Iterator[str]:
    distill = cfg.distill
    if distill.support != "top_k" or len(distill.temperature.points()) > 1:
        yield (
            "distill.cache: holds the most likely ids at one temperature; "
            "set config.distill.support to top_k and a constant config.distill.temperature"
        )
    if distill.alone:
        why = "is compared with a teacher's states, which config.distill.cache does not hold"
        yield f"distill.alone: {why}; leave it empty"
    if distill.next_bytes:
        yield "distill.next_bytes: has no meaning for config.distill.cache; leave it at False"
    for name, value, none in (
        ("window_offset", cfg.data.window_offset, False),
        ("growth", cfg.data.growth.parts()[0], 0),
    ):
        if value:
            remedy = f"set it to {none}, or name config.distill.teachers"
            yield f"data.{name}: makes windows that are in no cache; {remedy}"


def eval_splits(cfg: Config, available: Container[str] = ()) -> list[str]:
    """Names of the splits scored at the end of the run: those named, or those `available`."""
    named = [name.strip() for name in cfg.eval.splits.split(",") if name.strip()]
    return named or [name for name in ("valid", "test") if name in available]
