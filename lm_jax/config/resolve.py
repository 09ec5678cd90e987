"""What a config leaves open, filled in: durations, derived sizes, the dtype."""

import copy
import math
from typing import NamedTuple

from lm_jax.config.fields import Config, DataConfig
from lm_jax.config.rules import validate
from lm_jax.config.section import ConfigError, named_fields
from lm_jax.config.values import Duration
from lm_jax.kernels import device

_OF_CALLS = ("train.steps", "train.eval_every", "train.checkpoint_every")


class Updates(NamedTuple):
    """A duration in updates."""

    written: int
    taken: int
    why: str = ""  # the two differ


def _steps_of(value: Duration, data: DataConfig, windows: int) -> int:
    """Number of updates in a duration; a part of an update counts as a whole one."""
    amount, unit = value.parts()
    tokens, epochs = data.batch_size * data.seq_len, data.batch_size / windows
    per_step = {"step": 1, "token": tokens, "epoch": epochs}
    return math.ceil(amount / per_step[unit] - 1e-9)


def spans(cfg: Config, *, windows: int) -> dict[str, Updates]:
    """The durations of a run in updates, by field.

    What is written in tokens or epochs becomes whole calls of `train.steps_per_call`, for a call of
    another length would be compiled anew. A warm-up that the run would never end takes a fifth of
    it, the most that the doctor (optimiser.warmup) finds in order; a decay takes what is left.
    Windows that would never be whole grow for four fifths of the run.
    """
    call, found = cfg.train.steps_per_call, {}
    for path, value in named_fields(cfg):
        if isinstance(value, Duration):
            exact = _steps_of(value, cfg.data, windows)
            found[path] = Updates(exact, exact)
            if path in _OF_CALLS and exact % call and value.parts()[1] != "step":
                whole = call * max(1, round(exact / call))
                why = f"whole calls of config.train.steps_per_call={call}"
                found[path] = Updates(exact, whole, why)
    steps, warmup, decay = (found[f].taken for f in ("train.steps", "optim.warmup", "optim.decay"))
    if warmup >= steps:
        why = f"a fifth of the {steps:,} of the run"
        found["optim.warmup"] = Updates(warmup, steps // 5, why)
    if (growth := found["data.growth"].taken) >= steps:
        why = f"four fifths of the {steps:,} of the run"
        found["data.growth"] = Updates(growth, 4 * steps // 5, why)
    if decay > (left := steps - found["optim.warmup"].taken):
        found["optim.decay"] = Updates(decay, left, f"what the warm-up leaves of {steps:,}")
    return found


def resolve(cfg: Config, *, windows: int) -> Config:
    """Fill in derived values: durations in steps, numbers for zeros that mean "as ...", the dtype.

    Args:
        cfg: the config as written.
        windows: windows in one epoch of the training split.

    Raises:
        ConfigError: if it is impossible.
    """
    cfg = copy.deepcopy(validate(cfg))
    found = spans(cfg, windows=windows)
    if (steps := found["train.steps"].taken) >= 1 << 31:
        raise ConfigError(
            f"config.train.steps: {cfg.train.steps!r} makes {steps:,} updates, and 32 bits count "
            f"them; give fewer than {1 << 31:,}."
        )
    for path, span in found.items():
        section, name = path.split(".")
        setattr(getattr(cfg, section), name, str(span.taken))
    model = cfg.model
    if model.reads("kv_heads"):
        model.kv_heads = model.kv_heads or model.heads
    if model.reads("head_dim"):
        model.head_dim = model.head_dim or model.d_model // model.heads
    if model.reads("d_ff") and model.d_ff == 0:
        width = 8 * model.d_model / 3 if model.mlp == "swiglu" else 4 * model.d_model
        model.d_ff = 8 * round(width / 8)
    cfg.train.compute_dtype, _ = device.choose_dtype(cfg.train.compute_dtype)
    cfg.eval.batch_size = cfg.eval.batch_size or cfg.data.batch_size
    cfg.eval.stride = cfg.eval.stride or cfg.data.seq_len
    if cfg.train.profile and cfg.train.profile.updates().stop > int(cfg.train.steps) + 1:
        raise ConfigError(
            f"config.train.profile: {cfg.train.profile!r} reaches beyond the {cfg.train.steps} "
            "updates of the run; name updates that it has."
        )
    return cfg
