import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm_jax import checkpoint, config, evaluate, loop
from lm_jax.checkpoint import Checkpoints, abstract_like, find_kept
from lm_jax.config import Config, ConfigError
from lm_jax.workdir import open_trained, read_record
from tests.helpers import small


def state(seed):
    """Leaves of every dtype that a run has."""
    keys = jax.random.split(jax.random.key(seed), 2)
    return {
        "step": jnp.int32(seed),
        "params": {"kernel": jax.random.normal(keys[0], (3, 5))},
        "moments": [jax.random.normal(keys[1], (7,)).astype(jnp.bfloat16), None],
        "scale": jnp.float32(1.5),
    }


def abstract(tree):
    return abstract_like(jax.eval_shape(lambda: tree), jax.tree.map(lambda x: x.sharding, tree))


def folders(path):
    return sorted(int(p.name) for p in path.iterdir() if p.name.isdigit())


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.sharding == y.sharding
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.fixture
def checkpoints(tmp_path):
    opened = Checkpoints(tmp_path, 2)
    yield opened
    opened.close()


def test_empty_folder_has_no_position(checkpoints):
    assert checkpoints.position() is None and checkpoints.position(best=True) is None


def test_newest_and_best_are_kept_apart(checkpoints, tmp_path):
    for position in range(1, 6):
        manifest = {"position": position, "best_loss": 0.5}
        if position in (1, 2):
            checkpoints.save(state(position), manifest, best=True)
        checkpoints.save(state(position), manifest)
    checkpoints.wait()
    assert folders(tmp_path / "checkpoints") == [4, 5] and folders(tmp_path / "best") == [2]
    assert checkpoints.position() == 5 and checkpoints.position(best=True) == 2
    same(checkpoints.restore(abstract(state(0))), state(5))
    same(checkpoints.restore(abstract(state(0)), best=True), state(2))
    assert checkpoints.manifest()["position"] == 5
    assert checkpoints.manifest(best=True)["position"] == 2


def test_reopened_folder_gives_the_same_leaves_and_manifest(checkpoints, tmp_path):
    manifest = {"position": 7, "tokens": 2**40, "best_loss": 1 / 3, "best_position": None}
    checkpoints.save(state(7), manifest)
    checkpoints.close()
    again = Checkpoints(tmp_path, 2)
    same(again.restore(abstract(state(0))), state(7))
    assert again.manifest() == manifest
    again.close()


def test_saved_values_are_those_of_the_call(checkpoints):
    """Saving goes on in the background while the loop donates the state to the next update."""
    before = state(1)
    double = jax.jit(lambda x: jax.tree.map(lambda leaf: leaf * 2, x), donate_argnums=0)
    checkpoints.save(before, {"position": 1})
    after = double(before)
    checkpoints.wait()
    same(checkpoints.restore(abstract(state(0))), state(1))
    assert after["scale"] == 3


def test_half_written_step_is_ignored(checkpoints, tmp_path):
    checkpoints.save(state(3), {"position": 3})
    checkpoints.close()
    half = tmp_path / "checkpoints" / "6.orbax-checkpoint-tmp"
    (half / "state").mkdir(parents=True)
    (half / "state" / "manifest.ocdbt").write_bytes(b"half")
    kept = find_kept(tmp_path)
    assert list(kept) == [3] and kept[3].manifest()["position"] == 3
    assert half.exists(), "another process may be writing it"
    again = Checkpoints(tmp_path, 2)
    assert again.position() == 3 and again.manifest()["position"] == 3
    same(again.restore(abstract(state(0))), state(3))
    again.save(state(6), {"position": 6})
    again.wait()
    assert again.position() == 6 and folders(tmp_path / "checkpoints") == [3, 6]
    same(again.restore(abstract(state(0))), state(6))
    again.close()


