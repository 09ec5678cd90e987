"""Arms of an experiment: built by a small but real builder, with and without its faults."""

import argparse
import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import config_dict

from lm_jax.compare.ranking import judge
from lm_jax.doctor.arms import examine_arms
from lm_jax.doctor.arms.subject import shapes

fault = pytest.mark.fault
SEEDS = (0, 1, 2)
V = 61  # no other side of a matrix has this length


def written(share, *, tied=True, lr=3e-3):
    """A config as an experiment file writes it."""
    return {
        "model": {"table_share": share, "tied": tied, "budget": 60_000},
        "optim": {"lr": lr, "weight_decay": 0.01},
    }


def build(cfg, *, nesting_bug=False, copied_head=False):
    """Parameters and optimiser settings of a config; unknown keys raise."""
    for section, keys in (("model", "table_share tied budget"), ("optim", "lr weight_decay")):
        unknown = set(cfg[section]) - set(keys.split())
        if unknown or set(cfg) - {"model", "optim"}:
            raise ValueError(f"unknown keys {unknown or set(cfg)}")
    model = cfg if nesting_bug else cfg["model"]  # the keys are one level deeper
    share = model.get("table_share", 0.35)
    budget = model.get("budget", 60_000)
    width = int(share * budget / V) // 4 * 4
    hidden = (budget - V * width) // (3 * width)
    tree = {
        "table": jnp.zeros((V, width)),
        "up": jnp.zeros((width, hidden)),
        "gate": jnp.zeros((width, hidden)),
        "down": jnp.zeros((hidden, width)),
    }
    if not model.get("tied", True) or copied_head:
        tree["head"] = jnp.zeros((V, width))
    return {"tree": tree, "optim": dict(cfg["optim"])}


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def silent(report):
    return not report.failed and not report.warned


def arms(shares=(0.2, 0.35, 0.45), **bugs):
    """What is known of the arms once they are built."""
    made = {}
    for share in shares:
        built = build(written(share), **bugs)
        made[f"share {share}"] = {
            "config": written(share),
            "tree": built["tree"],
            "claimed_parameters": count(build(written(share))["tree"]),
            "tied": True,
            "run_dir": f"runs/{share}",
            "budget": {"stated": 5e6, "steps": 2500, "tokens": 2000},
        }
    return made


def test_healthy_arms_are_silent():
    report = examine_arms(arms(), resolve=build, vocab_size=V, matched=False)
    assert silent(report), report.findings
    assert [f.check for f in report if f.status == "skip"] == ["arms.ranking", "arms.matched"]


def test_an_untied_arm_has_two_tables():
    cfg = written(0.3, tied=False)
    arm = {"config": cfg, "tree": build(cfg)["tree"], "tied": False}
    assert silent(examine_arms({"untied": arm}, resolve=build, vocab_size=V))


@fault(47, "arms.same")
def test_keys_read_at_another_level():
    broken = functools.partial(build, nesting_bug=True)
    report = examine_arms(arms(nesting_bug=True), resolve=broken, vocab_size=V)
    same = report["arms.same"]
    assert same.status == "fail" and "nesting level" in same.remedy
    assert same.values["same"] == ["share 0.2 = share 0.35 = share 0.45"]


def test_without_configs_the_trees_only_warn():
    """Arms of one shape may differ in what has no parameters."""
    same = {name: {"tree": build(written(0.3))["tree"]} for name in "ab"}
    report = examine_arms(same)
    assert report.warned == ["arms.same"] and not report.failed
    other = {name: {"parameters": n} for name, n in (("a", 5), ("b", 6))}
    assert silent(examine_arms(other))


