"""What the temperature does to the size of the divergence and of its gradient, in numbers.

A published account of a failed distillation held that the divergence does not depend on the
temperature, that multiplying it by T^2 makes gradients T^2 times as large, and that a lower
temperature makes the loss smaller. All three are wrong.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm_jax.kernels.linear_divergence import Member, linear_divergence

V, TOKENS = 512, 200
TEMPERATURES = (1.0, 1.5, 2.0, 3.0, 4.0, 8.0)


# As the README shows them: divergence, that times T^2, norm of the gradient of the latter.
SHOWN = {
    1.0: (3.82, 3.82, 0.287),
    1.5: (1.76, 3.97, 0.196),
    2.0: (1.00, 4.00, 0.162),
    3.0: (0.446, 4.01, 0.140),
    4.0: (0.251, 4.02, 0.133),
    8.0: (0.063, 4.02, 0.127),
}


@pytest.fixture(scope="module")
def measured():
    """For each temperature: divergence, that times T^2, norm of the gradient of the latter."""
    rng = np.random.default_rng(0)
    student, teacher = (jnp.asarray(rng.normal(0, 2, (1, TOKENS, V)), "float32") for _ in range(2))
    head, weights = jnp.eye(V), jnp.full((1, TOKENS), 1 / TOKENS)

    def loss(student, temperature):
        found = linear_divergence(
            student, head, [Member(teacher, head)], weights, kind="forward", temperature=temperature
        )
        return found.objective, found.divergence

    rows = {}
    for temperature in TEMPERATURES:
        (scaled, raw), grad = jax.value_and_grad(loss, has_aux=True)(student, temperature)
        # Per token, of which each has a weight of 1 / TOKENS.
        norm = float(jnp.linalg.norm(TOKENS * grad, axis=-1).mean())
        rows[temperature] = float(raw), float(scaled), norm
    difference = np.float64(teacher - student)
    return rows, 0.5 * difference.var(-1).mean()


def test_the_figures_of_the_readme(measured):
    for temperature, shown in SHOWN.items():
        np.testing.assert_allclose(measured[0][temperature], shown, rtol=5e-3)


def test_the_divergence_falls_as_the_square_of_the_temperature(measured):
    raw = {t: row[0] for t, row in measured[0].items()}
    for t in TEMPERATURES[1:]:
        np.testing.assert_allclose(raw[1.0] / raw[t], t**2, rtol=0.06)


def test_times_its_square_it_hardly_depends_on_the_temperature(measured):
    rows, limit = measured
    scaled = [row[1] for row in rows.values()]
    assert max(scaled) / min(scaled) < 1.06
    np.testing.assert_allclose(scaled[-1], limit, rtol=0.01)  # half the variance of the difference


def test_its_gradient_falls_with_the_temperature_and_tends_to_a_limit(measured):
    rows, limit = measured
    norms = [row[2] for row in rows.values()]
    assert norms == sorted(norms, reverse=True)
    assert norms[0] / norms[3] > 2  # from T = 1 to 3, where nine times as large was claimed
    at = {t: row[2] for t, row in rows.items()}
    assert abs(at[8.0] / at[2.0] - 1) <= 0.3
    np.testing.assert_allclose(at[8.0], np.sqrt(2 * limit / V), rtol=0.1)
    # Without T^2 it would shrink to a twentieth.
    assert (at[2.0] / 4) / (at[8.0] / 64) > 16
