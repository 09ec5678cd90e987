"""Loops of PyTorch: states of modules and optimisers, which a step changes in place."""

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from lm_jax.doctor import examine_optimiser, examine_training  # noqa: E402
from tests.doctor import toy_loop  # noqa: E402

V, D, T, LR = 17, 8, 6, 1e-2
nn: Any = torch.nn


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Net(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.table = nn.Embedding(V, D)
        nn.init.normal_(self.table.weight, std=0.3)
        self.linear, self.norm = nn.Linear(D, D), nn.LayerNorm(D)
        self.to(dtype)

    def forward(self, tokens):
        x = self.table(tokens)
        return self.norm(x + torch.tanh(self.linear(x))) @ self.table.weight.T


def nats(net, tokens, weights, shift=1):
    tokens, weights = torch.tensor(np.asarray(tokens)).long(), torch.tensor(np.asarray(weights))
    logits = net(tokens[:, : tokens.shape[1] - shift]).float()
    each = nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, shift:], reduction="none")
    return (each * weights[:, shift:]).sum(), weights[:, shift:].sum()


def adamw(net, everywhere=False):
    decayed = [p for p in net.parameters() if everywhere or p.ndim > 1]
    rest = [p for p in net.parameters() if not (everywhere or p.ndim > 1)]
    groups = [dict(params=decayed, weight_decay=0.1), dict(params=rest, weight_decay=0.0)]
    return torch.optim.AdamW([g for g in groups if g["params"]], LR)


def loop(
    *,
    dtype=torch.float32,
    frozen=(),
    steps=True,
    everywhere=False,
    shape=tuple,
    net=None,
    mean_of_means=False,
    zero=True,
):
    """Arguments for `examine_optimiser`; `net` is one module that every run loads anew."""
    torch.manual_seed(0)
    given = net or Net(dtype)

    def init_fn(params):
        own = net or Net(dtype)
        own.load_state_dict(params)
        for name in frozen:
            own.get_parameter(name).requires_grad_(False)
        pair = own, adamw(own, everywhere)
        return pair if shape is tuple else dict(zip(("net", "opt"), pair, strict=True))

    def step_fn(state, batch):
        own, opt = state if shape is tuple else state.values()
        if zero:
            opt.zero_grad()
        total, count = nats(own, batch["tokens"], batch["weights"])
        (total / count.clamp(min=1)).backward()
        norm = nn.utils.clip_grad_norm_(own.parameters(), 1.0)
        if steps and torch.isfinite(norm):
            opt.step()
        metrics = {"optim/lr": LR, "optim/skipped_updates": not torch.isfinite(norm)}
        return state, metrics | {"optim/grad_norm": norm}

    def gradient_fn(params, batch, micro_batches):
        own = Net(dtype)
        own.load_state_dict(params)
        parts = [
            nats(own, x["tokens"], x["weights"]) for x in toy_loop.micros(batch, micro_batches)
        ]
        if mean_of_means:
            sum(total / count for total, count in parts).div(len(parts)).backward()
        else:
            (sum(total for total, _ in parts) / sum(count for _, count in parts)).backward()
        return {name: p.grad for name, p in own.named_parameters()}

    batch = toy_loop.ragged(0)
    bad = batch | {"weights": batch["weights"].copy()}
    bad["weights"][-1, 1] = np.inf
    params = given.state_dict() if net else dict(given.named_parameters())
    return dict(
        params=params,
        init_fn=init_fn,
        step_fn=step_fn,
        params_of=lambda s: s[0] if shape is tuple else s["net"],
        batch=batch,
        empty_batch=batch | {"weights": 0 * batch["weights"]},
        bad_batch=bad,
        gradient_fn=gradient_fn,
        micro_batches=(4,),
        learning_rate=lambda update: LR,
        weight_decay=0.1,
        decayed={name: p.ndim > 1 for name, p in params.items()},
    )


@pytest.mark.parametrize("shape", [tuple, dict])
def test_a_healthy_loop_is_quiet(shape):
    report = examine_optimiser(**loop(shape=shape))
    assert not report.failed and not report.warned, report.verdict
    passed = {f.check.split(".")[1] for f in report if f.status == "pass"}
    assert passed >= {"updates", "dtype", "nonfinite", "decay"}
    assert passed >= {"update_count", "executed_lr", "accumulation"}


def test_the_weights_that_were_given_stay_as_they_were():
    net = Net()
    before = {name: x.clone() for name, x in net.state_dict().items()}
    report = examine_optimiser(**loop(net=net))
    assert not report.failed, report.verdict
    assert all(torch.equal(x, before[name]) for name, x in net.state_dict().items())


