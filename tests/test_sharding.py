"""Several devices and several processes compute what one device computes."""

import json
import os
import pathlib
import pickle
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from lm_jax import checkpoint, loop, sharding, step
from lm_jax.config import MeshConfig
from lm_jax.models.families import create_model
from lm_jax.objective import NextToken
from tests.helpers import ROOT, random_batch, small, tiny_config

V = 29
UPDATES = 5
FSDP = {"one": None, "data": 1, "fsdp2": 2, "fsdp8": 8}  # value of config.mesh.fsdp; None: no mesh
RUNS = [  # mesh and accumulation
    ("one", 1), ("one", 2), ("data", 1), ("data", 2), ("fsdp2", 2), ("fsdp8", 1), ("fsdp8", 2)
]  # fmt: skip


class Shape:
    def __init__(self, **sizes):
        self.shape = sizes


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((8, 12), (None, "fsdp")),  # the longest
        ((12, 7), ("fsdp", None)),
        ((16, 18), ("fsdp", None)),  # the longest that 4 divides
        ((4, 4), ("fsdp", None)),
        ((2, 3), (None, None)),
        ((0, 3), (None, None)),
        ((), ()),
    ],
)
def test_by_shape_splits_the_longest_axis_that_fits(monkeypatch, shape, spec):
    monkeypatch.setattr(sharding, "NamedSharding", lambda mesh, spec: spec)
    tree = {"a": jax.ShapeDtypeStruct(shape, np.float32)}
    assert sharding.places(Shape(data=2, fsdp=4), tree) == {"a": PartitionSpec(*spec)}
    whole = PartitionSpec(*[None] * len(shape))
    assert sharding.places(Shape(data=8, fsdp=1), tree) == {"a": whole}


def test_round_up(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 6)
    assert [sharding.round_up(n) for n in (1, 6, 7, 12, 13)] == [6, 6, 12, 12, 18]


def test_make_mesh_names_the_field(monkeypatch):
    assert dict(sharding.make_mesh(MeshConfig()).shape) == {"data": jax.device_count(), "fsdp": 1}
    monkeypatch.setattr(jax, "device_count", lambda: 6)
    with pytest.raises(ValueError, match=r"config\.mesh\.fsdp: 4 does not divide the 6 devices"):
        sharding.make_mesh(4)


def cluster(monkeypatch, **variables):
    """What `initialize` passes to jax.distributed under these environment variables."""
    calls = []
    for name in list(os.environ):
        if name.startswith(("JAX_", "SLURM", "OMPI")):
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **kwargs: calls.append(kwargs))
    sharding.initialize()
    return calls


def test_initialize_joins_only_where_there_are_several(monkeypatch):
    assert cluster(monkeypatch) == []
    assert cluster(monkeypatch, JAX_NUM_PROCESSES="1", SLURM_STEP_NUM_TASKS="1") == []
    assert len(cluster(monkeypatch, SLURM_STEP_NUM_TASKS="2")) == 1
    # A batch script of a job with four tasks, itself not started by srun, is alone.
    assert cluster(monkeypatch, SLURM_NTASKS="4") == []
    assert len(cluster(monkeypatch, OMPI_COMM_WORLD_SIZE="2")) == 1
    (call,) = cluster(monkeypatch, JAX_NUM_PROCESSES="2", JAX_PROCESS_ID="1")
    # jax itself reads neither of the two variables.
    assert call["num_processes"] == 2 and call["process_id"] == 1


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


def ragged_batches():
    """Five batches of 16 rows whose numbers of scored tokens differ row by row, down to none."""
    batches = random_batch(np.random.default_rng(0), (UPDATES, 16, 12), V)
    for row in range(16):
        batches["weights"][:, row, 1 + row % 12 :] = 0
    return batches


def sharded_config(accumulation, devices):
    # Adam divides by the root of the second moment plus eps: where a gradient is as small as its
    # rounding error, eps is what keeps the error of the update small.
    return tiny_config(
        model__layers=1,
        data__batch_size=16,
        data__micro_batch=16 // devices // accumulation,
        optim__eps=1e-3,
        optim__peak_lr=1e-2,
        optim__ema_decay=0.9,
    )


