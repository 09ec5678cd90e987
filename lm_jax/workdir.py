"""The files of a run, in its folder: what it is, what it has learnt."""

import dataclasses
import datetime
import importlib.metadata
import json
import pathlib
import platform
import shutil
import subprocess
from typing import Any

import jax
from jax.sharding import Mesh

import lm_jax
from lm_jax import checkpoint, config, sharding
from lm_jax.config import Config, ConfigError
from lm_jax.data.open import open_data
from lm_jax.data.store import Store
from lm_jax.files import write_json
from lm_jax.models.families import choose_attention, create_model


def record_config(
    workdir: pathlib.Path, cfg: Config, store: Store, *, resuming: bool, asked: Config
) -> None:
    """Write `config.json` and the tokenizer, or compare with those of the run to be resumed.

    `asked` is the config as written, `cfg` what it became here.

    Raises:
        ConfigError: if a run with another config lives in the workdir, naming the keys.
    """
    path = workdir / "config.json"
    if resuming:
        old = json.loads(path.read_text())
        checkpoint.refuse_older(path, old)
        # A field that came later had its default.
        before = config.from_record(old)
        own, here = before.train.compute_dtype, cfg.train.compute_dtype
        if asked.train.compute_dtype == "auto" and own != here:
            raise config.ConfigError(
                f"config.train.compute_dtype: 'auto' is {here} on this device, and the run in "
                f"{workdir} computes in {own}; give --config.train.compute_dtype={own} to go on."
            )
        changes = config.difference(before, cfg)
        if changes:
            raise config.ConfigError(
                f"{path}: the run there has another config ({'; '.join(changes)}); "
                "give the same config or another --workdir."
            )
        if old["data"] != store.manifest:
            raise config.ConfigError(
                f"{path}: the run there was trained on another corpus or tokenizer; "
                "restore the data or give another --workdir."
            )
        return
    if jax.process_index():
        return
    workdir.mkdir(parents=True, exist_ok=True)
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    record = {
        "config": config.to_dict(cfg),
        "hash": config.config_hash(cfg),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), "lm_jax": lm_jax.__version__}
        | {name: importlib.metadata.version(name) for name in packages},
        "devices": [device.device_kind for device in jax.devices()],
        "git_revision": git_revision(),
        "data": store.manifest,
    }
    shutil.copytree(store.path / "tokenizer", workdir / "tokenizer", dirs_exist_ok=True)
    write_json(path, record)


def clear_results(workdir: pathlib.Path) -> None:
    """Remove what another run may have left here: its scores are not those of this one."""
    if jax.process_index() == 0:
        for pattern in ("eval_*.json", "documents_*.npz", "distillation.json", "watch.json"):
            for path in workdir.glob(pattern):
                path.unlink()


def git_revision() -> str | None:
    """Commit of the source tree, with "+" if it has changes; None outside a checkout."""
    root = pathlib.Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False
        )
        status = subprocess.run(
            ["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:  # git is not installed
        return None
    if commit.returncode:
        return None
    return commit.stdout.strip() + ("+" if status.stdout.strip() else "")


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained run, opened for use."""

    cfg: Config
    store: Store
    mesh: Mesh
    graphdef: Any
    params: Any
    step: int


def open_trained(
    workdir: pathlib.Path,
    *,
    best: bool = True,
    mesh: Mesh | None = None,
    store: Store | None = None,
) -> Trained:
    """Config, data and parameters of a workdir.

    Args:
        workdir: folder of the run.
        best: the checkpoint with the lowest valid loss rather than the newest.
        mesh: where the parameters go; that of the run if None.
        store: its data, if they are open already.

    Raises:
        FileNotFoundError: if the workdir holds no config or no checkpoint.
        ConfigError: if the corpus or its tokenizer has changed since, or the run is of version 0.1.
    """
    path = workdir / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; give the workdir of a finished run.")
    record = json.loads(path.read_text())
    checkpoint.refuse_older(path, record)
    cfg = config.from_record(record)
    store = store or open_data(cfg)
    if record["data"] != store.manifest:
        raise ConfigError(
            f"{path}: the run was trained on another corpus or tokenizer than {cfg.data.corpus} "
            "is now; restore the data."
        )
    mesh = mesh or sharding.make_mesh(cfg.mesh.fsdp)
    impl, _ = choose_attention(cfg)
    graphdef, init = create_model(cfg, store.tokenizer.vocab_size, impl)
    # Parameters and their average look alike; nothing else of the state is read.
    name = "ema" if cfg.optim.ema_decay else "params"
    abstract = {name: jax.eval_shape(init, jax.random.key(0))}
    shardings = sharding.by_shape(mesh, abstract)
    checkpoints = checkpoint.Checkpoints(workdir, cfg.train.keep, read_only=True)
    position = checkpoints.position(best=best)
    if position is None:
        raise FileNotFoundError(f"{workdir}: holds no checkpoint; train the run first.")
    part = checkpoints.restore_part(checkpoint.abstract_like(abstract, shardings), best=best)
    checkpoints.close()
    return Trained(cfg, store, mesh, graphdef, part[name], position)