@jax.jit
def trained(width, keys):
    """Loss in nats of a bigram model of that width after 60 updates, one for each key."""
    chances = jax.random.dirichlet(jax.random.key(0), jnp.full(V, 0.1), (V,))
    tx = optax.adam(0.02)
    used = (jnp.arange(32) < width) / jnp.sqrt(width)

    def loss(params, pairs):
        log_p = jax.nn.log_softmax((params[0][pairs[:, 0]] * used[None]) @ params[1].T)
        return -jnp.take_along_axis(log_p, pairs[:, 1:], 1).mean()

    def sample(key, n):
        first, second = jax.random.split(key)
        x = jax.random.randint(first, (n,), 0, V)
        y = jax.random.categorical(second, jnp.log(chances + 1e-9)[x])
        return jnp.stack([x, y], 1)

    def update(carry, key):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params, sample(key, 64)), state)
        return (optax.apply_updates(params, updates), state), None

    def run(key):
        keys = jax.random.split(key, 3)
        params = [jax.random.normal(k, (V, 32)) for k in keys[:2]]
        carry, _ = jax.lax.scan(update, (params, tx.init(params)), jax.random.split(keys[2], 60))
        return loss(carry[0], sample(jax.random.key(1), 2000))

    return jax.vmap(run)(keys)


def final_losses(width):
    return trained(width, jnp.stack([jax.random.key(seed) for seed in SEEDS])).tolist()


@fault(48, "arms.ranking")
def test_a_winner_inside_the_noise():
    """Widths 16 and 17 differ by less than seeds do; 4 and 32 by more."""
    near = {f"width {w}": {"losses": final_losses(w)} for w in (16, 17)}
    winner = min(near, key=lambda name: np.mean(near[name]["losses"]))
    report = examine_arms(near, winner=winner)
    assert report.failed == ["arms.ranking"]
    assert "SE" in report["arms.ranking"].evidence
    assert examine_arms(near).warned == ["arms.ranking"]

    far = {f"width {w}": {"losses": final_losses(w)} for w in (4, 32)}
    winner = min(far, key=lambda name: np.mean(far[name]["losses"]))
    assert silent(examine_arms(far, winner=winner))
    loser = ({*far} - {winner}).pop()
    assert examine_arms(far, winner=loser).failed == ["arms.ranking"]


@fault(48, "arms.ranking")
def test_two_loose_seeds_are_not_made_certain_by_ten_tight_ones():
    """The doctor and the comparison use one rule, Welch's; a pooled sd would separate them."""
    tight = 1 + 0.001 * np.random.default_rng(0).normal(size=10)
    loose = np.array([1.02, 1.06])
    found = examine_arms({"a": {"losses": list(tight)}, "b": {"losses": list(loose)}}, winner="a")[
        "arms.ranking"
    ]
    assert found.status == "fail" and "more than 12.7 SE" in found.evidence
    pair = judge(tight, loose, 0.0)
    assert pair["needed_standard_errors"] == pytest.approx(12.7, abs=0.05)
    assert pair["verdict"] == "not distinguishable"
    assert found.values["error"] == pair["standard_error"]


def test_the_best_is_ahead_of_every_arm_and_not_of_the_next_alone():
    losses = {"best": [1.0, 1.01], "next": [1.1, 1.11], "loose": [1.2, 1.9]}
    arms = {name: {"losses": x} for name, x in losses.items()}
    found = examine_arms(arms)["arms.ranking"]
    assert found.status == "warn" and "ahead of loose" in found.evidence
    del arms["loose"]
    assert examine_arms(arms)["arms.ranking"].status == "pass"


def test_arms_that_are_the_same_run_tell_the_noise_of_one_seed_each():
    losses = {"a": 1.0, "a again": 1.02, "a once more": 1.01, "b": 2.0}
    arms = {name: {"losses": [x], "parameters": ord(name[0])} for name, x in losses.items()}
    found = examine_arms(arms, winner="a")["arms.ranking"]
    assert found.status == "fail" and "arms that are the same run" in found.evidence
    assert found.values["error"] == pytest.approx(0.01 * np.sqrt(2))


@fault(48, "arms.ranking")
def test_one_seed_each_is_no_ranking():
    one = {f"width {w}": {"losses": final_losses(w)[:1]} for w in (4, 32)}
    found = examine_arms(one, winner="width 32")["arms.ranking"]
    assert found.status == "fail" and "no estimate of the noise" in found.evidence


