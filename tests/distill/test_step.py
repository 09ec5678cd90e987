"""The objective and the step of a distillation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lm_jax import config, step
from lm_jax import loss as losses
from lm_jax.config import ConfigError, Curve, rules
from lm_jax.distill import objective, terms
from lm_jax.distill.objective import distilled
from lm_jax.distill.teachers import Teacher
from lm_jax.models.families import create_model
from lm_jax.objective import NextToken
from tests.distill.toys import EVERYTHING, V, toy_teacher
from tests.helpers import equations, random_batch, randomise, thirds, tiny_config

STEPS = 11


def student_config(**changes):
    base = dict(distill__teachers="toy", distill__temperature="3@0, 2@1", train__steps=str(STEPS))
    return tiny_config(**base | changes)


class Lab:
    """A distillation step and what it needs."""

    def __init__(self, teacher=None, **changes):
        self.cfg = student_config(**changes)
        self.teacher = teacher or toy_teacher()
        self.graphdef, init = create_model(self.cfg, V, "reference")
        self.objective = distilled(self.cfg, self.graphdef, init, self.teacher)
        self.params = randomise(jax.eval_shape(init, jax.random.key(0)), 1)
        self.beside = jax.jit(self.objective.beside)(jax.random.key(1))
        self.batch = random_batch(np.random.default_rng(0), (6, 12), V, padded=2)
        self.of_update = jax.jit(step.make_gradients(self.cfg, self.objective))

        init_state = functools.partial(step.init_state, self.cfg)
        self.copies = jax.jit(lambda *own: jax.tree.map(jnp.copy, init_state(*own)))

    @property
    def state(self):
        """Fresh copies, since the step takes them over."""
        return self.copies(self.params, self.beside)

    def gradients(self, update=0, batch=None):
        batch = self.batch if batch is None else batch
        grads, found = self.of_update(self.state.trained, update, jnp.asarray(1.0), batch)
        return found.nats, found.count, grads, found.metrics

    def steps(self, count):
        """States and metrics after each of some updates."""
        make = step.make_train_step(self.cfg, self.objective)
        stacked = jax.tree.map(lambda x: jnp.asarray(x)[None], self.batch)
        state, rows = self.state, []
        for _ in range(count):
            state, values = make(state, stacked, self.objective.reads)
            rows.append({name: float(x[0]) for name, x in values.items()})
        return state, rows


@functools.cache
def everything():
    """A step with every term, for tests that change nothing of it."""
    return Lab(**EVERYTHING)


def close(a, b, **tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, **tolerance)


def test_without_a_divergence_it_is_the_plain_step():
    lab = Lab(distill__kd="0@0.5, 1@1", distill__lm="1")
    nats, count, grads, _ = lab.gradients()
    plain = step.make_gradients(lab.cfg, NextToken.of(lab.cfg, lab.graphdef))
    expected, found = jax.jit(plain)(lab.params, 0, jnp.asarray(1.0), lab.batch)
    close((nats, count, grads), (found.nats, found.count, expected), rtol=2e-4, atol=1e-6)


def test_without_cross_entropy_the_next_token_plays_no_part():
    lab = Lab(distill__kd="1", distill__lm="0")
    grads = lab.gradients()[2]
    # Other targets in the last scored column only: the model reads that column nowhere.
    batch = {**lab.batch, "tokens": lab.batch["tokens"].copy()}
    last = lab.batch["weights"].shape[1] - 3
    batch["tokens"][:, last] = (batch["tokens"][:, last] + 5) % (V - 1) + 1
    batch["weights"] = batch["weights"].copy()
    batch["weights"][:, last + 1 :] = 0
    before = {**lab.batch, "weights": batch["weights"]}
    close(lab.gradients(batch=before)[2], lab.gradients(batch=batch)[2], rtol=0, atol=0)
    assert any(np.any(g) for g in jax.tree.leaves(grads))


def test_equals_have_no_divergence():
    teacher = toy_teacher(same=True)
    lab = Lab(teacher)
    lab.params = teacher.params[0]
    _, _, _, row = lab.gradients()
    assert abs(row["distill/kd_kl"]) < 1e-6
    assert Lab().gradients()[3]["distill/kd_kl"] > 0.01


def test_a_row_without_a_token_is_no_candidate():
    lab = Lab(distill__contrastive="1")
    weights = lab.batch["weights"].copy()
    weights[4] = 0
    counts = lab.objective.plan({**lab.batch, "weights": weights}, 0).counts
    assert counts["contrastive"] == len(weights) - 1
    assert counts["kd"] == weights[:, 1:].sum()


@pytest.mark.parametrize("update", [0, 5, STEPS - 1])
def test_weighted_terms_add_up_and_have_their_names(update):
    lab = everything()
    row = {name: float(x) for name, x in lab.gradients(update)[3].items()}
    weighted = {n: x for n, x in row.items() if n.startswith("distill/weighted/")}
    names = "kd_kl_t2 lm_ce feature layer attention contrastive".split() + list(objective.ROUTED)
    assert sorted(weighted) == sorted(f"distill/weighted/{name}" for name in names)
    np.testing.assert_allclose(sum(weighted.values()), row["distill/objective"], rtol=1e-5)
    now = objective.schedule(lab.cfg, update)
    for field, name in {"kd": "kd_kl_t2", "lm": "lm_ce"}.items():
        assert row[f"distill/weighted/{name}"] == pytest.approx(now[field] * row[f"distill/{name}"])
    scaled = row["distill/temperature"] ** 2 * row["distill/kd_kl"]
    assert row["distill/kd_kl_t2"] == pytest.approx(scaled, rel=1e-6)
    layer = {0: 0.0, 5: 0.3, STEPS - 1: 0.4}[update]
    expected = layer * row["distill/layer"]
    assert row["distill/weighted/layer"] == pytest.approx(expected, rel=1e-5, abs=1e-9)
    assert row["distill/contrastive_chance"] == pytest.approx(np.log(6))


def test_each_term_reads_its_layers_and_is_divided_by_its_own_count():
    lab = everything()
    row = {name.removeprefix("distill/"): x for name, x in lab.gradients(5)[3].items()}
    b = losses.shift(jax.tree.map(jnp.asarray, lab.batch))
    read = b.inputs, b.segment_ids, b.positions
    x_BTD, mine = nnx.merge(lab.graphdef, lab.params).observed(*read)
    x_BTE, theirs = nnx.merge(lab.teacher.models[0], lab.teacher.params[0]).observed(*read)
    aux = nnx.merge(lab.objective.auxiliary, lab.beside)
    weights = np.asarray(b.weights)

    def distance(y, target):
        target = np.float64(target) / np.sqrt(np.square(target).mean(-1, keepdims=True) + 1e-6)
        return np.square(y - target).mean(-1)

    def divergence(layer, teacher_layer):
        student_BTS, teacher_BTS = (
            np.float64(terms.log_map(seen.q_LBTHC[i], seen.k_LBTKC[i], b.segment_ids))
            for seen, i in ((mine, layer), (theirs, teacher_layer))
        )
        return (np.exp(teacher_BTS) * (teacher_BTS - student_BTS)).sum(-1)

    def mean(x_BT, weights=weights):
        return (weights * x_BT).sum() / weights.sum()

    # Two layers of the student, three of the teacher: half way is the second of them.
    pairs = [(0, 1), (1, 2)]
    states = [distance(aux.layers[i](mine.x_LBTD[i]), theirs.x_LBTD[j]) for i, j in pairs]
    assert row["feature"] == pytest.approx(mean(distance(aux.feature(x_BTD), x_BTE)), rel=1e-4)
    assert row["layer"] == pytest.approx(np.mean([mean(x) for x in states]), rel=1e-4)
    maps = [mean(divergence(i, j)) for i, j in pairs]
    assert row["attention"] == pytest.approx(np.mean(maps), rel=1e-4)
    now = objective.schedule(lab.cfg, 5)
    routed = aux.router(
        x_BTD,
        x_BTE,
        theirs.x_LBTD,  # as many experts as layers
        b.segment_ids,
        b.weights,
        temperature=now["router_temperature"],
        k=now["router_k"],
    )
    same = np.asarray(b.segment_ids[:, 1:] == b.segment_ids[:, :-1])
    counts = weights.sum(), (weights[:, 1:] * same).sum(), weights.sum()
    for (name, total), count in zip(routed.items(), counts, strict=True):
        assert row[name] == pytest.approx(float(total) / count, rel=1e-4), name


@pytest.mark.parametrize("warmup", thirds(["2", "8"]))
def test_projections_learn_on_the_schedule_of_the_student(warmup):
    lab = Lab(distill__feature="1", distill__lr=3e-3, optim__warmup=warmup)
    before = np.array(lab.beside["feature"]["kernel"])
    state, rows = lab.steps(1)
    moved = np.abs(state.beside["feature"]["kernel"] - before).max()
    share = rows[0]["optim/lr"] / lab.cfg.optim.peak_lr
    assert share == pytest.approx(1 / int(warmup))
    assert moved == pytest.approx(3e-3 * share, rel=1e-2)  # the first step of Adam is its rate


def test_micro_batches_add_up():
    # Rows contrast, and experts are balanced, inside a micro-batch: these two terms may differ.
    changes = EVERYTHING | {"distill__contrastive": "0", "distill__router_balance": "0"}
    whole, parts = (Lab(**changes, data__micro_batch=n).gradients(5) for n in (6, 2))
    close(whole[:3], parts[:3], rtol=2e-4, atol=1e-6)
    close(whole[3], parts[3], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_objective_is_what_is_differentiated():
    # The target of routed_attention moves with the router, and by design passes no gradient on.
    lab = Lab(**EVERYTHING | {"distill__routed_attention": "0"})
    make = step.make_gradients(lab.cfg, lab.objective)
    grads, batch = lab.gradients(5)[2], lab.batch
    direction = randomise(lab.state.trained, 9, std=1.0)

    @jax.jit
    def at(distance):
        moved = jax.tree.map(lambda p, u: p + distance * u, lab.state.trained, direction)
        return make(moved, 5, jnp.asarray(1.0), batch)[1].metrics["distill/objective"]

    slope = sum(
        float(jnp.vdot(g, u))
        for g, u in zip(jax.tree.leaves(grads), jax.tree.leaves(direction), strict=True)
    )
    step_size = 1e-3
    measured = float(at(step_size) - at(-step_size)) / (2 * step_size)
    np.testing.assert_allclose(measured, slope, rtol=1e-2)


@pytest.mark.slow
def test_no_gradient_reaches_a_teacher_and_it_stays_as_it_is():
    lab = Lab(**EVERYTHING | {"distill__layer": "0.4"})
    plan = lab.objective.plan(lab.batch, 8)

    def total(trained, taught):
        return lab.objective.sums(trained, lab.batch, plan, None, taught)[0]

    student, teacher = jax.jit(jax.grad(total, (0, 1)))(lab.state.trained, lab.teacher.params)
    assert not any(np.any(g) for g in jax.tree.leaves(teacher))
    assert all(np.any(g) for g in jax.tree.leaves(student))
    before = jax.tree.map(np.array, lab.teacher.params)
    state, _ = lab.steps(3)
    close(before, lab.teacher.params, rtol=0, atol=0)
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), lab.state.trained, state.trained)
    assert all(jax.tree.leaves(moved))


def test_teacher_runs_in_eval_mode():
    graphdef, init = create_model(tiny_config(model__dropout=0.5), V, "reference")
    params = randomise(jax.eval_shape(init, jax.random.key(3)), 3)
    taught = [
        Lab(Teacher(("toy",), (graphdef,), (params,)), model__dropout=0.0).gradients(update)[3]
        for update in (0, 1)
    ]
    kept = Lab(Teacher(("toy",), (graphdef,), (params,)), distill__temperature="2").gradients
    assert kept(0)[3]["distill/kd_kl"] == kept(1)[3]["distill/kd_kl"]
    assert taught[0]["distill/kd_kl"] != taught[1]["distill/kd_kl"]  # the temperature moves


def test_a_spoiled_projection_skips_the_whole_update():
    lab = Lab(**EVERYTHING)
    kernel = lab.beside["feature"]["kernel"]
    lab.beside["feature"]["kernel"] = kernel.at[0, 0].set(np.inf)
    state, rows = lab.steps(1)
    assert rows[0]["optim/skipped_updates"] == 1
    close(state.trained[0], lab.params, rtol=0, atol=0)
    close(state.opt_state, lab.state.opt_state, rtol=0, atol=0)


def test_schedules_count_updates():
    cfg = student_config(
        **EVERYTHING, distill__kd="0.2@0, 1@0.5", distill__router_temperature="1@0, 0.1@1"
    )
    found = [objective.schedule(cfg, i) for i in range(STEPS)]
    np.testing.assert_allclose(
        [f["temperature"] for f in found], np.linspace(3, 2, STEPS), rtol=1e-6
    )
    expected = np.minimum(1, 0.2 + 1.6 * np.arange(STEPS) / (STEPS - 1))
    np.testing.assert_allclose([f["kd"] for f in found], expected, rtol=1e-5)
    assert [int(f["router_k"]) for f in found] == [1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2]
    _, rows = Lab(distill__temperature="3@0, 2@1", data__micro_batch=2).steps(3)
    np.testing.assert_allclose([r["distill/temperature"] for r in rows], [3, 2.9, 2.8], rtol=1e-6)


@pytest.mark.parametrize(
    ("text", "points"),
    [
        ("0.7", [(0, 0.7)]),
        ("0@0.1, 1@0.4", [(0.1, 0), (0.4, 1)]),
        ("3@0,2@1", [(0, 3), (1, 2)]),
    ],
)
def test_curves(text, points):
    assert Curve(text).points() == points


@pytest.mark.parametrize(
    "text", ["", "a", "1@", "1, 2", "1@0.5, 2@0.5", "1@0.6, 2@0.5", "1@2", "nan"]
)
def test_no_curves(text):
    with pytest.raises(ConfigError, match=r"config.distill.kd: .* is no curve"):
        config.replace(config.Config(), distill__kd=text)


CACHED = dict(distill__cache="a", distill__support="top_k", distill__top_k=2)
REFUSED = [
    (dict(distill__kd="0.5"), "config.distill.kd: .*without a teacher"),
    (dict(distill__teachers="a", distill__cache="b"), "config.distill.cache: .*in the place of"),
    (dict(distill__teachers="a", distill__beta=1.0), "config.distill.beta"),
    (dict(distill__teachers="a", distill__temperature="0@0, 1@1"), "config.distill.temperature"),
    (dict(distill__teachers="a", distill__lm="-1"), "config.distill.lm: .*negative"),
    (dict(distill__teachers="a", distill__top_k=3), "config.distill.top_k"),
    (dict(distill__teachers="a", distill__support="union"), "config.distill.top_k"),
    (
        dict(
            distill__teachers="a",
            distill__routed_feature="1",
            distill__experts=2,
            distill__router_top_k=3,
        ),
        "config.distill.router_top_k: .*above",
    ),
    (dict(distill__teachers="a,b", distill__feature="1"), "config.distill.feature: .*one teacher"),
    (dict(distill__teachers="a,b", distill__contrastive="1"), "contrastive: .*one teacher"),
    (dict(distill__teachers="a", distill__beta=0.2), "config.distill.beta: .*without"),
    (dict(distill__teachers="a", distill__attention_layers="0"), "attention_layers: .*without"),
    (
        dict(distill__teachers="a", distill__attention="1", distill__attention_layers="4"),
        "attention_layers: .*does not name layers",
    ),
    (
        dict(distill__teachers="a", distill__attention="1", distill__attention_layers="-1,5"),
        "attention_layers: .*each once",
    ),
    (dict(distill__teachers="a,a"), "config.distill.teachers: .*twice"),
    (dict(distill__teachers="a,"), "config.distill.teachers: .*nothing between"),
    (
        dict(distill__teachers="a", distill__contrastive="1", data__batch_size=1),
        "config.distill.contrastive: .*of which there is one",
    ),
    *(
        (dict(distill__teachers="a", distill__kd="0", distill__feature="1") | changes, said)
        for changes, said in (
            (dict(distill__kind="reverse"), "distill.kind: .*without config.distill.kd"),
            (dict(distill__temperature="3"), "distill.temperature: .*without config.distill.kd"),
            (
                dict(distill__support="union", distill__top_k=5),
                "distill.support: .*without config.distill.kd",
            ),
        )
    ),
    (dict(distill__teachers="a", distill__kd="0"), "config.distill.kd: .*nothing"),
    (dict(distill__teachers="a", distill__experts=2), "config.distill.experts: .*without"),
    (dict(distill__teachers="a", distill__attention="1", distill__lr=1.0), "lr: .*projection"),
    (dict(distill__cache="a"), "config.distill.cache: .*one temperature"),
    (dict(distill__teachers="a", loss__label_smoothing=0.1), "config.loss.label_smoothing"),
    (
        dict(
            distill__cache="a", distill__support="top_k", distill__top_k=2, data__window_offset=True
        ),
        "config.data.window_offset",
    ),
    (
        dict(distill__cache="a", distill__support="top_k", distill__top_k=2, data__growth="9"),
        "config.data.growth",
    ),
]


@pytest.mark.parametrize(("changes", "said"), REFUSED)
def test_what_cannot_be_is_refused_by_name(changes, said):
    with pytest.raises(ConfigError, match=said):
        rules.validate(config.replace(config.Config(), **changes))


def test_more_experts_than_there_are_layers():
    with pytest.raises(ConfigError, match="experts: 4 is above the 3 layers"):
        Lab(distill__routed_feature="1", distill__experts=4, distill__router_top_k=1)


def test_no_array_holds_the_logits_of_all_tokens():
    """Of neither model, in the whole step with its gradient."""
    cfg = student_config(data__batch_size=8, data__seq_len=256)
    vocabulary, tokens = 1000, 8 * 256
    graphdef, init = create_model(cfg, vocabulary, "blockwise")
    taught, init_teacher = create_model(
        config.replace(cfg, distill__teachers="", distill__temperature="2"), vocabulary, "blockwise"
    )
    params = randomise(jax.eval_shape(init_teacher, jax.random.key(1)), 1)
    teacher = Teacher(("toy",), (taught,), (params,))
    objective = distilled(cfg, graphdef, init, teacher)
    steps = functools.partial(step.make_train_step(cfg, objective), reads=objective.reads)
    state = jax.eval_shape(lambda key: step.init_state(cfg, init(key)), jax.random.key(0))
    batch = random_batch(np.random.default_rng(0), (1, 8, 257), vocabulary)
    traced = jax.make_jaxpr(steps)(state, batch)
    sizes = [v.aval.size for _, eqn in equations(traced.jaxpr) for v in eqn.outvars]
    assert max(sizes) < tokens * vocabulary
    assert max(sizes) >= 1024 * vocabulary  # the chunk, so that the test sees what it must
