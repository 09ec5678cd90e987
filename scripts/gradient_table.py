"""The backward pass of every layer of a model against central differences in float64.

    python scripts/gradient_table.py [--config=configs/gpt_demo.py]

Every layer is examined alone, as a function of its parameters and its input, at the widths of the
config, on two rows of which one holds two documents; last the whole model, from parameters to mean
loss. A row of the table is one leaf: the largest relative error along directions inside it, and at
single coordinates, the first and the last among them; and what rounding and step may explain. Of
the whole model only the leaf with the largest error is shown. The exit code is 1 if a check fails.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lm_jax import doctor, loss
from lm_jax.config import Config
from lm_jax.config.flags import load_config
from lm_jax.config.manual import script_parser
from lm_jax.config.resolve import resolve
from lm_jax.models.families import create_model
from lm_jax.models.layers import Read, unstack
from lm_jax.objective import NextToken

T = 7
V = 101  # enough for every backward pass; the widths of the layers are those of the config


@dataclasses.dataclass(frozen=True)
class Part:
    """A layer as a function `apply(parameters, input)`; input None for that of the whole model."""

    name: str
    params: Any
    input: np.ndarray | None
    apply: Callable[[Any, Any], jax.Array]


@dataclasses.dataclass(frozen=True)
class Row:
    """What was found of one leaf."""

    part: str
    leaf: str
    shape: tuple[int, ...]
    directions: float
    coordinates: float
    bound: float


def parts(cfg: Config, seed: int = 0) -> Iterator[Part]:
    """The layers of a dense model, from the loss down to the tables, and the whole model."""
    rng = np.random.default_rng(seed)
    graphdef, init = create_model(cfg, V, "reference")
    leaves, tree = jax.tree.flatten(init(jax.random.key(seed)))
    params = jax.tree.unflatten(tree, [0.3 * rng.standard_normal(x.shape) for x in leaves])
    batch: dict[str, Any] = {
        "tokens": rng.integers(1, V, (2, T + 1)).astype(np.int32),
        "segment_ids": np.array([[1] * 8, [1] * 3 + [2] * 5], np.int32),
        "weights": np.array([[1.0] * 8, [1.0] * 3 + [0.0] + [1.0] * 4]),
    }
    b = loss.shift(jax.tree.map(jnp.asarray, batch))
    model = nnx.merge(graphdef, params)
    x_BTD = rng.standard_normal((2, T, cfg.model.d_model))

    def mean_loss(params: Any, _: Any, impl: str) -> jax.Array:
        sums = NextToken(graphdef, jnp.dtype("float64"), impl).scored(params, batch)
        return sums.objective / sums.count

    def head_and_loss(head_VD: Any, x_BTD: Any, impl: str) -> jax.Array:
        return loss.from_hidden(
            x_BTD, head_VD, b, softcap=cfg.model.logit_softcap, impl=impl
        ).objective

    head_VD = np.asarray(model.head_VD())
    final_BTD = rng.standard_normal((2, T, head_VD.shape[1]))
    for impl in ("materialised", "fused"):
        yield Part(f"head and loss, {impl}", head_VD, final_BTD, partial(head_and_loss, impl=impl))
    yield _module("final norm", model.final_norm, x_BTD)
    structure, stacked = nnx.split(model.blocks)
    read = Read(b.inputs, b.segment_ids, b.positions, jnp.asarray(x_BTD))
    layers = [nnx.merge(structure, layer) for layer in unstack(stacked, cfg.model.layers)]
    for i, block in reversed(list(enumerate(layers))):
        yield _module(f"layer {i}, mlp", block.mlp, x_BTD)
        yield _module(f"layer {i}, mlp norm", block.mlp_norm, x_BTD)
        yield _module(f"layer {i}, attention", block.attention, x_BTD, read, None)
        yield _module(f"layer {i}, attention norm", block.attention_norm, x_BTD)
    if "projection" in params:
        rows_BTr = rng.standard_normal((2, T, cfg.model.embedding_rank))
        yield Part("embedding projection", params["projection"], rows_BTr, lambda w, x: x @ w)
    for name in ("embedding", "position_embedding"):
        if name in params:
            ids = b.inputs if name == "embedding" else b.positions
            yield Part(name.replace("_", " "), params[name], None, _lookup(ids))
    for impl in ("materialised", "fused"):
        yield Part(f"whole model, {impl}", params, None, partial(mean_loss, impl=impl))


def _lookup(ids_BT: jax.Array) -> Callable[[Any, Any], jax.Array]:
    return lambda table, _: table[ids_BT]


def _module(name: str, module: nnx.Module, x_BTD: np.ndarray, *arguments: Any) -> Part:
    graphdef, params = nnx.split(module)

    def apply(params: Any, x_BTD: jax.Array) -> jax.Array:
        found = nnx.merge(graphdef, params)(x_BTD, *arguments)
        return found[0] if isinstance(found, tuple) else found

    return Part(name, nnx.to_pure_dict(params), x_BTD, apply)


def examine(part: Part, seed: int = 0) -> tuple[list[Row], list[doctor.Finding]]:
    """A row for each leaf, and the checks that failed."""
    tree = {"parameters": part.params} | ({} if part.input is None else {"input": part.input})

    def weighted_sum(tree: Any) -> jax.Array:
        y = part.apply(tree["parameters"], tree.get("input"))
        weights = np.random.default_rng((seed, 9)).standard_normal(y.shape)
        return (y * weights).sum()

    report = doctor.examine_gradients(weighted_sum, tree, seed=seed)
    found = {name: report[name].values for name in ("gradient.leaves", "gradient.coordinates")}
    rows = []
    for path, leaf in jax.tree.leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")

        def largest(check: str, kind: str, name: str = name) -> float:
            values = found[check][kind]
            return max(v for k, v in values.items() if k.split("[")[0].split(",")[0] == name)

        directions, coordinates = (largest(check, "errors") for check in found)
        bound = max(largest(check, "bounds") for check in found)
        short = name.removeprefix("parameters").removeprefix("/") or "table"
        rows.append(Row(part.name, short, leaf.shape, directions, coordinates, bound))
    return rows, [finding for finding in report if finding.status == "fail"]


def main() -> None:
    """Print the table."""
    parser = script_parser(__doc__)
    parser.add_argument("--config", default="configs/gpt_demo.py", help="FILE or FILE:ARM")
    try:
        cfg = resolve(load_config(parser.parse_args().config), windows=1000)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{error}\n")
    if cfg.model.family != "dense":
        parser.exit(2, "config.model.family: only dense models have a table; give such a config.\n")
    print("| layer | leaf | shape | directions | coordinates | explained |")
    print("|---|---|---|---|---|---|")
    failed, count = [], 0
    with jax.enable_x64(True):
        for part in parts(cfg):
            rows, wrong = examine(part)
            failed += [f"{part.name}: {finding.check}: {finding.evidence}" for finding in wrong]
            count += len(rows)
            if part.name.startswith("whole"):
                rows = [max(rows, key=lambda row: max(row.directions, row.coordinates))]
            for row in rows:
                errors = (f"{x:.1e}" for x in (row.directions, row.coordinates, row.bound))
                shape = " x ".join(map(str, row.shape))
                print(f"| {' | '.join((row.part, row.leaf, shape, *errors))} |", flush=True)
    print(f"\n{count} leaves, {len(failed)} checks failed", *failed, sep="\n")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
