import contextlib
import errno
import json
import os
import resource
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from lm_jax import config, evaluate, loop, rundir
from lm_jax.checkpoint import (
    Checkpoints,
    Damaged,
    Kept,
    abstract_like,
    find_kept,
    first_good,
    kept_in,
)
from lm_jax.checksum import checksums
from lm_jax.config import Config, ConfigError
from lm_jax.workdir import open_trained, read_metrics, read_record
from tests.helpers import small


def state(seed):
    """Leaves of every dtype that a run has."""
    keys = jax.random.split(jax.random.key(seed), 2)
    return {
        "step": jnp.int32(seed),
        "params": {"kernel": jax.random.normal(keys[0], (30, 50))},
        "moments": [jax.random.normal(keys[1], (7,)).astype(jnp.bfloat16), None],
        "scale": jnp.float32(1.5),
    }


def abstract(tree):
    return abstract_like(jax.eval_shape(lambda: tree), jax.tree.map(lambda x: x.sharding, tree))


def whole(kept):
    """The state as it was saved."""
    return kept.restore(abstract(state(0)))


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
    same(checkpoints.restore(whole), state(5))
    same(whole(kept_in(tmp_path, "best")[0]), state(2))
    assert checkpoints.restore(Kept.manifest)["position"] == 5
    assert checkpoints.best()["position"] == 2


def test_reopened_folder_gives_the_same_leaves_and_manifest(checkpoints, tmp_path):
    manifest = {"position": 7, "tokens": 2**40, "best_loss": 1 / 3, "best_position": None}
    checkpoints.save(state(7), manifest)
    checkpoints.close()
    again = Checkpoints(tmp_path, 2)
    same(again.restore(whole), state(7))
    assert again.restore(Kept.manifest) == manifest
    again.close()


def test_saved_values_are_those_of_the_call(checkpoints):
    """Saving goes on in the background while the loop donates the state to the next update."""
    before = state(1)
    double = jax.jit(lambda x: jax.tree.map(lambda leaf: leaf * 2, x), donate_argnums=0)
    checkpoints.save(before, {"position": 1})
    after = double(before)
    checkpoints.wait()
    same(checkpoints.restore(whole), state(1))
    assert after["scale"] == 3


def test_half_written_step_is_ignored(checkpoints, tmp_path):
    checkpoints.save(state(3), {"position": 3})
    checkpoints.close()
    half = tmp_path / "checkpoints" / "6.orbax-checkpoint-tmp"
    (half / "state").mkdir(parents=True)
    (half / "state" / "manifest.ocdbt").write_bytes(b"half")
    (kept,) = find_kept(tmp_path)
    assert kept.update == 3 and kept.manifest()["position"] == 3
    assert half.exists(), "another process may be writing it"
    again = Checkpoints(tmp_path, 2)
    assert again.position() == 3 and again.restore(Kept.manifest)["position"] == 3
    same(again.restore(whole), state(3))
    again.save(state(6), {"position": 6})
    again.wait()
    assert again.position() == 6 and folders(tmp_path / "checkpoints") == [3, 6]
    same(again.restore(whole), state(6))
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
    newest, _, best = find_kept(tmp_path)
    for manifest in (newest.manifest(), best.manifest()):
        assert manifest["best_loss"] == 2.0 and manifest["best_position"] == 2
    newest, best = (open_trained(tmp_path, checkpoint=which) for which in ("last", "best"))
    assert (newest.step, best.step) == (4, 2)
    for a, b in zip(jax.tree.leaves(newest.params), jax.tree.leaves(best.params), strict=True):
        assert (a != b).any()


def test_a_run_of_another_layout_is_refused_in_one_sentence(tmp_path):
    path = tmp_path / "config.json"
    rundir.refuse_older(path, {"versions": {"lm_jax": "0.2.0"}})
    with pytest.raises(ConfigError, match=r"config.json: .*lm_jax 0\.1\.0, .*go on with that one"):
        rundir.refuse_older(path, {"versions": {"lm_jax": "0.1.0"}})
    for versions in (None, 3, {"lm_jax": 3}):
        rundir.refuse_older(path, {"versions": versions})


