"""The evaluation, generator and sampler of a run, as functions that the doctor can call."""

import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lm_jax import config, decode, generate, sharding, step
from lm_jax.config import Config
from lm_jax.data import windows
from lm_jax.data.store import Split
from lm_jax.evaluate import Evaluator
from lm_jax.workdir import Trained

PROCESSES = 4  # that share the batches


def facts(cfg: Config, vocab_size: int, graphdef: nnx.GraphDef, params: Any) -> dict[str, Any]:
    """Arguments of `examine_evaluation` that the code of the run decides.

    Args:
        cfg: resolved config of a small model.
        vocab_size: V.
        graphdef: structure of the small model.
        params: its parameters, as the model has them.
    """
    T, split = cfg.data.seq_len, _split(cfg, vocab_size)
    # Generation asks a tokenizer for the prompt's ids, here none, and for the text.
    tokenizer: Any = types.SimpleNamespace(
        separator=split.separator,
        vocab_size=vocab_size,
        encode=lambda text: np.zeros(0, np.int32),
        token_bytes=lambda ids: [b""] * len(ids),
    )
    store: Any = types.SimpleNamespace(split=lambda name: split)
    mesh = sharding.make_mesh(cfg.mesh)
    trained = Trained(cfg, tokenizer, mesh, graphdef, params, 0, {})
    made = generate.generate(trained, "", tokens=min(20, T), temperature=1.0, seed=cfg.seed)[0]
    return dict(
        evaluate_fn=_evaluation(cfg, vocab_size, store),
        targets=split.tokens,
        strides=(1, max(1, T // 3), T),
        batches_fn=_batches(cfg, split),
        processes=PROCESSES,
        continuation=([split.separator], made.ids, made.log_probs),
        sampler=_sampler,
        sampler_options=("temperature", "top_k", "top_p"),
        never_sampled=(0,),
    )


def _split(cfg: Config, vocab_size: int) -> Split:
    """Random documents of very unequal length."""
    rng = np.random.default_rng(cfg.seed)
    lengths = rng.integers(1, 2 * cfg.data.seq_len, 17)
    tokens = rng.integers(1, vocab_size, lengths.sum()).astype(np.uint32)
    starts = np.concatenate([[0], lengths.cumsum()])
    return Split("valid", tokens, starts, bytes=len(tokens), words=len(lengths), separator=0)


class _Planted(nnx.Module):
    """Stands for a model: a predictor's logits as hidden states, with an identity head."""

    def __init__(self, predict: Callable[[Any], Any], vocab_size: int):
        self.predict, self.vocab_size = predict, vocab_size

    def __call__(
        self, tokens_BT: Any, segment_ids_BT: Any, positions_BT: Any, dtype: Any
    ) -> jax.Array:
        return jnp.asarray(self.predict(tokens_BT), dtype)

    def head_VD(self) -> jax.Array:
        return jnp.eye(self.vocab_size)


def _evaluation(cfg: Config, vocab_size: int, store: Any) -> Callable[..., Any]:
    """The whole evaluation of a split by the run's own loop and step, of a planted predictor."""
    mesh = sharding.make_mesh(cfg.mesh)

    def evaluate(predict: Callable[[Any], Any], batch_size: int, stride: int = 0) -> Any:
        here = config.replace(
            cfg,
            eval__batch_size=batch_size,
            eval__stride=stride or cfg.data.seq_len,
            model__family="dense",  # nothing is observed of a planted one
            model__logit_softcap=0.0,
            train__compute_dtype="float32",  # as it knows its costs
            train__matmul_precision="float32",
        )
        graphdef = nnx.graphdef(_Planted(predict, vocab_size))
        return Evaluator(here, store, mesh, step.make_eval_step(here, graphdef, mesh))({}, "valid")

    return evaluate


def _batches(cfg: Config, split: Split) -> Callable[[int, int], Iterator[windows.Batch]]:
    """The batches of evaluation that one of some processes reads."""
    return lambda process, processes: windows.eval_batches(
        split,
        seq_len=cfg.data.seq_len,
        batch_size=PROCESSES,
        document_mask=cfg.data.document_mask,
        stride=min(cfg.eval.stride, cfg.data.seq_len),
        process_index=process,
        process_count=processes,
    )


def _sampler(
    logits: Any, seed: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> jax.Array:
    """The sampler of generation, with a key for each row."""
    keys = jax.random.split(jax.random.key(seed), len(logits))
    return _sample(logits, keys, temperature, top_k, top_p)


_sample = jax.jit(decode.sample, static_argnames=("top_k", "top_p"))
