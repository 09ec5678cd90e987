"""What `bench_step.py` compares: the cases, and the processes that each hold one peer.

A peer answers every line on its input, a number of calls, with a line of JSON.
"""

import contextlib
import json
import math
import os
import pathlib
import re
import sys
import time
import traceback
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from benchmark import use, words

from lm_jax import config
from lm_jax.config import Config
from lm_jax.config.flags import load_module
from lm_jax.config.resolve import resolve
from lm_jax.models.families import choose_attention, create_model

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"


class Case(NamedTuple):
    """A model and its batch."""

    config: str  # a file in configs/; empty: the defaults
    changes: dict[str, Any]
    vocab_size: int
    peers: tuple[str, ...]
    equal: bool = True  # PyTorch has the same model
    steps_per_call: int = 1
    share: float = 1  # of the time of all cases: seconds on an H200 that has compiled nothing


GPT = dict(model__norm="layernorm", model__positions="learned", model__mlp="gelu")
CHAR = dict(model__layers=4, model__d_model=128, model__heads=4, data__seq_len=64)
SMALL = dict(model__layers=6, model__d_model=256, model__heads=8, data__seq_len=256)
ON_CPU = dict(attention__impl="reference", train__compute_dtype="float32", **GPT)
HALF = dict(train__compute_dtype="bfloat16", data__batch_size=32)
UNROLLED = dict(model__scan_layers=False)
TINY = dict(model__layers=2, model__d_model=32, model__heads=2, data__seq_len=32, eval__stride=0)
TOY = HALF | TINY | dict(data__batch_size=2)
CPU_PEERS = ("lm_jax", "torch eager", "torch.compile")
# All peers of a case compile at the same time, on one GPU: no more than four.
ON_GPU = ("lm_jax", "lm_jax plain", "torch flash", "torch cudnn")
VARIANTS_17M = ("lm_jax", "lm_jax x8", "lm_jax pallas", "lm_jax xla")
VARIANTS_124M = ("lm_jax", "lm_jax pallas")
BASE_17M = Case("wikitext2.py", HALF, 16_384, ON_GPU, equal=False, share=60)
BASE_124M = Case("gpt2_124m.py", HALF | UNROLLED, 50_304, ON_GPU, share=70)
TOY_17M = BASE_17M._replace(changes=TOY, vocab_size=300)
TOY_124M = BASE_124M._replace(changes=TOY, vocab_size=300)
CASES = {
    "char": Case("", CHAR | ON_CPU | {"data__batch_size": 12}, 65, CPU_PEERS, steps_per_call=5),
    "10M": Case("", SMALL | ON_CPU | {"data__batch_size": 8}, 16_384, CPU_PEERS, steps_per_call=5),
    "17M": BASE_17M,
    "124M": BASE_124M,
    "17M variants": BASE_17M._replace(peers=VARIANTS_17M, share=20),
    "124M variants": BASE_124M._replace(peers=VARIANTS_124M, share=15),
    "17M toy": TOY_17M,
    "124M toy": TOY_124M,
    "17M toy variants": TOY_17M._replace(peers=VARIANTS_17M),
}
BACKENDS = {"torch flash": "FLASH_ATTENTION", "torch cudnn": "CUDNN_ATTENTION"}


def config_of(case: Case, peer: str = "lm_jax") -> Config:
    """The resolved config of a case, with what the name of a peer of this trainer asks for."""
    cfg = load_module(CONFIGS / case.config).get_config() if case.config else Config()
    changes = case.changes | dict(optim__schedule="constant", optim__warmup="0")
    for word in peer.split()[1:] if peer.startswith("lm_jax") else ():
        if word == "plain":
            changes |= {"data__document_mask": False, "data__window_offset": False}
        elif not re.fullmatch(r"x\d+", word):
            changes["attention__impl"] = word
    return resolve(config.replace(cfg, **changes), windows=100_000)


def steps_per_call(case: Case, peer: str) -> int:
    """Updates in one call of a peer."""
    several = re.search(r" x(\d+)$", peer)
    return int(several[1]) if several else case.steps_per_call if peer == "lm_jax" else 1


