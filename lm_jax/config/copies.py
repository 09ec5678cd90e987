"""Copies of a config, its form in JSON, its hash, and how two of them differ."""

import copy
import dataclasses
import functools
import hashlib
import json
from collections.abc import Container
from typing import Any

from lm_jax.config.fields import Config, ModelConfig
from lm_jax.config.section import Section, get, named_fields


def replace(cfg: Config, **changes: Any) -> Config:
    """A copy with changes; a double underscore stands for the dot (`optim__peak_lr=1e-3`)."""
    cfg = copy.deepcopy(cfg)
    for path, value in changes.items():
        *parents, last = path.split("__")
        setattr(functools.reduce(getattr, parents, cfg), last, copy.deepcopy(value))
    return cfg


def to_dict(cfg: Config) -> dict[str, Any]:
    """Plain nested dicts, ready for JSON."""
    return dataclasses.asdict(cfg)


def from_dict(tree: dict[str, Any]) -> Config:
    """The inverse of `to_dict`; raises ConfigError on unknown fields."""
    cfg = Config()
    for name, value in tree.items():
        if isinstance(value, dict) and isinstance(getattr(cfg, name, None), Section):
            for key, leaf in value.items():
                setattr(getattr(cfg, name), key, leaf)
        else:
            setattr(cfg, name, value)
    return cfg


def from_record(record: dict[str, Any]) -> Config:
    """The config in a run's `config.json`.

    Version 0.1 wrote the number of micro-batches there, this one writes their size on a device, and
    the width of a head.
    """
    tree = record["config"]
    model = tree["model"]
    if "head_dim" not in model and "heads" in model:
        family = ModelConfig(family=model.get("family", "dense"))
        width = model["d_model"] // model["heads"] if family.reads("head_dim") else 0
        tree = {**tree, "model": {**model, "head_dim": width}}
    optim = dict(tree.get("optim", {}))
    if count := optim.pop("accumulation", 0):
        data = dict(tree["data"])
        if count > 1:
            data["micro_batch"] = data["batch_size"] // (count * len(record["devices"]))
        tree = {**tree, "optim": optim, "data": data}
    return from_dict(tree)


def config_hash(cfg: Config) -> str:
    """First 16 hex digits of the sha256 of the config's JSON."""
    text = json.dumps(to_dict(cfg), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def difference(old: Config, new: Config, without: Container[str] = ()) -> list[str]:
    """Lines `config.path: old -> new` for every field, but these, in which two configs differ."""
    return [
        f"config.{path}: {value!r} -> {get(new, path)!r}"
        for path, value in named_fields(old)
        if value != get(new, path) and path not in without
    ]
