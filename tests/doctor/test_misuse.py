"""What is handed in amiss is refused in one sentence, or a check says why it was not made."""

from typing import Any

import numpy as np
import pytest

from lm_jax import doctor

RNG = np.random.default_rng(0)


def logits(tokens):
    return np.zeros((*tokens.shape, 5), np.float32)


def scalar(params):
    return (params["a"] ** 2).sum()


def train(state, tokens):
    return state


# Whole numbers are refused by one function: here what is none, with each family what is too small.
MISUSES: list[tuple[Any, tuple, dict, str]] = [
    (doctor.examine_model, (logits,), dict(vocab_size="5", seq_len=8), "vocab_size='5'"),
    (doctor.examine_model, (logits,), dict(vocab_size=5, seq_len=2.5), "seq_len=2.5"),
    (doctor.examine_model, (logits,), dict(vocab_size=5, seq_len=8, seed=None), "seed=None"),
    (
        doctor.examine_model,
        (logits,),
        dict(vocab_size=5, seq_len=8, compute_dtype="abc"),
        "compute_dtype='abc'",
    ),
    (
        doctor.examine_model,
        (logits,),
        dict(vocab_size=5, seq_len=8, init_std={"a": None}),
        "init_std={'a': None}",
    ),
    (doctor.examine_gradients, (scalar, {"a": np.ones(2)}), dict(unused=5), "unused=5"),
    (doctor.examine_gradients, (scalar, {"a": "text"}), {}, "no floating-point leaf"),
    (
        doctor.examine_training,
        (train, train, train),
        dict(vocab_size=5, seq_len=8, smallest_leak="x"),
        "smallest_leak='x'",
    ),
    (
        doctor.examine_evaluation,
        (),
        dict(vocab_size=5, seq_len=8, strides=[None]),
        "strides=[None]",
    ),
    (doctor.examine_optimiser, (), dict(clip_norm="a"), "clip_norm"),
    (doctor.examine_optimiser, (), dict(params={}), "params"),
    (doctor.examine_distillation, (), dict(vocab_size=8, beta="a"), "beta"),
    (doctor.examine_arms, ({"a": None},), {}, "is no mapping of facts"),
    (doctor.examine_arms, ({"a": {"losses": [np.nan]}},), {}, "give a list of finite numbers"),
    (doctor.examine_arms, ({"a": {"budget": 5}},), {}, 'give "stated"'),
    (
        doctor.examine_arms,
        ({"a": {"parameters": "10M"}},),
        {},
        "arms['a']['parameters']: give a number",
    ),
    (
        doctor.examine_arms,
        ({"a": {"budget": {"stated": "1B", "steps": 3}}},),
        {},
        "numbers above 0",
    ),
    (doctor.examine_arms, ({"a": {"run_dir": 3}},), {}, "give a path"),
    (doctor.examine_arms, ({"a": {"tied": "yes"}},), {}, "give True or False"),
    (doctor.examine_arms, ({"a": {"tables": "wte"}},), {}, "give a list of names"),
    (doctor.examine_arms, ({"a": {}},), dict(ignore="name"), "ignore='name'"),
    (doctor.examine_kernel, (logits, logits, logits), dict(sizes="ab"), "sizes='ab'"),
    (doctor.examine_kernel, (logits, logits, logits), dict(sizes=[0]), "sizes=[0]"),
]


@pytest.mark.parametrize("examine, args, kwargs, said", MISUSES)
def test_arguments_that_mean_nothing_are_named(examine, args, kwargs, said):
    with pytest.raises(ValueError) as refusal:
        examine(*args, **kwargs)
    assert said in str(refusal.value)


def test_losses_of_seeds_may_be_an_array():
    report = doctor.examine_arms({n: {"losses": RNG.normal(size=3)} for n in "ab"})
    assert report["arms.ranking"].status != "skip"