def tokens_of(case: Case, cfg: Config) -> np.ndarray:
    """The batch of every peer: random ids, [B, T + 1]."""
    shape = (cfg.data.batch_size, cfg.data.seq_len + 1)
    return np.random.default_rng(0).integers(0, case.vocab_size, shape, np.int32)


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The initial value of a parameter, the same in every process."""
    if name.endswith(("scale", "bias")):
        return np.full(shape, name.endswith("scale"), np.float32)
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return np.float32(0.02) * rng.standard_normal(shape, np.float32)


def shapes(case: Case, cfg: Config) -> dict[str, tuple[int, ...]]:
    """The parameters of PyTorch's model: matrices [in, out] as this trainer keeps them."""
    D, model = cfg.model.d_model, cfg.model
    found: dict[str, tuple[int, ...]] = {
        "embedding": (case.vocab_size, D),
        "position_embedding": (cfg.data.seq_len, D),
    }
    layers = {"attention/qkv": 3 * D, "attention/out": D, "mlp/up": 4 * D, "mlp/down": D}
    norms = ["final_norm"]
    for i in range(model.layers):
        norms += [f"blocks/{i}/attention_norm", f"blocks/{i}/mlp_norm"]
        for name, outputs in layers.items():
            found[f"blocks/{i}/{name}/kernel"] = (4 * D if name == "mlp/down" else D, outputs)
            if model.bias:
                found[f"blocks/{i}/{name}/bias"] = (outputs,)
    for name in norms:
        found |= {f"{name}/scale": (D,)} | ({f"{name}/bias": (D,)} if model.bias else {})
    return found


class JaxPeer:
    """This trainer's own step."""

    def __init__(self, case: Case, name: str, device: str):
        """Compile it."""
        use(device)
        import jax

        from lm_jax import optim, step
        from lm_jax.objective import NextToken

        cfg = config_of(case, name)
        self.waits = device == "cpu"
        self.attention, _ = choose_attention(cfg)
        graphdef, init = create_model(cfg, case.vocab_size, self.attention)
        seen: dict[str, tuple[int, ...]] = {}

        def value(path: Any, like: Any) -> np.ndarray:
            name, shape = optim.path_name(path), like.shape
            stacked = re.fullmatch(r"blocks/(\D.*)", name)  # all layers in one array
            names = [f"blocks/{i}/{stacked[1]}" for i in range(shape[0])] if stacked else [name]
            seen.update(dict.fromkeys(names, shape[1:] if stacked else shape))
            drawn = [draw(name, seen[name]) for name in names]
            return np.stack(drawn) if stacked else drawn[0]

        params = jax.tree.map_with_path(value, jax.eval_shape(init, jax.random.key(0)))
        if case.equal and seen != shapes(case, cfg):
            raise ValueError("PyTorch's model has other parameters")
        self.state = jax.jit(lambda params: step.init_state(cfg, params))(params)
        tokens = tokens_of(case, cfg)
        ones = np.ones_like(tokens)
        batch = {"tokens": tokens, "segment_ids": ones, "weights": ones.astype(np.float32)}
        self.count = steps_per_call(case, name)
        self.batches = jax.device_put(
            {k: np.repeat(v[None], self.count, axis=0) for k, v in batch.items()}
        )
        began = time.perf_counter()
        train_steps: Any = step.make_train_step(cfg, NextToken.of(cfg, graphdef))
        self.train_steps = train_steps.lower(self.state, self.batches).compile()
        self.compile_seconds = time.perf_counter() - began
        self.version = f"jax {jax.__version__}"

    def run(self, calls: int) -> list[Any]:
        """Run so many calls to their end; their losses."""
        losses = []
        for _ in range(calls):
            self.state, metrics = self.train_steps(self.state, self.batches)
            losses.append(metrics["train/loss"])
            if self.waits or len(losses) == calls:
                losses[-1].block_until_ready()
        return losses

    def read(self, losses: list[Any]) -> list[float]:
        """Losses as numbers."""
        return np.concatenate([np.asarray(loss) for loss in losses]).tolist()

    def peak_bytes(self) -> int | None:
        """Memory that XLA plans for a call."""
        return getattr(self.train_steps.memory_analysis(), "peak_memory_in_bytes", None)


def torch_loss(cfg: Config, params: dict[str, Any]) -> Callable[..., Any]:
    """`(inputs, targets) -> loss` of PyTorch's model with these parameters."""
    import torch.nn.functional as F

    width, heads = cfg.model.d_model, cfg.model.heads
    gelu = "none" if cfg.model.mlp == "gelu" else "tanh"

    def norm(x, name):
        scale, bias = params[name + "/scale"], params.get(name + "/bias")
        return F.layer_norm(x, (width,), scale, bias, cfg.model.norm_eps)

    def linear(x, name):
        return F.linear(x, params[name + "/kernel"], params.get(name + "/bias"))

    def loss_of(inputs, targets):
        rows, length = inputs.shape
        x = F.embedding(inputs, params["embedding"]) + params["position_embedding"]
        for i in range(cfg.model.layers):
            block = f"blocks/{i}/"
            qkv = linear(norm(x, block + "attention_norm"), block + "attention/qkv")
            q, k, v = (y.view(rows, length, heads, -1).transpose(1, 2) for y in qkv.split(width, 2))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            y = y.transpose(1, 2).reshape(rows, length, width)
            x = x + linear(y, block + "attention/out")
            y = linear(norm(x, block + "mlp_norm"), block + "mlp/up")
            x = x + linear(F.gelu(y, approximate=gelu), block + "mlp/down")
        logits = F.linear(norm(x, "final_norm"), params["embedding"])
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    return loss_of


