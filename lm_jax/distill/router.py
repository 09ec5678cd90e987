"""The student-aware router: which of the teacher's experts a student token learns from."""

import jax
import jax.numpy as jnp
from flax import nnx

from lm_jax import collectives
from lm_jax.distill import terms
from lm_jax.kernels.attention import attend
from lm_jax.models.layers import Linear

HEADS = 4
SHARES = (0.4, 0.3, 0.3)  # of capacity, gap and expert scores


def projection(inputs: int, outputs: int, rngs: nnx.Rngs) -> Linear:
    """A linear map without bias that keeps the mean square."""
    return Linear(inputs, outputs, inputs**-0.5, False, rngs)


def choices(
    scores_BTX: jax.Array, temperature: jax.Array, k: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Probabilities of the experts X, and the same of the k most likely renormalised, else 0.

    The temperature divides the scores; k is a whole number, which may be traced.
    """
    all_BTX = jax.nn.softmax(scores_BTX / temperature)
    rank_BTX = jnp.argsort(jnp.argsort(-all_BTX, axis=-1), axis=-1)
    chosen_BTX = jnp.where(rank_BTX < k, all_BTX, 0)
    return all_BTX, chosen_BTX / chosen_BTX.sum(-1, keepdims=True)


def balance_experts(all_BTX: jax.Array, weights_BT: jax.Array) -> jax.Array:
    """KL(uniform || mean use of the experts by all rows) times the number of tokens of these."""
    used_X = jnp.einsum("bt,btx->x", weights_BT, all_BTX)
    used_X, count = collectives.total((used_X, weights_BT.sum()))
    mean_X = used_X / jnp.maximum(count, 1)
    # Without a token there is nothing to balance.
    log_X = jnp.log(jnp.where(count > 0, mean_X, 1 / mean_X.size))
    return -(jnp.log(mean_X.size) + log_X.mean()) * weights_BT.sum()


class Router(nnx.Module):
    """r = softmax((0.4 capacity(s) + 0.3 gap([s; P t]) + 0.3 expert(t)) / temperature).

    s and t are the final states of student and teacher. With the k most likely experts the routed
    target is sum_x r_x expert_x. The experts are states of the teacher (here of evenly spaced
    layers) and get no gradient; the router does, so it also learns which experts are easy to match,
    which the balance term holds in check.
    """

    def __init__(
        self, width: int, teacher_width: int, expert_width: int, experts: int, rngs: nnx.Rngs
    ):
        """Draw all maps from the stream "params"; the widths are D of s, of t, and E of experts."""
        self.capacity = projection(width, experts, rngs)
        self.narrow = projection(teacher_width, width, rngs)
        self.gap = projection(2 * width, experts, rngs)
        self.expert = projection(teacher_width, experts, rngs)
        self.project = projection(width, expert_width, rngs)
        self.compressed = HEADS * -(-width // HEADS)
        self.query = projection(width, self.compressed, rngs)
        self.out = projection(self.compressed, self.compressed, rngs)

    def scores(self, x_BTD: jax.Array, teacher_BTE: jax.Array) -> jax.Array:
        """One score for each expert, [B, T, X]."""
        both = jnp.concatenate([x_BTD, self.narrow(teacher_BTE)], axis=-1)
        parts = self.capacity(x_BTD), self.gap(both), self.expert(teacher_BTE)
        shares_X = jnp.array(SHARES, x_BTD.dtype)
        return jnp.tensordot(shares_X, jnp.stack(parts), 1)

    def __call__(
        self,
        x_BTD: jax.Array,
        teacher_BTE: jax.Array,
        experts_XBTE: jax.Array,
        segment_ids_BT: jax.Array,
        weights_BT: jax.Array,
        *,
        temperature: jax.Array,
        k: jax.Array,
    ) -> dict[str, jax.Array]:
        """The three terms by name.

        routed_feature: squared error of the projected student against the routed target.
        routed_attention: with c the routed target compressed to the student's width by a fixed
        random matrix, squared error of attention from s_t to the c of the positions before t
        against c_t. No c gets a gradient: a target that is trained would move to where it is easy
        to hit. A position never reads its own c, which would be copied.
        router_balance: see `balance_experts`.
        """
        x_BTD = x_BTD.astype(jnp.float32)
        teacher_BTE = terms.normalised(teacher_BTE)
        all_BTX, chosen_BTX = choices(self.scores(x_BTD, teacher_BTE), temperature, k)
        routed_BTE = jnp.einsum("btx,xbte->bte", chosen_BTX, terms.normalised(experts_XBTE))
        feature = terms.squared_error(self.project(x_BTD), routed_BTE, weights_BT)

        E = routed_BTE.shape[-1]
        fixed_EF = E**-0.5 * jax.random.normal(jax.random.key(0), (E, self.compressed))
        c_BTF = jax.lax.stop_gradient(routed_BTE) @ fixed_EF
        # Position t asks, in the row moved by one, for what is before t.
        B, T, F = c_BTF.shape
        c_BTHC = c_BTF[:, :-1].reshape(B, T - 1, HEADS, F // HEADS)
        q_BTHC = self.query(x_BTD)[:, 1:].reshape(c_BTHC.shape)
        before_BTF = attend(
            q_BTHC, c_BTHC, c_BTHC, impl="reference", segment_ids_BT=segment_ids_BT[:, :-1]
        ).reshape(B, T - 1, F)
        same_BT = segment_ids_BT[:, 1:] == segment_ids_BT[:, :-1]
        attention = terms.squared_error(
            self.out(before_BTF), terms.normalised(c_BTF[:, 1:]), weights_BT[:, 1:] * same_BT
        )
        return {
            "routed_feature": feature,
            "routed_attention": attention,
            "router_balance": balance_experts(all_BTX, weights_BT),
        }
