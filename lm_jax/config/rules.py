"""Which values and combinations a config may have."""

import re
from collections.abc import Callable, Container

from lm_jax.config.fields import (
    INSIDE,
    ROUTED,
    STATES,
    Config,
    ConfigError,
    DistillConfig,
    ModelConfig,
    get,
    named_fields,
    nearest,
)
from lm_jax.config.values import Curve

_CHOICES: dict[str, tuple[str, ...]] = {
    "tokenizer.kind": ("byte", "char", "word", "bpe", "hf"),
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
    "train.compute_dtype": ("auto", "float32", "bfloat16", "float16"),
    "train.matmul_precision": ("float32", "tensorfloat32"),
}
_POSITIVE = (
    "data.seq_len data.batch_size model.layers model.d_model model.heads model.norm_eps "
    "model.rope_theta model.init_std optim.peak_lr optim.eps train.keep "
    "train.steps_per_call train.max_nonfinite mesh.fsdp distill.experts distill.router_top_k "
    "distill.lr"
).split()
_SHARE = (  # in [0, 1)
    "data.valid_fraction data.test_fraction model.dropout model.attention_dropout "
    "model.embedding_dropout loss.label_smoothing optim.b1 optim.b2 optim.ema_decay"
).split()
_NOT_NEGATIVE = (
    "seed data.workers data.threads data.micro_batch "
    "tokenizer.vocab_size tokenizer.sample model.kv_heads "
    "model.d_ff model.embedding_rank model.logit_softcap optim.end_lr optim.weight_decay "
    "optim.clip_norm eval.batch_size eval.stride"
).split()
# What a layer of family musota can be told; the rest of it is fixed.
_MUSOTA = "family layers init_std dropout embedding_dropout logit_softcap scan_layers remat".split()


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
                f"did you mean {nearest(value, choices)!r}?"
            )
    for path in _POSITIVE:
        require(get(cfg, path) > 0, path, "must be above 0", "give a positive number")
    for path in _NOT_NEGATIVE:
        require(get(cfg, path) >= 0, path, "is negative", "give 0 or more")
    for path in _SHARE:
        require(0 <= get(cfg, path) < 1, path, "is no share", "give 0 or more and below 1")

    data, model = cfg.data, cfg.model
    require(
        (data.corpus == "text") == bool(data.files),
        "data.files",
        f"does not fit config.data.corpus={data.corpus!r}",
        'name the training files with corpus "text", and only there',
    )
    if model.family == "musota":
        for path, default in named_fields(ModelConfig(), "model."):
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
        or (cfg.tokenizer.kind in ("byte", "char", "hf") and cfg.tokenizer.vocab_size == 0),
        "tokenizer.vocab_size",
        f"does not fit config.tokenizer.kind={cfg.tokenizer.kind!r}",
        "give more than 257 for bpe, 0 or more for word, and 0 for byte, char and hf",
    )
    require(
        (cfg.tokenizer.kind == "hf") == bool(cfg.tokenizer.folder),
        "tokenizer.folder",
        f"does not fit config.tokenizer.kind={cfg.tokenizer.kind!r}",
        "name the folder of the checkpoint with kind hf, and only there",
    )
    require(
        cfg.tokenizer.kind in ("bpe", "word") or cfg.tokenizer.sample == 0,
        "tokenizer.sample",
        f"does not fit config.tokenizer.kind={cfg.tokenizer.kind!r}, which learns from no sample",
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


def _validate_distillation(cfg: Config, require: Callable[[bool, str, str, str], None]) -> None:
    """The rules for `config.distill`."""
    distill = cfg.distill
    if not (distill.teachers or distill.cache):
        for path, default in named_fields(DistillConfig(), "distill."):
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
    for path, value in named_fields(distill, "distill."):
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
    taught = not distill.kd.zero
    for name, with_it, what in (
        *((name, taught, "config.distill.kd") for name in ("kind", "support", "temperature")),
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
    names = [name.strip() for name in distill.teachers.split(",")]
    require(
        len(set(names)) == len(names) and (all(names) or names == [""]),
        "distill.teachers",
        "names one of them twice, or nothing between two commas",
        "name each once",
    )
    numbers, L = distill.attention_layers.split(","), cfg.model.layers
    require(
        all(re.fullmatch(r"\s*-?\d+\s*", number) for number in numbers)
        and all(-L <= int(number) < L for number in numbers)
        and len({int(number) % L for number in numbers}) == len(numbers),
        "distill.attention_layers",
        f"does not name layers of config.model.layers={L}, each once",
        'write like "0,-1"',
    )
    require(
        distill.router_top_k <= distill.experts,
        "distill.router_top_k",
        f"is above config.distill.experts={distill.experts}",
        "lower it",
    )
    require(
        "contrastive" not in used or (cfg.data.batch_size > 1 and cfg.data.micro_batch != 1),
        "distill.contrastive",
        "tells rows apart, of which a device computes one at a time",
        "raise config.data.batch_size and config.data.micro_batch",
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