def test_rising_valid_loss_leaves_the_newest_and_the_best(text, tmp_path, monkeypatch):  # noqa: F811
    losses = iter([3.0, 2.0, 2.5, 4.0, 4.0, 4.0])
    score = evaluate.Evaluator.__call__

    def rising(self, params, split_name):
        return score(self, params, split_name) | {"loss": next(losses)}

    monkeypatch.setattr(evaluate.Evaluator, "__call__", rising)
    cfg = small(
        text,
        train__steps="4",
        train__eval_every="1",
        train__checkpoint_every="1",
        train__steps_per_call=1,
        optim__warmup="1",
    )
    results = loop.train_and_evaluate(cfg, tmp_path)
    assert folders(tmp_path / "checkpoints") == [3, 4] and folders(tmp_path / "best") == [2]
    assert results["valid"]["step"] == results["test"]["step"] == 2
    checkpoints = Checkpoints(tmp_path, 2)
    for best in (False, True):
        manifest = checkpoints.manifest(best=best)
        assert manifest["best_loss"] == 2.0 and manifest["best_position"] == 2
    checkpoints.close()
    newest, best = (open_trained(tmp_path, checkpoint=which) for which in ("last", "best"))
    assert (newest.step, best.step) == (4, 2)
    for a, b in zip(jax.tree.leaves(newest.params), jax.tree.leaves(best.params), strict=True):
        assert (a != b).any()


def test_a_run_of_another_layout_is_refused_in_one_sentence(tmp_path):
    path = tmp_path / "config.json"
    checkpoint.refuse_older(path, {"versions": {"lm_jax": "0.2.0"}})
    with pytest.raises(ConfigError, match=r"config.json: .*lm_jax 0\.1\.0, .*go on with that one"):
        checkpoint.refuse_older(path, {"versions": {"lm_jax": "0.1.0"}})


def test_a_manifest_may_change_after_it_was_handed_over(checkpoints):
    manifest = {"position": 3, "best_loss": 0.5}
    checkpoints.save(state(3), manifest)
    manifest["best_loss"] = 0.1
    checkpoints.wait()
    assert checkpoints.manifest()["best_loss"] == 0.5


def test_what_cannot_be_saved_is_no_silence(checkpoints, tmp_path):
    checkpoints.save(state(6), {"position": 6})
    checkpoints.wait()
    with pytest.raises(RuntimeError, match="update 3 could not be saved beside that of update 6"):
        checkpoints.save(state(3), {"position": 3})
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(RuntimeError, match="checkpoints: was removed while the run went on"):
        checkpoints.save(state(7), {"position": 7})


def test_the_best_of_updates_made_anew_replaces_that_of_before_a_kill(checkpoints, tmp_path):
    for position in (6, 4, 4):
        checkpoints.save(state(position), {"position": position}, best=True)
    checkpoints.wait()
    assert folders(tmp_path / "best") == [4]


def write_record(folder, **changes):
    data = {"vocab_size": 300, "splits": {"train": {"tokens": 1000}}}
    record = {"config": config.to_dict(Config()), "data": data, "devices": ["cpu"]} | changes
    (folder / "config.json").write_text(json.dumps(record))


def test_results_of_another_layout_are_read_and_its_checkpoints_refused(tmp_path):
    write_record(tmp_path, versions={"lm_jax": "0.1.0"})
    assert read_record(tmp_path).cfg == Config()
    with pytest.raises(ConfigError, match=r"lm_jax 0\.1\.0"):
        read_record(tmp_path, checkpoints=True)
    with pytest.raises(ConfigError, match=r"lm_jax 0\.1\.0"):
        open_trained(tmp_path)


@pytest.mark.parametrize(
    "changes", [{"config": {"x": 1}}, {"config": 3}, {"data": {}}, {"data": None}, {"devices": []}]
)
def test_a_broken_record_is_named_in_one_sentence(tmp_path, changes):
    write_record(tmp_path, **changes)
    with pytest.raises(ConfigError, match=r"config\.json: not as a run writes it .*\.$") as caught:
        read_record(tmp_path)
    assert str(caught.value).count(". ") == 0
    (tmp_path / "config.json").write_text('{"config": {"mod')
    with pytest.raises(ConfigError, match=r"config\.json: not as a run writes it \(JSON"):
        read_record(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="give the workdir of a run"):
        read_record(tmp_path)
