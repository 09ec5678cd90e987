"""Train-step speed against the same model in PyTorch, interleaved in one run.

    pip install torch==2.13.0
    python scripts/bench_step.py [--repeats=7] [--json=scripts/results/bench_step.json]

Three processes hold the same parameters and train on the same batch: this trainer, PyTorch eager
and `torch.compile`. They take turns in blocks of steps, so that a change of the machine's speed
falls on all of them; while one runs, the others wait for input. Before timing, the losses of the
first five updates must agree. Reported are medians over the blocks and their ratios.

The model is a pre-norm decoder with LayerNorm without bias, learned positions, GELU and a tied
head; AdamW, global-norm clip at 1, float32. PyTorch uses `scaled_dot_product_attention` and its
fused AdamW; it reads its loss after every update, this trainer after a call of 5 updates, as both
do in practice. All processes get the same malloc settings. On the CPU only.
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

from lm_jax.main import keep_freed_memory

SIZES: dict[str, dict[str, int]] = {
    "char": dict(layers=4, d_model=128, heads=4, seq_len=64, batch_size=12, vocab_size=65),
    "10M": dict(layers=6, d_model=256, heads=8, seq_len=256, batch_size=8, vocab_size=16_384),
}
BLOCK_SECONDS = 2.0
PEERS = ("lm_jax", "torch eager", "torch.compile")


class JaxPeer:
    """This trainer's own step."""

    def __init__(self, size: dict[str, int], folder: pathlib.Path, steps_per_call: int):
        """Draw the parameters that all peers share and write them to `folder`."""
        import jax

        from lm_jax import config, resolution, step

        cfg = config.Config()
        cfg.data.seq_len, cfg.data.batch_size = size["seq_len"], size["batch_size"]
        for name in ("layers", "d_model", "heads"):
            setattr(cfg.model, name, size[name])
        cfg.model.norm, cfg.model.positions, cfg.model.mlp = "layernorm", "learned", "gelu"
        cfg.optim.schedule, cfg.optim.warmup = "constant", config.Duration("0")
        cfg = resolution.resolve(cfg, windows=1)
        graphdef, init = step.create_model(cfg, size["vocab_size"], "reference")
        params = jax.jit(init)(jax.random.key(0))
        names = [
            "/".join(str(k.key) for k in path) for path, _ in jax.tree.leaves_with_path(params)
        ]
        arrays: list[Any] = [np.asarray(x) for x in jax.tree.leaves(params)]
        np.savez(folder / "params.npz", **dict(zip(names, arrays, strict=True)))
        self.state = step.init_state(cfg, params)
        self.train_steps = step.make_train_step(cfg, graphdef)
        tokens = np.load(folder / "tokens.npy")
        ones = np.ones_like(tokens)
        batch = {"tokens": tokens, "segment_ids": ones, "weights": ones.astype(np.float32)}
        self.count = steps_per_call
        self.batches = jax.device_put(
            {k: np.repeat(v[None], steps_per_call, axis=0) for k, v in batch.items()}
        )

    def losses(self) -> list[float]:
        """Run one call and return its losses."""
        self.state, metrics = self.train_steps(self.state, self.batches)
        return np.asarray(metrics["train/loss"]).tolist()

    def version(self) -> str:
        """Version of the library underneath."""
        import jax

        return f"jax {jax.__version__}"