def run_on(mesh, accumulation):
    """Metrics, state on the host and shard shapes after the updates; as loop.py does it."""
    cfg = sharded_config(accumulation, mesh.size)
    graphdef, init = create_model(cfg, V, "reference")

    def init_state(key):
        return step.init_state(cfg, init(key))

    abstract = jax.eval_shape(init_state, jax.random.key(3))
    shardings = sharding.places(mesh, abstract)
    state = jax.jit(init_state, out_shardings=shardings)(jax.random.key(3))
    start = jax.device_get(state.params)
    batches = sharding.put_batch(mesh, ragged_batches(), axis=1)
    with jax.set_mesh(mesh):
        state, metrics = step.make_train_step(cfg, NextToken.of(cfg, graphdef))(state, batches)
    rows = jax.tree.map(lambda x: x[0], ragged_batches())
    sums = step.make_eval_step(cfg, graphdef)(state.params, sharding.put_batch(mesh, rows, axis=0))
    names = [jax.tree_util.keystr(p) for p, _ in jax.tree.leaves_with_path(state)]
    shards = [(x.shape, x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(state)]
    result = {
        "metrics": jax.device_get(metrics),
        "start": start,
        "state": jax.device_get(state),
        "eval": jax.device_get(sums),
        "shards": dict(zip(names, shards, strict=True)),
        "rows": batches["tokens"].sharding.shard_shape(batches["tokens"].shape),
    }
    return result, state, abstract


def on_eight_devices(folder):
    """The body of the child process: every mesh, then a checkpoint moved between them."""
    assert jax.device_count() == 8
    folder = pathlib.Path(folder)
    results = {}
    for name, accumulation in RUNS:
        if name == "one":
            auto = (jax.sharding.AxisType.Auto,) * 2
            mesh = jax.make_mesh(
                (1, 1), ("data", "fsdp"), axis_types=auto, devices=jax.devices()[:1]
            )
        else:
            mesh = sharding.make_mesh(FSDP[name])
        results[name, accumulation], state, abstract = run_on(mesh, accumulation)

    checkpoints = checkpoint.Checkpoints(folder, 1)  # of fsdp8
    checkpoints.save(state, {"position": 5})
    checkpoints.wait()
    for fsdp in (1, 2):
        shardings = sharding.places(sharding.make_mesh(fsdp), abstract)
        like = checkpoint.abstract_like(abstract, shardings)
        restored = checkpoint.find_kept(folder)[0].restore(like)
        same = jax.tree.map(lambda x, s: x.sharding == s, restored, shardings)
        assert jax.tree.all(same)
        results["restored", fsdp] = jax.device_get(restored)
    checkpoints.close()
    (folder / "results.pickle").write_bytes(pickle.dumps(results))


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eight")
    child = python(
        f"from tests import test_sharding as t; t.on_eight_devices({str(folder)!r})",
        XLA_FLAGS=os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8",
        JAX_NUMPY_RANK_PROMOTION="raise",
    )
    try:
        out, _ = child.communicate(timeout=300)
    finally:
        child.kill()
        child.communicate()
    assert child.returncode == 0, out
    return pickle.loads((folder / "results.pickle").read_bytes())


def close(a, b, rtol, atol):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), a, b)


# Sums of n float32 terms in another order differ by some sqrt(n) eps; the longest are over the
# vocabulary, the rows and the tokens of a batch, n < 16 * 11 * 29, sqrt(n) eps = 9e-6 at most.
RTOL = (16 * 11 * V) ** 0.5 * np.finfo(np.float32).eps


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "accumulation"), RUNS[2:])
def test_every_mesh_trains_like_one_device(eight, mesh, accumulation):
    one, many = eight["one", accumulation], eight[mesh, accumulation]
    close(one["start"], many["start"], 0, 0)
    assert len(one["metrics"]["train/loss"]) == UPDATES
    for name in ("train/loss", "optim/grad_norm", "optim/update_norm", "optim/param_norm"):
        close(one["metrics"][name], many["metrics"][name], RTOL, 0)
    np.testing.assert_array_equal(one["metrics"]["data/scored"], many["metrics"]["data/scored"])
    # An update moves an element by up to lr = 1e-2; its error is the gradient's, RTOL of a norm
    # clipped to 1, over Adam's eps of 1e-3 at worst: 1e-4 of a whole update would already be a lot.
    atol = UPDATES * 1e-2 * 1e-4
    close(one["state"].params, many["state"].params, 0, atol)
    close(one["state"].ema, many["state"].ema, 0, atol)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), one["start"], one["state"].params)
    assert all(m > 100 * atol for m in jax.tree.leaves(moved))


