"""Several devices and several processes compute what one device computes."""

import dataclasses
import json
import os
import pathlib
import pickle
import socket
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from lm_jax import checkpoint, evaluate, loop, sharding, signals, step, workdir
from lm_jax.config import ConfigError, MeshConfig
from lm_jax.data.open import open_data
from lm_jax.distill.objective import distilled
from lm_jax.models.families import create_model
from lm_jax.objective import NextToken
from tests.distill.toys import EVERYTHING, toy_teacher
from tests.helpers import ROOT, StopAfter, random_batch, rows, small, tiny_config

V = 29
UPDATES = 20
MESHES = {  # data, fsdp, tensor
    "data": (8, 1, 1),
    "fsdp": (1, 8, 1),
    "both": (2, 4, 1),
    "all": (2, 2, 2),
    "tensor": (1, 2, 4),
}
UNEVEN = dict(  # much at once: dropout, averages, micro-batches, biases
    data__seq_len=12,
    data__micro_batch=1,
    model__d_model=32,
    model__heads=8,
    model__kv_heads=4,
    model__qk_norm=True,
    model__key_offset=True,
    model__embedding_values=True,
    model__embedding_skip=True,
    model__head_gate=True,
    model__bias=True,
    model__dropout=0.1,
    model__attention_dropout=0.1,
    model__embedding_dropout=0.1,
    model__scan_layers=True,
    model__remat=True,
    optim__ema_decay=0.9,
    loss__impl="fused",
)
CASES = {
    "all at once": UNEVEN,
    "plain": dict(model__positions="learned", model__tied=False, attention__impl="blockwise"),
    "factorised": dict(model__embedding_rank=8, model__mlp="gelu", loss__label_smoothing=0.1),
    "odd": dict(  # nothing is divisible
        model__d_model=20,
        model__heads=4,
        model__positions="learned",
        model__window=5,
        model__logit_softcap=10.0,
        model__tied=False,
        model__embedding_rank=5,
    ),
    # Its iteration multiplies rounding errors by up to 3.4^5.
    "muon": dict(optim__name="muon", optim__peak_lr=1e-4),
    "musota": dict(
        model__family="musota", model__d_model=128, model__init="normal", model__dropout=0.1
    ),
    "distilled": {name: x for name, x in EVERYTHING.items() if "attention_layers" not in name}
    | dict(distill__teachers="toy", distill__attention="0"),
    "bfloat16": UNEVEN | dict(train__compute_dtype="bfloat16"),
    "float16": UNEVEN | dict(train__compute_dtype="float16", train__layer_norms=True),
}
# Of those that any check makes; the long one makes all.
SHORT = [
    *(("all at once", mesh) for mesh in ("data", "fsdp", "all")),
    *(("muon", "fsdp"), ("bfloat16", "all")),
]
RUNS = SHORT + [
    (case, mesh)
    for case in CASES
    for mesh in MESHES
    if (case, mesh) not in SHORT and (case != "musota" or MESHES[mesh][2] == 1)
]


def leaf(*shape):
    return jax.ShapeDtypeStruct(shape, np.float32)


@pytest.mark.parametrize(
    ("path", "shape", "axis"),
    [
        ("blocks/mlp/up/kernel", (3, 16, 40), 1),  # rows of a layer, not layers
        ("blocks/mlp/up/kernel", (8, 15, 40), None),  # nor columns
        ("blocks/mlp/up/bias", (3, 40), None),
        ("blocks/attention_norm/scale", (8, 16), None),
        ("blocks/within/qkv/kernel", (3, 16, 4, 12), None),  # a map for each block of MU-SOTA
        ("head/kernel", (16, 29), 0),
        ("embedding", (29, 16), 1),  # columns: the vocabulary need not be divisible
        ("final_norm/scale", (16,), None),
        ("step", (), None),
    ],
)
def test_matrices_are_split_by_rows_and_tables_by_columns(monkeypatch, path, shape, axis):
    monkeypatch.setattr(sharding, "NamedSharding", lambda mesh, spec: spec)
    tree = leaf(*shape)
    for name in reversed(path.split("/")):
        tree = {name: tree}
    for fsdp, tensor in ((4, 1), (2, 2), (1, 4)):
        mesh = types.SimpleNamespace(shape=dict(data=2, fsdp=fsdp, tensor=tensor))
        (spec,) = jax.tree.leaves(sharding.places(mesh, {"params": tree}))
        assert [i for i, names in enumerate(spec) if names] == ([] if axis is None else [axis])
    whole = types.SimpleNamespace(shape=dict(data=8, fsdp=1, tensor=1))
    assert jax.tree.leaves(sharding.places(whole, tree)) == [PartitionSpec()]