def test_faults_of_the_loop():
    report = examine_optimiser(**loop(frozen=["linear.weight"]))
    assert report["optimiser.updates"].values["unchanged"] == ["linear.weight"]
    assert "optimiser.updates" in report.failed
    report = examine_optimiser(**loop(steps=False))
    assert {"optimiser.updates", "optimiser.update_count"} <= set(report.failed)
    report = examine_optimiser(**loop(everywhere=True))
    wrong = report["optimiser.decay"].values["wrong"]
    assert set(wrong) == {"linear.bias", "norm.weight", "norm.bias"}
    assert examine_optimiser(**loop(mean_of_means=True)).failed == ["optimiser.accumulation"]
    report = examine_optimiser(**loop(dtype=torch.bfloat16))
    assert len(report["optimiser.dtype"].values["params"]) == 5
    assert report["optimiser.dtype"].values["moments"]
    assert "optimiser.dtype" in report.failed


def test_gradients_that_are_never_zeroed():
    report = examine_optimiser(**loop(zero=False))
    assert report.failed[0] == "optimiser.grad_norm"
    assert "after an update" in report["optimiser.grad_norm"].evidence


def test_half_a_step_that_works_in_place():
    def examine(guard):
        def update_fn(params, grads, opt, update):
            for name, p in params.items():
                p.grad = grads[name]
            norm = nn.utils.clip_grad_norm_(params.values(), 1.0)
            if not guard or torch.isfinite(norm):
                opt.step()
            return params, opt, {"optim/skipped_updates": int(not torch.isfinite(norm))}

        torch.manual_seed(0)
        return examine_optimiser(
            params=dict(Net().named_parameters()),
            init_fn=lambda params: torch.optim.AdamW(params.values(), LR, weight_decay=0.1),
            update_fn=update_fn,
            learning_rate=lambda update: LR,
            weight_decay=0.1,
            decayed=dict.fromkeys(dict(Net().named_parameters()), True),
            clip_norm=1.0,
        )

    report = examine(guard=True)
    assert not report.failed and not report.warned, report.verdict
    assert report["optimiser.clip"].status == report["optimiser.decay"].status == "pass"
    assert examine(guard=False).failed == ["optimiser.nonfinite"]


def test_a_module_is_no_tree_of_parameters():
    for params in (Net(), Net().parameters()):
        with pytest.raises(ValueError, match="named_parameters"):
            examine_optimiser(params=params)


def test_parameters_that_are_handed_out_one_by_one():
    healthy = loop()
    names, healthy_init = list(healthy["params"]), healthy["init_fn"]
    healthy |= dict(
        params=list(Net().parameters()),
        init_fn=lambda params: healthy_init(dict(zip(names, params, strict=True))),
        params_of=lambda state: state[0].parameters(),
        gradient_fn=None,
        decayed=None,
    )
    report = examine_optimiser(**healthy)
    assert not report.failed and report["optimiser.updates"].status == "pass", report.verdict


def training(*, shift=1, frozen=(), steps=True, dtype=torch.float32, params_of=True, **more):
    def init_fn(seed):
        torch.manual_seed(seed)
        net = Net(dtype)
        for name in frozen:
            net.get_parameter(name).requires_grad_(False)
        return net, torch.optim.AdamW(net.parameters(), LR)

    def step_fn(state, tokens):
        state[1].zero_grad()
        total, count = nats(state[0], tokens, np.ones(tokens.shape, np.float32), shift)
        (total / count).backward()
        if steps:
            state[1].step()
        return state, total

    def score_fn(state, tokens):
        return nats(state[0], tokens, np.ones(tokens.shape, np.float32), shift)

    given = dict(params_of=lambda state: state[0]) if params_of else {}
    sizes = dict(vocab_size=V, seq_len=T, steps=60, smallest_leak=1.0)
    return examine_training(init_fn, step_fn, score_fn, **sizes | given | more)


@pytest.mark.parametrize("params_of", [True, False])
def test_a_healthy_training_is_quiet(params_of):
    report = training(params_of=params_of, steps=200)
    assert not report.failed and not report.warned, report.verdict
    assert {f.status for f in report} == {"pass"}


def test_faults_of_a_training():
    assert "training.gibbs" in training(shift=0, smallest_leak=100.0).failed
    found = training(frozen=["linear.weight"])["training.updates"]
    assert found.status == "fail" and found.values["unchanged"] == ["linear.weight"]
    failed = training(steps=False, params_of=False, dtype=torch.bfloat16).failed
    assert {"training.updates", "training.score_changes", "training.overfit"} <= set(failed)