@pytest.mark.slow
def test_accumulation_over_devices_is_one_batch(eight):
    for mesh in ("one", "data", "fsdp8"):
        whole, micro = eight[mesh, 1]["metrics"], eight[mesh, 2]["metrics"]
        for name in ("train/loss", "optim/grad_norm"):
            close(whole[name], micro[name], RTOL, 0)


@pytest.mark.slow
def test_evaluation_sums_are_equal(eight):
    one = eight["one", 2]["eval"]
    assert one["count"] == ragged_batches()["weights"][0, :, 1:].sum() > one["correct"] > 0
    for mesh in ("data", "fsdp2", "fsdp8"):
        many = eight[mesh, 2]["eval"]
        assert many["count"] == one["count"] and many["correct"] == one["correct"]
        close(one["nats"], many["nats"], 10 * RTOL, 0)  # the parameters differ as well


@pytest.mark.slow
def test_parameters_moments_and_rows_are_really_split(eight):
    for mesh, fsdp in FSDP.items():
        result = eight[mesh, 2]
        assert result["rows"] == (UPDATES, 16 if mesh == "one" else 2, 12)
        for name, (whole, part) in result["shards"].items():
            axes = [n for n in whole if n % (fsdp or 1) == 0]
            size = fsdp if fsdp and axes else 1
            assert np.prod(whole) == size * np.prod(part), (mesh, name, whole, part)
    matrices = [name for name in eight["fsdp8", 2]["shards"] if "kernel" in name]
    assert len(matrices) == 4 * 4  # parameters, two moments, average


@pytest.mark.slow
def test_a_checkpoint_moves_between_meshes(eight):
    saved = eight["fsdp8", 2]["state"]
    for fsdp in (1, 2):
        restored = eight["restored", fsdp]
        jax.tree.map(np.testing.assert_array_equal, saved, restored)
        assert all(
            a.dtype == b.dtype
            for a, b in zip(jax.tree.leaves(saved), jax.tree.leaves(restored), strict=True)
        )


def text_config(folder):
    return small(
        folder,
        optim__eps=1e-3,
        train__steps="6",
        train__eval_every="3",
        train__checkpoint_every="4",
        train__steps_per_call=1,
    )


TWO = """
import jax
from lm_jax import config, sharding, loop
sharding.initialize()
from tests import test_sharding as t
# Two micro-batches, as one process has: each has draws of dropout of its own.
cfg = config.replace(t.text_config(t.pathlib.Path({text!r})), mesh__fsdp=2, data__micro_batch=1)
loop.train_and_evaluate(cfg, {workdir!r})
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The same run by one process, and by two processes that share the parameters."""
    text, workdirs = tmp_path_factory.mktemp("text"), tmp_path_factory.mktemp("runs")
    rng = np.random.default_rng(0)
    for i in range(30):
        (text / f"{i:02}.txt").write_text(" ".join(rng.choice(["ba", "du", "kilo", "no"], 60)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = TWO.format(text=str(text), workdir=str(workdirs / "two"))
    children = [
        python(
            code,
            JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}",
            JAX_NUM_PROCESSES="2",
            JAX_PROCESS_ID=str(i),
        )
        for i in range(2)
    ]
    try:
        single = loop.train_and_evaluate(text_config(text), workdirs / "one")
        said = [child.communicate(timeout=300)[0] for child in children]
        for child, out in zip(children, said, strict=True):
            assert child.returncode == 0, out
    finally:
        for child in children:
            child.kill()
            child.communicate()
    return workdirs, single, said


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_two_processes_are_one_run(two):
    workdirs, single, said = two
    assert ["compiling" in out for out in said] == [True, False]  # the first one speaks
    one, both = rows(workdirs / "one"), rows(workdirs / "two")
    assert [(row["step"], sorted(row)) for row in one] == [
        (row["step"], sorted(row)) for row in both
    ]
    for a, b in zip(one, both, strict=True):
        for name in a:
            if not name.startswith("perf/"):
                np.testing.assert_allclose(b[name], a[name], rtol=1e-4, err_msg=name)
    for split in ("valid", "test"):
        result = json.loads((workdirs / "two" / f"eval_{split}.json").read_text())
        assert result["token_count"] == single[split]["token_count"]
        np.testing.assert_allclose(result["loss"], single[split]["loss"], rtol=1e-4)
        ours, theirs = (np.load(workdirs / n / f"documents_{split}.npz") for n in ("one", "two"))
        for name in ("nats", "tokens", "bytes"):  # in the same order
            np.testing.assert_allclose(theirs[name], ours[name], rtol=1e-3)
