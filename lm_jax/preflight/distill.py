"""The preflight of a distillation: the run's own teacher and windows, its step at a small size."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lm_jax import config, sharding, step
from lm_jax import loss as losses
from lm_jax.config import Config
from lm_jax.data import windows as pipeline
from lm_jax.data.references import references
from lm_jax.data.store import Store
from lm_jax.distill import objective, teachers
from lm_jax.distill.alignment import BYTES
from lm_jax.distill.objective import distilled
from lm_jax.distill.opening import open_teacher
from lm_jax.doctor.distill import examine_distillation
from lm_jax.doctor.findings import Report
from lm_jax.kernels import divergences
from lm_jax.kernels.linear_divergence import Member, linear_divergence
from lm_jax.models.families import choose_attention, create_model

ROWS, CALLS = 4, 3
LOGITS = 2**27  # of a batch; with more there are fewer rows


def examine_teaching(cfg: Config, small: Config, store: Store) -> Report:
    """All checks of a distillation.

    Args:
        cfg: resolved config of the run.
        small: the same with a small student.
        store: the tokenised corpus.

    Raises:
        ConfigError: if the teacher cannot teach this student.
    """
    return _Preflight(cfg, small, store).report()


def _as_text(batch: dict[str, np.ndarray], teacher: teachers.Teacher) -> dict[str, np.ndarray]:
    """The batch in bytes, for a teacher with another tokenizer: what it teaches are next bytes.

    `tokens` becomes the first byte of each token, and what is not aligned is not scored;
    `student_tokens` and `student_weights` keep what the step reads.
    """
    assert teacher.first_bytes is not None
    aligned = np.pad(batch["aligned"], ((0, 0), (1, 0)))
    return batch | {
        "student_tokens": batch["tokens"],
        "student_weights": batch["weights"],
        "tokens": teacher.first_bytes[0][batch["tokens"]],
        "weights": batch["weights"] * aligned,
    }


def _spread(kept: divergences.Kept, vocab_size: int) -> jax.Array:
    """Log-probabilities [B, T, V] of what was kept, the rest shared by all other ids."""
    others = max(1, vocab_size - kept.ids_BTk.shape[-1])
    rest_BT1 = kept.log_p_BTj[..., -1:] - jnp.log(others)
    z_BTV = jnp.broadcast_to(rest_BT1, (*rest_BT1.shape[:2], vocab_size))
    kept_BTk = kept.log_p_BTj[..., :-1]
    return jnp.put_along_axis(z_BTV, kept.ids_BTk, kept_BTk, -1, inplace=False)


class _Preflight:
    def __init__(self, cfg: Config, small: Config, store: Store):
        self.cfg, self.store = cfg, store
        logits = ROWS * cfg.data.seq_len * store.tokenizer.vocab_size
        rows = ROWS if logits <= LOGITS or jax.device_count() > 2 else 2
        self.small = config.replace(
            small,
            data__seq_len=cfg.data.seq_len,
            data__batch_size=rows,
            model__dropout=0.0,
            model__attention_dropout=0.0,
            model__embedding_dropout=0.0,
            # As many of the small student's as there are.
            distill__attention_layers="0,-1" if "," in cfg.distill.attention_layers else "-1",
        )
        self.teacher = open_teacher(cfg, store)
        self.dtype = jnp.dtype(cfg.train.compute_dtype)
        impl, _ = choose_attention(cfg)
        self.graphdef, self.init = create_model(self.small, store.tokenizer.vocab_size, impl)
        self.objective = distilled(self.small, self.graphdef, self.init, self.teacher)
        windows = pipeline.train_batches(
            store.split("train"),
            seq_len=cfg.data.seq_len,
            batch_size=rows,
            document_mask=cfg.data.document_mask,
            seed=cfg.seed,
            calls=[range(1)],
            movable=cfg.data.window_offset,
            threads=0,
            extend=self.teacher.extend,
        )
        self.batch = {name: np.asarray(x[0]) for name, x in next(windows).items()}
        self.aligned = self.teacher.first_bytes is not None
        self.shown = _as_text(self.batch, self.teacher) if self.aligned else self.batch

    @property
    def taught(self) -> Any:
        """The source of the targets: the teacher's parameters, or the cached distributions."""
        return self.teacher.params if self.teacher.models else (self.batch["kept_log_p"],)

    def rows(self, batch: dict[str, Any], taught: Any) -> tuple[losses.Batch, Any]:
        """Batch and teacher parameters as the step takes them."""
        if self.aligned:
            own = {name: batch[f"student_{name}"] for name in ("tokens", "weights")}
            return {**batch, **own}, taught
        if self.teacher.models:
            return batch, taught
        return {**batch, "kept_log_p": taught[0]}, ()

    @functools.cached_property
    def targets(self) -> Any:
        """`(taught, batch) -> logits [B, T + 1, V]` as the step reads the teacher.

        Of one with another tokenizer they are about the next byte, 0 where nothing is aligned.
        """

        @jax.jit
        def logits(taught: Any, batch: losses.Batch) -> jax.Array:
            rows, params = self.rows(batch, taught)
            b = losses.shift(rows)
            reading = self.teacher.read(params, rows, b, self.dtype, inside=False)
            if reading.kept is None:
                z_BTV = teachers.members_log_p(reading.members)
            else:
                z_BTV = _spread(reading.kept, self.store.tokenizer.vocab_size)
            if reading.groups is not None:
                group, aligned_BT = reading.groups.teacher_U, reading.groups.aligned_BT
                z_BTV = jax.vmap(divergences.grouped, (0, None, None))(z_BTV, group, BYTES)
                z_BTV = jnp.maximum(z_BTV, -50)  # what is excluded would hide every difference
                z_BTV = jnp.where(aligned_BT[..., None] > 0, z_BTV, 0)
            return jnp.pad(z_BTV, ((0, 0), (0, 1), (0, 0)))

        return logits

    def other_suffix(self, batch: Any, cut: int) -> dict[str, Any]:
        """The batch with other text, after a word that ends at token `cut` or later.

        Inside a word the teacher's tokens before it would change as well: where one ends depends on
        what follows, in the student's own tokens no less. A state from less than a word later may
        so go unseen.
        """
        tokens = np.array(batch["student_tokens"])
        changed = tokens.copy()
        for row, source in enumerate(np.roll(tokens, 1, axis=0)):
            a, b = self._word(tokens[row], cut), self._word(source, cut)
            if a is not None and b is not None:
                length = len(source) - max(a, b)
                changed[row, a : a + length] = source[b : b + length]
        own = {"tokens": changed, "weights": np.array(batch["student_weights"])}
        rows = own | {"segment_ids": np.array(batch["segment_ids"])}
        return _as_text(self.teacher.extend(rows), self.teacher)

    def _word(self, tokens_T: np.ndarray, cut: int) -> int | None:
        """The first token from `cut` on that begins with the space between two words."""
        pieces = self.store.tokenizer.token_bytes(tokens_T)
        for at in range(max(1, cut), len(pieces) - 1):
            ahead = (pieces[at] + pieces[at + 1])[:2]
            if ahead[:1] == b" " and ahead[1:].strip() and pieces[at - 1][-1:].strip():
                return at
        return None

    def alone(self, params: Any, tokens: jax.Array) -> jax.Array:
        """The teacher by itself on the batch's tokens, [B, T + 1, V]; the last logits are 0."""
        b = losses.shift(stripped(self.batch) | {"tokens": tokens})
        logits = []
        for graphdef, leaves in zip(self.teacher.models, params, strict=True):
            model = nnx.merge(graphdef, leaves)
            x_BTE = model(b.inputs, b.segment_ids, b.positions, dtype=self.dtype)
            logits.append(model.logits(x_BTE))
        z_BTV = divergences.mean_log_p(logits, 1.0)
        return jnp.pad(z_BTV, ((0, 0), (0, 1), (0, 0)))

    def shared(self, params: Any, taught: Any, batch: losses.Batch, alpha: Any) -> Any:
        """Divergence and cross-entropy alone, shared by alpha."""
        rows, teacher_params = self.rows(batch, taught)
        names = objective.used(self.small)
        now = objective.schedule(self.small, 0)
        now |= {name: jnp.zeros(()) for name in names} | {"kd": alpha, "lm": 1 - alpha}
        plan = self.objective.plan(rows, 0)._replace(now=now)
        total, sums = self.objective.sums(params, rows, plan, None, teacher_params)
        counts = plan.counts
        parts = {"kd_kl_t2": sums["kd"] / counts["kd"], "lm_ce": sums["lm"] / counts["lm"]}
        return total, parts

    def whole(self, params: Any, taught: Any, batch: losses.Batch) -> Any:
        """Every used term with the weight 1."""
        rows, teacher_params = self.rows(batch, taught)
        names = objective.used(self.small)
        now = objective.schedule(self.small, 0) | dict.fromkeys(names, jnp.ones(()))
        plan = self.objective.plan(rows, 0)._replace(now=now)
        return self.objective.sums(params, rows, plan, None, teacher_params)[0]

    def kd_fn(self, student, teacher, weights, temperature, top_k=0, support="full"):
        """The run's divergence of logits, through heads that copy."""
        head = jnp.eye(student.shape[-1], dtype=student.dtype)
        found = linear_divergence(
            student,
            head,
            [Member(teacher, head)],
            weights,
            kind=self.cfg.distill.kind,  # type: ignore[arg-type]
            beta=self.cfg.distill.beta,
            temperature=temperature,
            support=support,
            top_k=top_k,
        )
        return found.objective, found.count

    def report(self) -> Report:
        """Call the checks."""
        with jax.default_matmul_precision(self.cfg.train.matmul_precision):
            return self._report()

    def _report(self) -> Report:
        d, cfg = self.cfg.distill, self.small
        init_state = jax.jit(
            lambda key: step.init_state(cfg, self.init(key), self.objective.beside(key))
        )
        steps = step.make_train_step(cfg, self.objective)
        stacked = jax.tree.map(lambda x: jnp.asarray(x)[None], self.batch)
        records = []

        def step_fn(state: step.TrainState, batch: Any) -> step.TrainState:
            at = int(state.step)
            state, values = steps(state, stacked, self.objective.reads)
            records.append({n: float(x[0]) for n, x in values.items()} | {"step": at + 1})
            return state

        trained = init_state(jax.random.key(cfg.seed))
        for begin in (0, int(cfg.train.steps) // 2):  # weights that stay at first may move later
            trained = trained._replace(step=jnp.full_like(trained.step, begin))
            for _ in range(CALLS):
                trained = step_fn(trained, None)
        evaluate_step = step.make_eval_step(cfg, self.graphdef)

        def eval_fn(params: Any, taught: Any, batch: Any, update: int) -> dict[str, Any]:
            rows, _ = self.rows(batch, taught)
            found = evaluate_step(self.student(params), stripped(rows))
            return {name: found[name] for name in ("nats", "count", "correct")}

        with jax.set_mesh(sharding.make_mesh(self.cfg.mesh)):  # the devices that share the rows
            candidates = self.cfg.data.batch_size // sharding.accumulation(self.cfg)
        return examine_distillation(
            **self.head_to_head(),
            kd_fn=jax.jit(self.kd_fn),
            kind=d.kind,
            beta=d.beta,
            topk_union=d.support == "union",
            teacher_params=self.taught,
            batch={name: jnp.asarray(x) for name, x in self.shown.items()},
            compute_dtype=cfg.train.compute_dtype,
            student_params=init_state(jax.random.key(cfg.seed)).trained,
            objective_fn=jax.jit(self.shared),
            whole_fn=None if self.objective.auxiliary is None else jax.jit(self.whole),
            eval_fn=eval_fn,
            init_fn=lambda seed: init_state(jax.random.key(seed)),
            step_fn=step_fn,
            student_of=lambda state: state.params,
            teacher_of=lambda state: self.taught,
            calls=CALLS,
            records=records,
            weights_fn=lambda update: {
                objective.LOGGED_AS.get(name, name): float(value)
                for name, value in objective.schedule(cfg, update).items()
            },
            steps=int(cfg.train.steps),
            contrastive_candidates=None if d.contrastive.zero else candidates,
            seed=cfg.seed,
        )

    def head_to_head(self) -> dict[str, Any]:
        """Arguments for the checks that hold the targets against the teacher."""
        found: dict[str, Any] = {}
        if self.aligned:
            found |= {"targets_fn": self.targets, "suffix_fn": self.other_suffix}
        else:
            unigram = references(self.store, "valid")["unigram"]
            found |= {"unigram_nats": float(np.log(unigram)), "targets_fn": self.targets}
            if self.teacher.models:
                found["teacher_fn"] = jax.jit(self.alone)
        support = self.cfg.distill.support
        if support != "full":
            kept = functools.partial(self.kd_fn, support=support)
            found["topk_fn"] = jax.jit(kept, static_argnums=4)
        return found

    def student(self, params: Any) -> Any:
        """The model's part of `TrainState.trained`."""
        return params if self.objective.auxiliary is None else params[0]


def stripped(batch: Any) -> losses.Batch:
    """A batch without what a teacher added."""
    return {name: batch[name] for name in ("tokens", "segment_ids", "weights")}
