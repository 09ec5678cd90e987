"""What several tests share."""

import os
import pathlib

import jax
import numpy as np
import pytest

from lm_jax import config
from lm_jax.config import rules
from lm_jax.config.resolve import resolve
from lm_jax.data.open import open_data
from lm_jax.preflight import distill, run


def shared_data(name: str) -> pathlib.Path:
    """A file or folder of the shared data; the test is skipped where it is not there."""
    default = pathlib.Path(__file__).parents[2] / "shared" / "data"
    path = pathlib.Path(os.environ.get("LM_JAX_SHARED_DATA", default)) / name
    if not path.exists():
        pytest.skip(f"{name} is not in LM_JAX_SHARED_DATA or ../shared/data")
    return path


def every(families):
    """Names of model families; those that take long to compile are left to the slow tests."""
    slow = ("scanned", "factorised", "musota")
    return [pytest.param(name, marks=pytest.mark.slow if name in slow else ()) for name in families]


def tiny_config(**changes):
    """A resolved config of a model small enough to differentiate coordinate by coordinate."""
    base = dict(
        data__seq_len=11,
        data__batch_size=6,
        model__layers=2,
        model__d_model=16,
        model__heads=4,
        model__init="fan_in",
        train__steps="20",
        optim__warmup="3",
    )
    return resolve(config.replace(config.Config(), **base | changes), windows=50)


def examine_distillation_of(cfg):
    """That part of the preflight alone, for the others compile about as long again."""
    store = open_data(rules.validate(cfg))
    cfg = resolve(cfg, windows=50)
    return distill.examine(cfg, run.Small(cfg, store).cfg, store)


def random_batch(rng, shape, vocab_size, *, documents=3, padded=0):
    """A batch of windows [..., T + 1] cut into documents, with `padded` columns at the end."""
    *rows, width = shape
    segment_ids = np.sort(rng.integers(1, documents + 1, shape), axis=-1).astype(np.int32)
    weights = (rng.random(shape) < 0.8).astype(np.float32)
    tokens = rng.integers(1, vocab_size, shape).astype(np.int32)
    if padded:
        for array in (segment_ids, weights, tokens):
            array[..., width - padded :] = 0
    return {"tokens": tokens, "segment_ids": segment_ids, "weights": weights}


def randomise(params, seed, std=0.3):
    """Every leaf replaced by noise, so that nothing hides behind a zero or a one."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noise = [
        std * jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, noise)
