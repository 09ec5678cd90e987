"""The code and options of a run at a size that takes seconds, examined."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lm_jax import config, optim, sharding, step
from lm_jax import loss as losses
from lm_jax.config import Config, ModelConfig
from lm_jax.data.references import references
from lm_jax.data.store import Store
from lm_jax.doctor import trees
from lm_jax.doctor.eval import examine_evaluation
from lm_jax.doctor.findings import Report
from lm_jax.doctor.gradient import examine_gradients, examine_kernel
from lm_jax.doctor.loss import examine_loss
from lm_jax.doctor.model import examine_model
from lm_jax.doctor.optimiser import examine_optimiser
from lm_jax.doctor.training import examine_training
from lm_jax.kernels import attention
from lm_jax.kernels.dropout import Draw
from lm_jax.models.families import choose_attention, create_model, family
from lm_jax.objective import NextToken, Summary
from lm_jax.preflight import evaluation

_TABLES = ("embedding", "position_embedding")  # drawn with `model.init_std` in every family


def _narrow(model: ModelConfig) -> dict[str, int]:
    """A dense model with few heads of the same kind and proportions."""
    group = model.heads // model.kv_heads
    heads = group * (1 if group > 1 else min(2, model.kv_heads))
    width = max(1, heads * model.d_model // model.heads)
    return {
        "model__heads": heads,
        "model__kv_heads": heads // group,
        "model__d_model": width,
        "model__d_ff": max(2, width * model.d_ff // model.d_model),
    }


class Small:
    """The code and options of a run at a size that takes seconds."""

    def __init__(self, cfg: Config, store: Store):
        """Cut the config down; everything that chooses code stays."""
        self.full, self.store = cfg, store
        self.rows = 6
        model = cfg.model
        self.drops = any((model.dropout, model.attention_dropout, model.embedding_dropout))
        self.cfg = config.replace(
            cfg,
            model__layers=2,
            **(_narrow(cfg.model) if cfg.model.family == "dense" else {}),
            data__seq_len=min(cfg.data.seq_len, 65),
            data__batch_size=self.rows,
            # A shorter schedule would end among the few updates that are examined.
            train__steps=max(int(cfg.train.steps), 10),
        )
        with jax.set_mesh(sharding.make_mesh(cfg.mesh)):  # the devices that share the rows
            micro_batches = min(sharding.accumulation(cfg), 2)
            self.loss_impl, _ = step.choose_loss(cfg, store.tokenizer.vocab_size)
        self.cfg.data.micro_batch = self.rows // micro_batches
        self.vocab_size = min(store.tokenizer.vocab_size, 500)
        self.attention_impl, _ = choose_attention(cfg)
        self.graphdef, self.init = create_model(self.cfg, self.vocab_size, self.attention_impl)
        self.cfg.loss.impl = self.loss_impl
        self.dtype = jnp.dtype(cfg.train.compute_dtype)
        self.family = family(cfg.model)

    @functools.cached_property
    def params(self) -> dict[str, Any]:
        """Fresh parameters by name, each layer's apart, so that checks can tell layers apart."""
        return optim.by_layer(jax.jit(self.init)(jax.random.key(self.cfg.seed)))

    @functools.cached_property
    def unused(self) -> list[str]:
        """Names of parameters that the model does not read."""
        return [name for name in self.params if name.endswith(self.family.unused)]

    @functools.cached_property
    def plain(self) -> Any:
        """The model with the plain attention."""
        return create_model(self.cfg, self.vocab_size, "reference")[0]

    def logits(
        self,
        params: Any,
        tokens_BT: Any,
        segment_ids_BT: Any,
        draw: Draw | None = None,
        graphdef: Any = None,
    ) -> jax.Array:
        """Logits of the model, as evaluation computes them, or of another of its kind."""
        model = nnx.merge(graphdef or self.graphdef, optim.stacked(params))
        ids = jnp.pad(jnp.asarray(segment_ids_BT), ((0, 0), (0, 1)))
        tokens = jnp.pad(jnp.asarray(tokens_BT), ((0, 0), (0, 1)))
        b = losses.shift({"tokens": tokens, "segment_ids": ids, "weights": tokens * 0.0})
        with jax.default_matmul_precision(self.cfg.train.matmul_precision):
            x_BTD = model(b.inputs, b.segment_ids, b.positions, dtype=self.dtype, draw=draw)
            return model.logits(x_BTD)

    def model(self, level: str = "fast") -> Report:
        """Causality, alignment and initialisation; at level full against the plain attention."""
        logits = jax.jit(self.logits)

        @jax.jit
        def plain(params: Any, tokens: Any) -> jax.Array:
            return self.logits(params, tokens, jnp.ones_like(tokens), graphdef=self.plain)

        cfg = self.cfg.model

        def of_update(params: Any, tokens: Any, update: Any) -> jax.Array:
            key = jax.random.fold_in(jax.random.key(self.cfg.seed + 1), update)
            return self.logits(params, tokens, jnp.ones_like(tokens), Draw(key))

        return examine_model(
            lambda params, tokens: logits(params, tokens, np.ones_like(tokens)),
            params=self.params,
            segmented=logits if self.cfg.data.document_mask else None,
            train_fn=jax.jit(of_update) if self.drops else None,
            reference=plain if level == "full" else None,
            init_std={name: cfg.init_std for name in self.params if name in _TABLES},
            vocab_size=self.vocab_size,
            seq_len=self.cfg.data.seq_len,
            token_table=self.params["embedding"],
            position_table=self.params.get("position_embedding"),
            tied=self.family.tied(cfg),
            compute_dtype=self.cfg.train.compute_dtype,
            seed=self.cfg.seed,
        )

    def loss(self) -> Report:
        """The loss of the run; a fused one gets logits as hidden states, with an identity head."""

        @jax.jit
        def sums(logits_BTV: Any, tokens_BT: Any, weights_BT: Any) -> tuple[Any, Any]:
            ids = jnp.ones_like(tokens_BT)
            b = losses.shift({"tokens": tokens_BT, "segment_ids": ids, "weights": weights_BT})
            head_VV = jnp.eye(logits_BTV.shape[-1], dtype=logits_BTV.dtype)
            with jax.default_matmul_precision("float32"):
                scored = losses.from_hidden(
                    logits_BTV[:, :-1], head_VV, b, softcap=0.0, impl=self.loss_impl
                )
            return scored.objective, scored.count

        return examine_loss(
            sums,
            vocab_size=min(self.vocab_size, 61),
            seq_len=self.full.data.seq_len,
            seed=self.cfg.seed,
        )

    def batch(self) -> dict[str, np.ndarray]:
        """Windows of random tokens whose rows hold unequal numbers of targets."""
        rng = np.random.default_rng(self.cfg.seed)
        shape = (self.rows, self.cfg.data.seq_len + 1)
        lengths = 2 + np.arange(self.rows) * shape[1] // self.rows
        weights = (np.arange(shape[1]) < lengths[:, None]).astype(np.float32)
        return {
            "tokens": rng.integers(1, self.vocab_size, shape).astype(np.int32),
            "segment_ids": np.ones(shape, np.int32),
            "weights": weights,
        }

    @functools.cached_property
    def train_step(self) -> Callable[[Any, Any], Any]:
        """One update of the run's own step, without dropout, so that it can be repeated."""
        still = config.replace(
            self.cfg, model__dropout=0.0, model__attention_dropout=0.0, model__embedding_dropout=0.0
        )
        steps = step.make_train_step(still, NextToken.of(still, self.graphdef))
        return lambda state, batch: steps(
            state, {k: jnp.asarray(v)[None] for k, v in batch.items()}
        )

    def optimiser(self, level: str = "fast") -> Report:
        """Updates, decay, accumulation, schedule and, at level full, clipping."""
        cfg, full = self.cfg.optim, self.full.optim
        batch, steps = self.batch(), int(self.cfg.train.steps)
        bad = {**batch, "weights": batch["weights"].copy()}
        bad["weights"][-1, 1] = np.inf

        def gradient(params: Any, batch: Any, micro_batches: int) -> Any:
            objective = NextToken.of(self.cfg, self.graphdef)
            found, _ = step.gradients(
                objective, optim.stacked(params), batch, accumulation=micro_batches, key=None
            )
            return optim.by_layer(found)

        @jax.jit
        def update(params: Any, grads: Any, state: step.TrainState, count: Any) -> Any:
            found = Summary(1, jnp.ones(()), jnp.ones(()))
            new, metrics = step.make_update(self.cfg)(state, optim.stacked(grads), found)
            return optim.by_layer(new.params), new, metrics

        return examine_optimiser(
            params=self.params,
            init_fn=jax.jit(lambda params: step.init_state(self.cfg, optim.stacked(params))),
            step_fn=self.train_step,
            update_fn=update if level == "full" else None,
            params_of=lambda state: optim.by_layer(state.params),
            updates_of=lambda state: state.step,
            batch=batch,
            empty_batch={**batch, "weights": 0 * batch["weights"]},
            bad_batch=bad,
            gradient_fn=jax.jit(gradient, static_argnums=2),
            micro_batches=(self.rows,),
            compute_dtype=self.cfg.train.compute_dtype,
            learning_rate=optim.learning_rate(full, steps),
            steps=steps,
            end_lr=full.peak_lr if full.schedule == "constant" else full.end_lr * full.peak_lr,
            weight_decay=cfg.weight_decay,
            decayed=optim.decayed(cfg, self.params),
            clip_norm=cfg.clip_norm,
            ema_of=(lambda state: optim.by_layer(state.ema)) if cfg.ema_decay else None,
            unused=self.unused,
            seed=self.cfg.seed,
        )

    def training(self) -> Report:
        """Short trainings on random tokens, which no model can predict."""
        evaluate_step = step.make_eval_step(self.cfg, self.graphdef)

        def window(tokens: Any) -> dict[str, Any]:
            tokens = np.asarray(tokens, np.int32)
            ones = np.ones_like(tokens)
            return {"tokens": tokens, "segment_ids": ones, "weights": ones.astype(np.float32)}

        def score(state: step.TrainState, tokens: Any) -> tuple[Any, Any]:
            sums = evaluate_step(state.params, window(tokens))
            return sums["nats"], sums["count"]

        return examine_training(
            jax.jit(lambda seed: step.init_state(self.cfg, self.init(jax.random.key(seed)))),
            lambda state, tokens: self.train_step(state, window(tokens)),
            score,
            vocab_size=self.vocab_size,
            seq_len=self.cfg.data.seq_len,
            batch_size=self.rows,
            params_of=lambda state: {
                n: x for n, x in optim.by_layer(state.params).items() if n not in self.unused
            },
            seed=self.cfg.seed,
        )

    def gradients(self) -> Report:
        """The gradient of the whole loss, in float64, which not every attention can compute."""
        of_run = NextToken.of(self.cfg, self.plain)
        exact = dataclasses.replace(of_run, dtype=jnp.dtype("float64"))
        batch = {name: jnp.asarray(x) for name, x in self.batch().items()}
        rng = np.random.default_rng(self.cfg.seed)
        params = jax.tree.map(lambda x: 0.3 * rng.standard_normal(x.shape), self.params)

        def mean_loss(params: Any) -> jax.Array:
            sums = exact.scored(optim.stacked(params), batch)
            return sums.objective / sums.count

        return examine_gradients(mean_loss, params, seed=self.cfg.seed, unused=self.unused)

    def attention(self) -> Report:
        """The attention of the run against the plain one, at lengths around those of blocks."""
        queries, keys, width = self.family.heads(self.cfg.model)
        window = self.cfg.model.window or None

        def make(length: int, rng: np.random.Generator) -> tuple[jax.Array, ...]:
            shapes = [(1, length, heads, width) for heads in (queries, keys, keys)]
            return tuple(jnp.asarray(rng.standard_normal(shape), self.dtype) for shape in shapes)

        return examine_kernel(
            functools.partial(attention.attend, impl=self.attention_impl, window=window),
            functools.partial(attention.attend, impl="reference", window=window),
            make,
            sizes=sorted({min(size, self.full.data.seq_len) for size in (1, 127, 128, 129, 513)}),
            seed=self.cfg.seed,
        )

    def evaluation(self) -> Report:
        """Evaluation, generation and sampler, with parameters at random so that no zero hides."""
        cfg, slots = self.cfg, self.cfg.data.seq_len
        by_layer = trees.randomise(self.params, cfg.seed)
        params = optim.stacked(by_layer)
        empty_cache = nnx.merge(self.graphdef, params).empty_cache

        @jax.jit
        def extend(tokens_BT: Any, cache: Any) -> tuple[jax.Array, Any]:
            model = nnx.merge(self.graphdef, params)
            with jax.default_matmul_precision(cfg.train.matmul_precision):
                x_BTD, cache = model.extend(tokens_BT, cache, dtype=self.dtype)
                return model.logits(x_BTD), cache

        @jax.jit
        def train_logits(tokens_BT: Any, seed: Any) -> jax.Array:
            return self.logits(by_layer, tokens_BT, tokens_BT * 0 + 1, Draw(jax.random.key(seed)))

        return examine_evaluation(
            vocab_size=self.vocab_size,
            seq_len=slots,
            compute_dtype=cfg.train.compute_dtype,
            logits_fn=jax.jit(lambda tokens: self.logits(by_layer, tokens, tokens * 0 + 1)),
            train_logits_fn=train_logits if self.drops else None,
            extend_fn=lambda tokens, cache: extend(
                tokens, cache or empty_cache(len(tokens), slots, self.dtype)
            ),
            references=references(self.store, "valid"),
            seed=cfg.seed,
            **evaluation.facts(cfg, self.vocab_size, self.graphdef, params),
        )