class TorchPeer:
    """The same model in PyTorch."""

    def __init__(self, size: dict[str, int], folder: pathlib.Path, compiled: bool):
        """Load the shared parameters."""
        import torch
        import torch.nn.functional as F

        params = {
            name: torch.nn.Parameter(torch.from_numpy(array))
            for name, array in np.load(folder / "params.npz").items()
        }
        tokens = torch.from_numpy(np.load(folder / "tokens.npy")).long()
        inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        width, heads = size["d_model"], size["heads"]
        # PyTorch's own linear keeps [out, in]; so do these.
        with torch.no_grad():
            for parameter in params.values():
                if parameter.ndim == 2:
                    parameter.data = parameter.data.contiguous()
            for name in params:
                if name.endswith("kernel"):
                    params[name].data = params[name].data.T.contiguous()

        def norm(x, name):
            return F.layer_norm(x, (width,), params[name + "/scale"], None, 1e-6)

        def loss_of(inputs, targets):
            rows, length = inputs.shape
            x = F.embedding(inputs, params["embedding"]) + params["position_embedding"]
            for i in range(size["layers"]):
                block = f"blocks/{i}/"
                qkv = F.linear(
                    norm(x, block + "attention_norm"), params[block + "attention/qkv/kernel"]
                )
                q, k, v = (
                    y.view(rows, length, heads, -1).transpose(1, 2) for y in qkv.split(width, 2)
                )
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
                y = y.transpose(1, 2).reshape(rows, length, width)
                x = x + F.linear(y, params[block + "attention/out/kernel"])
                y = F.gelu(F.linear(norm(x, block + "mlp_norm"), params[block + "mlp/up/kernel"]))
                x = x + F.linear(y, params[block + "mlp/down/kernel"])
            logits = F.linear(norm(x, "final_norm"), params["embedding"])
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

        decayed = [p for name, p in params.items() if name.endswith("kernel")]
        rest = [p for name, p in params.items() if not name.endswith("kernel")]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, fused=True)
        loss_of = torch.compile(loss_of) if compiled else loss_of

        def train_step() -> float:
            loss = loss_of(inputs, targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.item()

        self.train_step = train_step
        self.count = 1

    def losses(self) -> list[float]:
        """Run one update and return its loss."""
        return [self.train_step()]

    def version(self) -> str:
        """Version of the library underneath."""
        import torch

        return f"torch {torch.__version__}, {torch.get_num_threads()} threads"


def serve(peer_name: str, size_name: str, folder: pathlib.Path, steps_per_call: int) -> None:
    """One peer: answers every line on stdin (a number of calls) with seconds and losses."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    keep_freed_memory()
    size = SIZES[size_name]
    peer: JaxPeer | TorchPeer
    if peer_name == "lm_jax":
        peer = JaxPeer(size, folder, steps_per_call)
    else:
        peer = TorchPeer(size, folder, compiled=peer_name == "torch.compile")
    print(json.dumps({"version": peer.version(), "count": peer.count}), flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        losses = [loss for _ in range(int(line)) for loss in peer.losses()]
        answer = {"seconds": time.perf_counter() - began, "losses": losses}
        print(json.dumps(answer), flush=True)


class Process:
    """The other end of `serve`."""

    def __init__(self, peer: str, size: str, folder: pathlib.Path, steps_per_call: int):
        """Start the peer and wait until it is ready."""
        args = [sys.executable, __file__, f"--serve={peer}", f"--size={size}", f"--folder={folder}"]
        self.process = subprocess.Popen(
            [*args, f"--steps_per_call={steps_per_call}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        ready = self.read()
        self.version, self.count = ready["version"], ready["count"]

    def read(self) -> dict[str, Any]:
        """One answer."""
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def run(self, calls: int) -> dict[str, Any]:
        """Run `calls` calls of the peer's step."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{calls}\n")
        self.process.stdin.flush()
        return self.read()

    def close(self) -> None:
        """End the peer."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def bench(size_name: str, repeats: int) -> dict[str, Any]:
    """Interleaved blocks of all peers at one size."""
    size = SIZES[size_name]
    tokens_per_step = size["batch_size"] * size["seq_len"]
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        shape = (size["batch_size"], size["seq_len"] + 1)
        tokens = np.random.default_rng(0).integers(0, size["vocab_size"], shape, np.int32)
        np.save(folder / "tokens.npy", tokens)
        peers = {peer: Process(peer, size_name, folder, 5) for peer in PEERS}
        first = {peer: p.run(5 // p.count)["losses"] for peer, p in peers.items()}
        for peer, losses in first.items():
            np.testing.assert_allclose(losses, first["lm_jax"], rtol=2e-4, err_msg=peer)
        calls = {}
        for peer, p in peers.items():
            p.run(2)
            calls[peer] = max(1, round(BLOCK_SECONDS / (p.run(2)["seconds"] / 2)))
        step_ms: dict[str, list[float]] = {peer: [] for peer in PEERS}
        for _ in range(repeats):
            for peer, p in peers.items():
                seconds = p.run(calls[peer])["seconds"]
                step_ms[peer].append(1e3 * seconds / (calls[peer] * p.count))
        versions = {peer: p.version for peer, p in peers.items()}
        for p in peers.values():
            p.close()
    medians = {peer: statistics.median(values) for peer, values in step_ms.items()}
    return {
        "size": size,
        "first_losses": first,
        "versions": versions,
        "step_ms": step_ms,
        "tokens_per_second": {p: 1e3 * tokens_per_step / ms for p, ms in medians.items()},
        "speed_against": {p: medians[p] / medians["lm_jax"] for p in PEERS[1:]},
    }


def main() -> None:
    """Time all sizes and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7, help="blocks per peer")
    parser.add_argument("--json", type=pathlib.Path, help="where to write all numbers")
    parser.add_argument("--serve", choices=PEERS, help=argparse.SUPPRESS)
    parser.add_argument("--size", choices=SIZES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
    parser.add_argument("--steps_per_call", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.size, args.folder, args.steps_per_call)
        return
    results: dict[str, Any] = {"python": platform.python_version(), "machine": platform.machine()}
    for name in SIZES:
        results[name] = bench(name, args.repeats)
        for peer in PEERS:
            ratio = results[name]["speed_against"].get(peer)
            print(
                f"{name:5} {peer:14} {statistics.median(results[name]['step_ms'][peer]):8.1f} ms "
                f"{results[name]['tokens_per_second'][peer]:9,.0f} tok/s"
                + (f"  lm_jax is {ratio:.2f}x as fast" if ratio else "")
            )
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