@pytest.mark.parametrize("seed", range(5))
def test_rankings_of_equal_arms_are_refused(seed):
    """Seven arms of one distribution: the best is refused nearly always, here each time."""
    rng = np.random.default_rng(seed)
    equal = {f"arm {i}": {"losses": list(rng.normal(3, 0.01, 3))} for i in range(7)}
    assert "arms.ranking" in examine_arms(equal).warned


@fault(48, "arms.run_dirs")
def test_a_shared_folder(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "run")
    both = {
        name: {"run_dir": str(tmp_path / folder)} for name, folder in (("a", "run"), ("b", "link"))
    }
    assert examine_arms(both).failed == ["arms.run_dirs"]
    both["b"]["run_dir"] = str(tmp_path / "other")
    assert silent(examine_arms(both))


@fault(62, "arms.parameters")
def test_a_wrong_claim():
    made = arms((0.35,))
    made["share 0.35"]["claimed_parameters"] = 50_000
    found = examine_arms(made, vocab_size=V)["arms.parameters"]
    assert found.status == "fail" and "in tables" in found.evidence


@fault(61, "arms.tied")
@fault(61, "arms.parameters")
def test_a_tied_head_that_is_a_copy():
    report = examine_arms(arms(copied_head=True), vocab_size=V)
    assert {"arms.tied", "arms.parameters"} <= set(report.failed)
    assert "head" in report["arms.tied"].evidence


def test_tables_may_be_named():
    """Where a hidden layer is as wide as the vocabulary, shapes do not tell."""
    tree = {"table": (V, 8), "up": (8, V), "down": (V, 8)}
    report = examine_arms({"a": {"tree": tree, "tied": True}}, vocab_size=V)
    assert report["arms.tied"].status == "skip"
    report = examine_arms({"a": {"tree": tree, "tied": True, "tables": ["table"]}})
    assert report["arms.tied"].status == "pass"


def test_a_table_counted_twice_is_named():
    tree = build(written(0.35))["tree"]
    claim = count(tree) + tree["table"].size
    found = examine_arms({"a": {"tree": tree, "claimed_parameters": claim}}, vocab_size=V)
    assert "counted twice" in found["arms.parameters"].evidence


@fault(62, "arms.matched")
def test_a_baseline_that_is_not_matched():
    """The untied head makes it larger; tied, the totals match and the tables do not."""
    tree = build(written(0.35))["tree"]
    untied = tree | {"head": tree["table"]}
    report = examine_arms({"a": {"tree": tree}, "b": {"tree": untied}}, matched=True)
    assert report.failed == ["arms.matched"]
    unlike = {str(s): {"tree": build(written(s))["tree"]} for s in (0.2, 0.8)}
    report = examine_arms(unlike, vocab_size=V, matched=True)
    assert report.warned == ["arms.matched"] and not report.failed
    same = {name: {"tree": tree, "resolved": {"lr": lr}} for name, lr in (("a", 1), ("b", 2))}
    assert silent(examine_arms(same, vocab_size=V, matched=True))


@fault(63, "arms.budget")
def test_a_budget_that_is_no_product():
    arm = {"budget": {"stated": 6e9, "steps": 30_000, "sequences": 64, "length": 2048}}
    found = examine_arms({"a": arm})["arms.budget"]
    assert found.status == "fail" and "3.932e+09" in found.evidence


@pytest.mark.parametrize(
    "kind", [argparse.Namespace, types.SimpleNamespace, config_dict.ConfigDict]
)
def test_configs_that_are_no_dicts(kind):
    def arm(name, lr):
        cfg = kind()
        cfg.optim, cfg.out_dir = kind(), f"out/{name}"
        cfg.optim.lr = lr
        return {"resolved": cfg}

    assert examine_arms({n: arm(n, 1e-3) for n in "ab"}).failed == ["arms.same"]
    assert silent(examine_arms({"a": arm("a", 1e-3), "b": arm("b", 3e-3)}))