def test_round_up():
    mesh = types.SimpleNamespace(shape=dict(data=3, fsdp=2, tensor=4))
    assert [sharding.round_up(n, mesh) for n in (1, 6, 7, 12, 13)] == [6, 6, 12, 12, 18]


def test_make_mesh_names_the_field(monkeypatch):
    sizes = dict(sharding.make_mesh(MeshConfig()).shape)
    assert sizes == {"data": jax.device_count(), "fsdp": 1, "tensor": 1}
    monkeypatch.setattr(jax, "device_count", lambda: 6)
    with pytest.raises(ValueError, match=r"config\.mesh\.fsdp: 4 does not divide the 6 devices"):
        sharding.make_mesh(MeshConfig(fsdp=4))
    with pytest.raises(ValueError, match=r"mesh\.tensor: 2 times fsdp=6 does not divide the 6 dev"):
        sharding.make_mesh(MeshConfig(fsdp=6, tensor=2))


def test_a_run_opens_on_fewer_devices():
    """The mesh that fits has axes that divide those of training."""
    assert jax.device_count() == 1
    mesh = sharding.mesh_that_fits(MeshConfig(fsdp=8, tensor=2))
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1}


def mesh_of_processes(tensor, of_device):
    devices = np.array([types.SimpleNamespace(process_index=i) for i in of_device], object)
    sizes = dict(data=len(devices) // tensor, fsdp=1, tensor=tensor)
    return types.SimpleNamespace(shape=sizes, devices=devices.reshape(*sizes.values()))


@pytest.mark.parametrize(
    ("tensor", "of_device", "shares"),
    [
        (1, [0, 0, 1, 1], [(0, 2), (1, 2)]),
        (2, [0, 0, 1, 1], [(0, 2), (1, 2)]),
        (4, [0, 0, 1, 1], [(0, 1), (0, 1)]),  # both compute all rows
        (2, [0, 1, 2, 3], [(0, 2), (0, 2), (1, 2), (1, 2)]),
    ],
)
def test_processes_read_the_rows_of_their_devices(monkeypatch, tensor, of_device, shares):
    mesh, found = mesh_of_processes(tensor, of_device), []
    for process in sorted(set(of_device)):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        found.append(tuple(sharding.share_of_rows(mesh).values()))
    assert found == shares


@pytest.mark.parametrize("of_device", [[0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1, 2, 2]])
def test_rows_that_processes_share_unevenly_are_refused_by_all(monkeypatch, of_device):
    for process in sorted(set(of_device)):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        with pytest.raises(ConfigError, match=r"^config\.mesh\.tensor: 2 devices that compute"):
            sharding.share_of_rows(mesh_of_processes(2, of_device))


def python(code, **environment):
    env = {**os.environ, "JAX_PLATFORMS": "cpu", **environment}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ragged_batches(length):
    """Batches of 16 rows whose numbers of scored tokens differ row by row, down to none."""
    batches = random_batch(np.random.default_rng(0), (UPDATES, 16, length + 1), V)
    batches["tokens"] = np.int32(batches["tokens"][..., :1] + 7 * np.arange(length + 1)) % V
    for row in range(16):
        batches["weights"][:, row, 1 + row % 12 :] = 0
    return batches


def case_config(case, shares):
    # Adam divides by the root of the second moment plus eps: where a gradient is as small as its
    # rounding error, eps is what keeps the error of the update small.
    base = dict(data__batch_size=16, optim__eps=1e-3, optim__peak_lr=2e-3, model__kv_heads=4)
    changes = base | CASES[case]
    if micro := changes.get("data__micro_batch"):  # as many micro-batches on any mesh
        changes["data__micro_batch"] = 8 * micro // shares
    if case == "musota":
        del changes["model__kv_heads"]
    return tiny_config(**changes)


def run_on(mesh, case):
    """Metrics, scores and shard shapes after the updates; as loop.py does it."""
    cfg = case_config(case, mesh.size // mesh.shape["tensor"])
    impl = cfg.attention.impl if cfg.attention.impl != "auto" else "reference"
    graphdef, init = create_model(cfg, V, impl)
    objective = NextToken.of(cfg, graphdef)
    if case == "distilled":
        teacher = toy_teacher()
        params = jax.device_put(teacher.params, sharding.places(mesh, teacher.params))
        teacher = dataclasses.replace(teacher, params=params)
        objective = distilled(cfg, graphdef, init, teacher)

    def init_state(key):
        return step.init_state(cfg, init(key), objective.beside(key))

    abstract = jax.eval_shape(init_state, jax.random.key(3))
    shardings = sharding.places(mesh, abstract)
    state = jax.jit(init_state, out_shardings=shardings)(jax.random.key(3))
    batches = ragged_batches(cfg.data.seq_len)
    on_mesh = sharding.put_batch(mesh, batches, axis=1)
    with jax.set_mesh(mesh):
        assert sharding.accumulation(cfg) == (2 if "data__micro_batch" in CASES[case] else 1)
        state, metrics = step.make_train_step(cfg, objective)(state, on_mesh, objective.reads)
    kept = jax.tree.map(
        lambda x, place: x.sharding.is_equivalent_to(place, x.ndim), state, shardings
    )
    rows = sharding.put_batch(mesh, jax.tree.map(lambda x: x[0], batches), axis=0)
    names = [jax.tree_util.keystr(p) for p, _ in jax.tree.leaves_with_path(state)]
    shards = [(x.shape, x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(state)]
    result = {
        "metrics": jax.device_get(metrics),
        "eval": jax.device_get(step.make_eval_step(cfg, graphdef, mesh)(state.params, rows)),
        "stays": jax.tree.all(kept),
        "shards": dict(zip(names, shards, strict=True)),
        "rows": rows["tokens"].sharding.shard_shape(rows["tokens"].shape),
    }
    return result, state, abstract


def on_eight_devices(folder, runs):
    """The body of the child process: some runs, each also on one device, then a checkpoint."""
    assert jax.device_count() == 8
    folder, results = pathlib.Path(folder), {}
    for case, name in [(case, "one") for case in dict(runs)] + runs:
        if name == "one":
            auto = (jax.sharding.AxisType.Auto,) * 3
            mesh = jax.make_mesh(
                (1, 1, 1), ("data", "fsdp", "tensor"), axis_types=auto, devices=jax.devices()[:1]
            )
        else:
            _, fsdp, tensor = MESHES[name]
            mesh = sharding.make_mesh(MeshConfig(fsdp=fsdp, tensor=tensor))
            assert tuple(mesh.shape.values()) == MESHES[name]
        results[case, name], state, abstract = run_on(mesh, case)

    checkpoints = checkpoint.Checkpoints(folder, 1)  # of the last
    checkpoints.save(state.saved(), {"position": 5})
    checkpoints.wait()
    for fsdp in (1, 8):
        shardings = sharding.places(sharding.make_mesh(MeshConfig(fsdp=fsdp)), abstract)
        like = checkpoint.abstract_like(abstract, shardings)
        restored = checkpoint.find_kept(folder)[0].restore(like.saved())
        same = jax.tree.map(lambda x, s: x.sharding == s, restored, shardings.saved())
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), state.saved())
        results["restored", fsdp] = jax.tree.all(same)
    checkpoints.close()
    (folder / "results.pickle").write_bytes(pickle.dumps(results))


def in_child(folder, runs):
    child = python(
        f"from tests import test_sharding as t; t.on_eight_devices({str(folder)!r}, {runs!r})",
        XLA_FLAGS=os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8",
        JAX_NUMPY_RANK_PROMOTION="raise",
    )
    try:
        out, _ = child.communicate(timeout=1200)
    finally:
        child.kill()
        child.communicate()
    assert child.returncode == 0, out
    return pickle.loads((folder / "results.pickle").read_bytes())


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    return in_child(tmp_path_factory.mktemp("short"), SHORT)


@pytest.fixture(scope="module")
def rest(tmp_path_factory):
    return in_child(tmp_path_factory.mktemp("rest"), RUNS[len(SHORT) :])


def check_equal(results, case, mesh):
    """As one device trains: losses and norms, in float32 to 5e-6, counts exactly."""
    one, many = results[case, "one"], results[case, mesh]
    assert one["metrics"]["train/loss"].shape == (UPDATES,) and many["stays"]
    # An average over 16 x 12 terms of a 16-bit loss is right to a bit or two of 2^-8.
    limit = 2e-2 if "float" in case else 5e-6
    for name in ("train/loss", "optim/grad_norm", "optim/update_norm", "optim/param_norm"):
        error = np.abs(many["metrics"][name] / one["metrics"][name] - 1).max()
        # A norm is a sum of squares, whose terms differ more than their mean does.
        assert error <= (limit if name == "train/loss" else 20 * limit), (name, error)
    for name in ("data/scored", "optim/skipped_updates"):
        np.testing.assert_array_equal(one["metrics"][name], many["metrics"][name])
    assert one["metrics"]["train/loss"][-1] < one["metrics"]["train/loss"][0]
    assert one["eval"]["count"] == many["eval"]["count"] > one["eval"]["correct"]
    # One token is off by more than a mean, and the parameters differ as well.
    np.testing.assert_allclose(
        many["eval"]["token_nats"],
        one["eval"]["token_nats"],
        rtol=0,
        atol=1e-1 if limit > 1e-3 else 1e-4,
    )


@pytest.mark.slow
@pytest.mark.parametrize(("case", "mesh"), SHORT)
def test_every_mesh_trains_like_one_device(short, case, mesh):
    check_equal(short, case, mesh)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(("case", "mesh"), RUNS[len(SHORT) :])
def test_every_case_on_every_mesh(rest, case, mesh):
    check_equal(rest, case, mesh)


@pytest.mark.slow
def test_parameters_moments_and_rows_are_really_split(short):
    for case, mesh in SHORT:
        _, fsdp, tensor = MESHES[mesh]
        result = short[case, mesh]
        assert result["rows"][0] == 16 * tensor // 8
        for name, (whole, part) in result["shards"].items():
            split = "kernel" in name or "embedding" in name
            assert np.prod(whole) == np.prod(part) * (fsdp * tensor if split else 1), name
        # Four matrices in a layer, two more for what is added, and a head; each with two moments of
        # Adam or one of Muon, and an average.
        kernels = sum("kernel" in name for name in result["shards"])
        assert kernels == {"muon": 4 * 2, "plain": 5 * 3}.get(case, 6 * 4), kernels


@pytest.mark.slow
def test_a_checkpoint_moves_between_meshes(short):
    assert short["restored", 1] and short["restored", 8]


def text_config(folder, **changes):
    base = dict(
        optim__eps=1e-3,
        train__steps="6",
        train__eval_every="3",
        train__checkpoint_every="4",
        train__steps_per_call=1,
    )
    return small(folder, **base | changes)


TOGETHER = """
import pathlib
from lm_jax import config, loop, processes
processes.join_others(config.Config().cluster)
from tests import test_sharding as t
loop.train_and_evaluate(t.text_config(pathlib.Path({text!r}), **{mesh!r}), {workdir!r})
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("text"), np.random.default_rng(0)
    for i in range(30):
        (folder / f"{i:02}.txt").write_text(" ".join(rng.choice(["ba", "du", "kilo", "no"], 60)))
    return folder


@pytest.fixture(scope="module")
def alone(text, tmp_path_factory):
    """A run by one process; its folder and its scores."""
    workdir = tmp_path_factory.mktemp("one")
    return workdir, loop.train_and_evaluate(text_config(text), workdir)


def begun(text, workdir, monkeypatch):
    """Half of the same run, by one process."""
    with monkeypatch.context() as patched:
        patched.setattr(signals, "agreed", StopAfter(6))
        with pytest.raises(KeyboardInterrupt, match="after update 3"):
            loop.train_and_evaluate(text_config(text), workdir)


def go_on_together(text, workdir, count, **mesh):
    """The rest by several processes, and what they say."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    code = TOGETHER.format(text=str(text), workdir=str(workdir), mesh=mesh)
    several = dict(JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES=str(count))
    children = [python(code, **several, JAX_PROCESS_ID=str(i)) for i in range(count)]
    try:
        said = [child.communicate(timeout=300)[0] for child in children]
        for child, out in zip(children, said, strict=True):
            assert child.returncode == 0, out
    finally:
        for child in children:
            child.kill()
            child.communicate()
    return said


def check_same_run(one, scores, many):
    rows_one, rows_many = rows(one), rows(many)
    assert [row.pop("resumed") for row in rows_many if "resumed" in row] == [3]
    assert [(row["step"], sorted(row)) for row in rows_one] == [
        (row["step"], sorted(row)) for row in rows_many
    ]
    for a, b in zip(rows_one, rows_many, strict=True):
        for name in a:
            if not name.startswith("perf/"):
                rtol = 5e-6 if name.endswith("/loss") else 1e-4
                np.testing.assert_allclose(b[name], a[name], rtol=rtol, err_msg=name)
    for split in ("valid", "test"):
        result = json.loads((many / f"eval_{split}.json").read_text())
        assert result["token_count"] == scores[split]["token_count"]
        np.testing.assert_allclose(result["loss"], scores[split]["loss"], rtol=5e-6)
        ours, theirs = (np.load(folder / f"documents_{split}.npz") for folder in (one, many))
        for name in ("nats", "tokens", "bytes"):  # in the same order
            np.testing.assert_allclose(theirs[name], ours[name], rtol=1e-4)


@pytest.mark.slow
def test_a_run_goes_on_in_two_processes_and_opens_in_one(text, alone, tmp_path, monkeypatch):
    """One device with two micro-batches, then two that share the parameters, with one."""
    begun(text, tmp_path, monkeypatch)
    said = go_on_together(text, tmp_path, 2, mesh__fsdp=2, data__micro_batch=0)
    assert ["compiling" in out for out in said] == [True, False]  # the first one speaks
    check_same_run(*alone, tmp_path)
    run = workdir.open_trained(tmp_path)
    assert run.cfg.mesh.fsdp == 2 and run.mesh.size == 1
    loss = evaluate.Evaluator.of(run, open_data(run.cfg))(run.params, "test")["loss"]
    np.testing.assert_allclose(loss, alone[1]["test"]["loss"], rtol=5e-6)


@pytest.mark.slow
@pytest.mark.long
def test_a_run_goes_on_in_four_processes(text, alone, tmp_path, monkeypatch):
    """Two and two of them read the same rows."""
    begun(text, tmp_path, monkeypatch)
    go_on_together(text, tmp_path, 4, mesh__fsdp=2, mesh__tensor=2)
    check_same_run(*alone, tmp_path)
