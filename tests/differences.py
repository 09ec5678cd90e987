"""Gradients against central differences in float64."""

import jax
import numpy as np
from jax.test_util import check_grads


def directional_error(f, x, seed, eps):
    """|<grad, v> - central difference| over |<grad, v>| for a random unit direction v.

    Where v happens to be nearly orthogonal to the gradient, its typical |<grad, v>| counts, which
    is |grad| / sqrt(n) in n dimensions.
    """
    leaves, tree = jax.tree.flatten(x)
    rng = np.random.default_rng(seed)
    v = [rng.normal(size=leaf.shape) for leaf in leaves]
    length = np.sqrt(sum((d**2).sum() for d in v))
    v = [d / length for d in v]

    def along(t):
        moved = [np.asarray(a) + t * d for a, d in zip(leaves, v, strict=True)]
        return float(f(jax.tree.unflatten(tree, moved)))

    grad = [np.asarray(g) for g in jax.tree.leaves(jax.grad(f)(x))]
    dot = sum((g * d).sum() for g, d in zip(grad, v, strict=True))
    typical = np.sqrt(sum((g**2).sum() for g in grad) / sum(leaf.size for leaf in leaves))
    return abs(dot - (along(eps) - along(-eps)) / (2 * eps)) / max(abs(dot), typical)


def check_gradient(f, x):
    """Five directions, an eps sweep with its V, every coordinate, and JAX's own check."""
    f = jax.jit(f)
    assert ":f32[" not in str(jax.make_jaxpr(f)(x)), "computes in float32 somewhere"
    for seed in range(5):
        assert directional_error(f, x, seed, 1e-6) < 1e-6
    errors = [directional_error(f, x, 0, eps) for eps in (1e-1, 1e-6, 1e-13)]
    assert errors[1] < errors[0] and errors[1] < errors[2], f"no V over eps: {errors}"
    grad = jax.grad(f)(x)
    leaves, tree = jax.tree.flatten(x)
    for i, leaf in enumerate(leaves):
        flat = np.asarray(leaf).ravel()
        for j in np.random.default_rng(i).permutation(flat.size)[:64]:
            values = []
            for sign in (1, -1):
                moved = flat.copy()
                moved[j] += sign * 1e-5
                values.append(
                    f(
                        jax.tree.unflatten(
                            tree, [*leaves[:i], moved.reshape(leaf.shape), *leaves[i + 1 :]]
                        )
                    )
                )
            expected = (values[0] - values[1]) / 2e-5
            actual = np.asarray(jax.tree.leaves(grad)[i]).ravel()[j]
            np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-7)
    check_grads(f, (x,), order=1, modes=["rev"], atol=1e-7, rtol=1e-7, eps=1e-6)