def test_a_tied_parameter_of_torch_is_one_leaf():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    module = torch.nn.ModuleDict({"wte": torch.nn.Embedding(V, 4), "head": torch.nn.Linear(4, V)})
    module["head"].weight = module["wte"].weight
    arm = {"tree": module.state_dict(), "tied": True, "claimed_parameters": V * 4 + V}
    assert silent(examine_arms({"a": arm}, vocab_size=V))
    module["head"].weight = torch.nn.Parameter(module["wte"].weight.detach().clone())
    report = examine_arms({"a": arm | {"tree": module.state_dict()}}, vocab_size=V)
    assert report.failed == ["arms.parameters", "arms.tied"]


def test_losses_of_unequal_budgets_are_no_comparison():
    def arm(steps, loss):
        return {
            "losses": [loss, loss + 0.01],
            "budget": {"stated": 100 * steps, "steps": steps, "tokens": 100},
        }

    report = examine_arms({"a": arm(1000, 3.0), "b": arm(3000, 2.5)})
    assert not report.failed and report.warned == ["arms.budget"]
    assert silent(examine_arms({"a": arm(1000, 3.0), "b": arm(1000, 2.5)}))
    apart = {n: {"budget": arm(s, 1)["budget"]} for n, s in (("a", 1000), ("b", 3000))}
    assert silent(examine_arms(apart))


def test_none_is_not_given_and_names_may_be_numbers():
    report = examine_arms({1: {"losses": [3.0, 3.1], "tree": None}, 2: {"losses": [4.0, 4.1]}})
    assert report["arms.ranking"].status == "pass"


# Bad input


def test_a_resolve_that_raises_is_an_error():
    def resolve(cfg):
        raise KeyError("data")

    two = {"a": {"config": {"x": 1}}, "b": {"config": {"x": 2}}}
    report = examine_arms(two, resolve=resolve)
    assert report.failed == ["arms.same"] and report["arms.same"].status == "error"
    seeds = {name: arm | {"losses": [3.0, 3.1]} for name, arm in two.items()}
    report = examine_arms(seeds, resolve=resolve, winner="a")
    assert report.failed == ["arms.same", "arms.ranking"]  # what can be judged, is
    assert "resolve raised KeyError: 'data'" in report["arms.same"].evidence


def test_a_resolve_that_changes_each_time_cannot_tell_arms_apart():
    numbers = iter(range(100))
    two = {"a": {"config": {"x": 1}}, "b": {"config": {"x": 1}}}

    def resolve(cfg):
        return {"x": cfg["x"], "at": next(numbers)}

    found = examine_arms(two, resolve=resolve)["arms.same"]
    assert found.status == "error" and "another result each time" in found.evidence
    assert examine_arms(two, resolve=resolve, ignore=["at"])["arms.same"].status == "fail"


def test_objects_are_told_apart_by_what_they_are_and_not_by_where_they_lie():
    class Schedule:
        pass

    arms = {name: {"resolved": {"schedule": Schedule()}} for name in "ab"}
    assert examine_arms(arms).failed == ["arms.same"]
    arms["b"]["resolved"]["schedule"] = np.float32(1)
    assert silent(examine_arms(arms))


def test_arms_of_which_nothing_is_known():
    report = examine_arms({"a": {}, "b": {}})
    assert all(f.status == "skip" for f in report) and not report.clean
    json.loads(report.to_json())


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (dict(arms={}), "arms"),
        (dict(arms=["a"]), "arms"),
        (dict(arms={"a": {"losss": [1.0]}}), "losss"),
        (dict(arms={"a": {"losses": 1.0}}), "losses"),
        (dict(arms={"a": {"budget": {"steps": 3}}}), "stated"),
        (dict(arms={"a": {}}, winner="b"), "winner"),
    ],
)
def test_misuse_is_named(arguments, name):
    with pytest.raises(ValueError, match=name):
        examine_arms(**arguments)


def test_shapes_of_arrays_and_of_shapes():
    tree = {"a": {"b": np.zeros((2, 3))}, "c": (4,), "d": [5, 6]}
    assert shapes(tree) == {"a/b": (2, 3), "c": (4,), "d": (5, 6)}
    layers = [{"w": np.zeros(4)}, {"w": np.zeros(5)}]
    assert shapes({"layers": layers}) == {"layers/0/w": (4,), "layers/1/w": (5,)}