class TorchPeer:
    """PyTorch's decoder, see `bench_step.py`."""

    attention = None
    count = 1

    def __init__(self, case: Case, name: str, device: str):
        """Draw the parameters; it is compiled in the first run."""
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel

        cfg = config_of(case)
        self.torch, self.gpu = torch, device == "gpu"
        where = "cuda" if self.gpu else "cpu"
        if self.gpu:
            torch.set_float32_matmul_precision("high")
        params = {}
        for key, shape in shapes(case, cfg).items():
            value = torch.from_numpy(draw(key, shape))
            # PyTorch's own linear keeps [out, in]; so do these.
            value = value.T.contiguous() if key.endswith("kernel") else value
            params[key] = torch.nn.Parameter(value.to(where))
        tokens = torch.from_numpy(tokens_of(case, cfg)).long().to(where)
        inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        loss_of = torch_loss(cfg, params)
        decayed = [p for name, p in params.items() if name.endswith("kernel")]
        rest = [p for name, p in params.items() if not name.endswith("kernel")]
        groups = [
            {"params": decayed, "weight_decay": cfg.optim.weight_decay},
            {"params": rest, "weight_decay": 0.0},
        ]
        how = dict(lr=cfg.optim.peak_lr, betas=(cfg.optim.b1, cfg.optim.b2), eps=cfg.optim.eps)
        optimizer = torch.optim.AdamW(groups, fused=True, **how)
        loss_of = loss_of if name == "torch eager" else torch.compile(loss_of)
        half = cfg.train.compute_dtype == "bfloat16"
        backend = getattr(SDPBackend, BACKENDS[name]) if name in BACKENDS else None

        def train_step():
            with torch.autocast(where, torch.bfloat16, enabled=half):
                with sdpa_kernel(backend) if backend else contextlib.nullcontext():
                    loss = loss_of(inputs, targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(params.values(), cfg.optim.clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.detach() if self.gpu else loss.item()

        self.train_step = train_step
        began = time.perf_counter()
        self.first = self.run(1)
        self.compile_seconds = time.perf_counter() - began
        self.version = f"torch {torch.__version__}, {torch.get_num_threads()} threads"

    def run(self, calls: int) -> list[Any]:
        """Run so many updates to their end; their losses."""
        losses = [self.train_step() for _ in range(calls)]
        if self.gpu:
            self.torch.cuda.synchronize()
        return losses

    def read(self, losses: list[Any]) -> list[float]:
        """Losses as numbers."""
        return [float(loss) for loss in losses]

    def peak_bytes(self) -> int | None:
        """Most memory that was allocated at a time."""
        return self.torch.cuda.max_memory_allocated() if self.gpu else None


def serve(case: Case, name: str, device: str) -> None:
    """Be one peer: first say what it is and its first losses, then answer every line."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    def answer(**row: Any) -> None:
        print(json.dumps(row), file=out, flush=True)

    from lm_jax.main import keep_freed_memory  # the command, which defines flags

    keep_freed_memory()
    try:
        peer: JaxPeer | TorchPeer
        if name.startswith("torch"):
            peer = TorchPeer(case, name, device)
            losses = peer.read(peer.first + peer.run(4))
        else:
            peer = JaxPeer(case, name, device)
            losses = peer.read(peer.run(math.ceil(5 / peer.count)))
        answer(
            version=peer.version,
            attention=peer.attention,
            count=peer.count,
            compile_seconds=peer.compile_seconds,
            peak_bytes=peer.peak_bytes(),
            losses=losses[:5],
        )
        for line in sys.stdin:
            began = time.perf_counter()
            peer.run(int(line))
            answer(seconds=time.perf_counter() - began, peak_bytes=peer.peak_bytes())
    except Exception as error:  # whatever it is, it goes into the report
        traceback.print_exc()
        answer(error=words(error))
