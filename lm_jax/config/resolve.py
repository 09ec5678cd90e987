"""What a config leaves open, filled in: durations, derived sizes, the dtype."""

import copy
import math

from lm_jax.config.fields import Config, DataConfig
from lm_jax.config.rules import validate
from lm_jax.config.section import ConfigError, named_fields
from lm_jax.config.values import Duration
from lm_jax.kernels import device


def _steps_of(value: Duration, data: DataConfig, windows: int) -> int:
    """Number of updates in a duration; a part of an update counts as a whole one."""
    amount, unit = value.parts()
    tokens, epochs = data.batch_size * data.seq_len, data.batch_size / windows
    per_step = {"step": 1, "token": tokens, "epoch": epochs}
    return math.ceil(amount / per_step[unit] - 1e-9)


def rounded(cfg: Config, *, windows: int) -> dict[str, tuple[int, int]]:
    """Spans that are rounded to whole calls of `train.steps_per_call`, by field: (exact, rounded).

    A call of another length would be compiled anew. Spans written in steps stay as they are.
    """
    call, spans = cfg.train.steps_per_call, {}
    for name in ("steps", "eval_every", "checkpoint_every"):
        value = getattr(cfg.train, name)
        exact = _steps_of(value, cfg.data, windows)
        if exact % call and value.parts()[1] != "step":
            spans[f"train.{name}"] = exact, call * max(1, round(exact / call))
    return spans


def resolve(cfg: Config, *, windows: int) -> Config:
    """Fill in derived values: durations in steps, numbers for zeros that mean "as ...", the dtype.

    Args:
        cfg: a valid config.
        windows: windows in one epoch of the training split.

    Raises:
        ConfigError: if warm-up and decay do not fit into the run.
    """
    cfg = copy.deepcopy(validate(cfg))
    whole_calls = rounded(cfg, windows=windows)
    for path, value in named_fields(cfg):
        if isinstance(value, Duration):
            section, name = path.split(".")
            exact = _steps_of(value, cfg.data, windows)
            _, steps = whole_calls.get(path, (exact, exact))
            setattr(getattr(cfg, section), name, str(steps))
    model = cfg.model
    if model.reads("kv_heads"):
        model.kv_heads = model.kv_heads or model.heads
    if model.reads("d_ff") and model.d_ff == 0:
        width = 8 * model.d_model / 3 if model.mlp == "swiglu" else 4 * model.d_model
        model.d_ff = 8 * round(width / 8)
    cfg.train.compute_dtype, _ = device.choose_dtype(cfg.train.compute_dtype)
    cfg.eval.batch_size = cfg.eval.batch_size or cfg.data.batch_size
    cfg.eval.stride = cfg.eval.stride or cfg.data.seq_len

    steps, warmup, decay = map(int, (cfg.train.steps, cfg.optim.warmup, cfg.optim.decay))
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
    if cfg.train.profile and cfg.train.profile.updates().stop > steps + 1:
        raise ConfigError(
            f"config.train.profile: {cfg.train.profile!r} reaches beyond the {steps} updates of "
            "the run; name updates that it has."
        )
    if int(cfg.train.log_every) < 1:
        raise ConfigError("config.train.log_every: must be 1 step or more; give 1 or more.")
    return cfg