def test_a_manifest_may_change_after_it_was_handed_over(checkpoints):
    manifest = {"position": 3, "best_loss": 0.5}
    checkpoints.save(state(3), manifest)
    manifest["best_loss"] = 0.1
    checkpoints.wait()
    assert checkpoints.restore(Kept.manifest)["best_loss"] == 0.5


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


def largest(folder):
    """The file with most of the data of a checkpoint."""
    return max(
        (x for x in (folder / "state").rglob("*") if x.is_file()), key=lambda x: x.stat().st_size
    )


def flip(path, bit=None):
    """Turn one bit of a file, by default in its middle."""
    data = bytearray(path.read_bytes())
    bit = 4 * len(data) if bit is None else bit
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGES = {
    "a bit of the data": lambda folder: flip(largest(folder)),
    "cut data": lambda folder: cut(largest(folder)),
    "no data": lambda folder: largest(folder).unlink(),
    "cut index": lambda folder: cut(folder / "state" / "manifest.ocdbt"),
    "no state": lambda folder: shutil.rmtree(folder / "state"),
    "a bit of the manifest": lambda folder: flip(folder / "manifest" / "metadata"),
    "cut manifest": lambda folder: cut(folder / "manifest" / "metadata"),
    "empty manifest": lambda folder: (folder / "manifest" / "metadata").write_bytes(b""),
    "no manifest": lambda folder: shutil.rmtree(folder / "manifest"),
    "an empty folder": empty,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_gives_way_to_the_newest_good_one(tmp_path, damage, capsys):
    first = Checkpoints(tmp_path, 3)
    for position in (4, 8, 12):
        first.save(state(position), {"position": position})
    first.close()
    damaged = tmp_path / "checkpoints" / "12"
    damage(damaged)
    good, found = first_good(kept_in(tmp_path, "checkpoints"), whole)
    same(found, state(8))
    assert good.update == 8 and damaged.exists(), "a reader renames nothing"
    (said,) = capsys.readouterr().out.splitlines()
    assert f"{damaged}: damaged (" in said and "; update 8 is taken in its place" in said
    again = Checkpoints(tmp_path, 3)
    same(again.restore(whole), state(8))
    assert again.position() == 8 and damaged.with_name("12.damaged").exists()
    again.save(state(12), {"position": 12})
    again.close()
    assert folders(tmp_path / "checkpoints") == [4, 8, 12]
    same(whole(find_kept(tmp_path)[0]), state(12))


def test_no_bit_of_a_checkpoint_changes_unseen(checkpoints, tmp_path):
    manifest = {"position": 3, "best_loss": 0.5}
    checkpoints.save(state(3), manifest)
    checkpoints.wait()
    (kept,), refused = find_kept(tmp_path), 0
    rng = np.random.default_rng(0)
    part = abstract({"params": state(3)["params"]})
    for path in sorted(x for x in kept.path.rglob("*") if x.is_file()):
        before = path.read_bytes()
        for bit in rng.integers(0, 8 * len(before), 3):
            flip(path, int(bit))
            try:
                assert kept.manifest() == manifest
                same(whole(kept), state(3))
                same(kept.restore(part)["params"], state(3)["params"])
                kept.verify()
            except Damaged:
                refused += 1
            path.write_bytes(before)
    assert refused > 10


def test_a_checksum_tells_every_bit_and_no_sharding():
    leaves = {
        "float32": np.linspace(-1, 1, 24, dtype=np.float32).reshape(2, 3, 4),
        "bfloat16": np.asarray(jnp.linspace(-1, 1, 5, dtype=jnp.bfloat16)),
        "int32": np.array(7, np.int32),
        "int8": np.arange(4, dtype=np.int8),
        "bool": np.array([True, False]),
    }
    known = checksums(leaves)
    assert checksums(jax.tree.map(jnp.asarray, leaves)) == known
    for name, leaf in leaves.items():
        data = leaf.tobytes()
        for bit in range(1 if name == "bool" else 8 * len(data)):
            one = bytearray(data)
            one[bit // 8] ^= 1 << bit % 8
            other = np.frombuffer(one, leaf.dtype).reshape(leaf.shape)
            assert checksums({name: other}) != {name: known[name]}
    signs = leaves["float32"] * np.where(np.arange(4) < 2, -1, 1).astype(np.float32)
    assert checksums({"": signs})[""] != known["float32"]
    large = np.arange(3 << 19, dtype=np.float32).reshape(3, -1)  # is compiled
    piecewise = np.concatenate([large[:, :9], large[:, 9:]], axis=1)
    assert checksums([jnp.asarray(large)]) == checksums([large])
    assert checksums([piecewise]) == checksums([large])
    assert checksums([large[::-1]]) != checksums([large])


def test_a_checkpoint_of_before_there_were_checksums_is_read(checkpoints, tmp_path, capsys):
    checkpoints.save(state(3), {"position": 3, "best_loss": 0.5})
    checkpoints.wait()
    path = tmp_path / "checkpoints" / "3" / "manifest" / "metadata"
    path.write_text('{"position": 3, "best_loss": 0.5}')
    same(checkpoints.restore(whole), state(3))
    assert checkpoints.restore(Kept.manifest) == {"position": 3, "best_loss": 0.5}
    assert not capsys.readouterr().out


def test_where_all_are_damaged_one_sentence_says_so_and_nothing_is_touched(checkpoints, tmp_path):
    for position in (4, 8):
        checkpoints.save(state(position), {"position": position})
    checkpoints.save(state(4), {"position": 4}, best=True)
    checkpoints.wait()
    paths = [tmp_path / place for place in ("checkpoints/8", "checkpoints/4", "best/4")]
    for path in paths:
        cut(path / "manifest" / "metadata")
    with pytest.raises(Damaged) as raised:
        checkpoints.restore(whole)
    told = str(raised.value)
    assert all(f"{path}: damaged (" in told for path in paths) and "another --workdir." in told
    assert all(path.exists() for path in paths)


def test_a_best_that_cannot_be_copied_leaves_all_as_it_is(checkpoints, tmp_path):
    """Without any newest checkpoint the next start would begin anew, and remove the best."""
    checkpoints.save(state(8), {"position": 8})
    checkpoints.save(state(6), {"position": 6}, best=True)
    checkpoints.wait()
    flip(largest(tmp_path / "checkpoints" / "8"))

    with full_disk(4096), pytest.raises(OSError, match="File too large") as raised:
        checkpoints.restore(whole)
    assert raised.value.errno == errno.EFBIG
    assert raised.value.filename.startswith(str(tmp_path))
    assert os.listdir(tmp_path / "checkpoints") == ["8"] and folders(tmp_path / "best") == [6]
    same(checkpoints.restore(whole), state(6))


@pytest.mark.parametrize("best", [6, 8])
@pytest.mark.parametrize("renames", range(4))
def test_a_kill_while_the_best_takes_their_place_loses_nothing(
    checkpoints, tmp_path, monkeypatch, best, renames
):
    for position in (4, 8):
        checkpoints.save(state(position), {"position": position})
    checkpoints.save(state(best), {"position": best}, best=True)
    checkpoints.wait()
    for position in (4, 8):
        flip(largest(tmp_path / "checkpoints" / str(position)))
    left = iter(range(renames))

    def dying(rename):
        def renamed(*paths):
            if next(left, None) is None:
                raise KeyboardInterrupt
            rename(*paths)

        return renamed

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        for name in ("replace", "rename"):
            patched.setattr(os, name, dying(getattr(os, name)))
        checkpoints.restore(whole)
    again = Checkpoints(tmp_path, 2)
    assert again.position() is not None
    same(again.restore(whole), state(best))
    again.close()


def test_a_checkpoint_that_goes_while_it_is_read_is_no_damage(checkpoints, tmp_path):
    """Orbax removes an old one file by file, and a reader may stand beside the trainer."""
    checkpoints.save(state(8), {"position": 8})
    checkpoints.wait()
    (kept,) = find_kept(tmp_path)
    shutil.rmtree(kept.path / "manifest")
    threading.Timer(0.3, shutil.rmtree, [kept.path]).start()
    with pytest.raises(FileNotFoundError, match=f"{kept.path} is gone"):
        kept.manifest()


def test_rights_that_are_missing_are_no_damage(checkpoints, tmp_path, monkeypatch):
    checkpoints.save(state(8), {"position": 8})
    checkpoints.wait()
    shutil.rmtree(tmp_path / "checkpoints" / "8" / "manifest")  # so it looks to orbax
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    with pytest.raises(PermissionError, match="checkpoints/8"):
        checkpoints.restore(whole)


def test_what_the_disk_refuses_is_no_damage(checkpoints, tmp_path, monkeypatch):
    checkpoints.save(state(8), {"position": 8})
    checkpoints.wait()
    (kept,) = find_kept(tmp_path)

    def broken(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(ocp.Checkpointer, "restore", broken)
        with pytest.raises(OSError, match="Input/output error") as raised:
            checkpoints.restore(whole)
    assert raised.value.filename == str(kept.path)
    shutil.rmtree(kept.path)
    with pytest.raises(FileNotFoundError, match=f"{kept.path} is gone"):
        kept.manifest()


def test_the_best_takes_the_place_of_all_others(checkpoints, tmp_path):
    for position in (4, 8):
        checkpoints.save(state(position), {"position": position})
    checkpoints.save(state(6), {"position": 6}, best=True)
    checkpoints.wait()
    for position in (4, 8):
        flip(largest(tmp_path / "checkpoints" / str(position)))
    same(checkpoints.restore(whole), state(6))
    assert checkpoints.position() == checkpoints.position(best=True) == 6
    checkpoints.save(state(8), {"position": 8})
    checkpoints.wait()
    assert folders(tmp_path / "checkpoints") == [6, 8]


def test_a_damaged_best_is_set_aside(checkpoints, tmp_path, capsys):
    checkpoints.save(state(6), {"position": 6, "best_loss": 0.5}, best=True)
    checkpoints.wait()
    assert checkpoints.best()["best_loss"] == 0.5
    cut(tmp_path / "best" / "6" / "manifest" / "metadata")
    assert checkpoints.best() == {} and checkpoints.position(best=True) is None
    assert "best/6: damaged" in capsys.readouterr().out
    assert (tmp_path / "best" / "6.damaged").exists()


@contextlib.contextmanager
def full_disk(size):
    """No file may be larger, as on a disk that is full; the system's own way, without root."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_told_by_its_name_and_older_checkpoints_survive(tmp_path, capfd):
    checkpoints = Checkpoints(tmp_path, 1)
    checkpoints.save(state(4), {"position": 4})
    checkpoints.wait()
    with full_disk(4096):
        checkpoints.save(state(8), {"position": 8})  # goes on in the background
        with pytest.raises(OSError, match="File too large") as raised:
            checkpoints.wait()
    assert raised.value.errno == errno.EFBIG and raised.value.filename == str(tmp_path)
    checkpoints.close()
    assert folders(tmp_path / "checkpoints") == [4] and not capfd.readouterr().err
    again = Checkpoints(tmp_path, 1)
    same(again.restore(whole), state(4))
    again.save(state(8), {"position": 8})
    again.close()
    assert folders(tmp_path / "checkpoints") == [8]
    same(whole(find_kept(tmp_path)[0]), state(8))


def test_damaged_lines_of_metrics_are_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(
        b'{"step": 1}\n{"stfp": 2}\n\xff{"step": 3}\n{"step": 4}\n{"st'
    )
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 4]
