"""Decoding speed against Hugging Face transformers, interleaved in one run on a CPU.

    pip install torch==2.13.0 transformers==5.24.0
    python scripts/bench_generate.py [--rows=1,16] [--tokens=128] [--repeats=5] [--threads=N]

Both continue the same prompts with the same random Llama of 17M parameters, in float32, with a
key/value cache, by the same number of new tokens. They take turns, so that a change of the
machine's speed falls on both; reported are medians and their ratio, by wall time and by the CPU
time of the process. The first half of the greedy tokens of every row must be the same (later ones
may part where two are almost equally likely); if not, the exit code is 1.
"""

import argparse
import os
import pathlib
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np

from lm_jax import config
from lm_jax.config import Config
from lm_jax.decode import Sampling, continuations
from lm_jax.models import huggingface
from lm_jax.models.families import create_model
from lm_jax.workdir import Trained

VOCAB, PROMPT, WINDOW = 8192, 32, 512
WAYS = {
    "greedy": Sampling(0.0, 0, 1.0, 0),
    "temperature 0.8": Sampling(0.8, 0, 1.0, 0),
    "top_k 50": Sampling(0.8, 50, 1.0, 0),
    "top_p 0.9": Sampling(0.8, 0, 0.9, 0),
}


def make_peers(threads: int) -> tuple[Callable, Callable]:
    """Functions of (ids [B, P], new tokens, way) to new ids [B, N]: of this trainer, and theirs."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    shape = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=True,
        rms_norm_eps=1e-6,
    )
    theirs = transformers.LlamaForCausalLM(shape).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        model, vocab_size, window, params = huggingface.load(pathlib.Path(folder))
    cfg = config.replace(
        Config(), model=model, data__seq_len=window, train__compute_dtype="float32"
    )
    graphdef, _ = create_model(cfg, vocab_size, "reference")
    tokenizer: Any = types.SimpleNamespace(separator=0)
    run = Trained(cfg, tokenizer, None, graphdef, params, 0, {})  # type: ignore[arg-type]

    def ours(ids_BP: np.ndarray, tokens: int, way: Sampling) -> np.ndarray:
        chunks = continuations(run, ids_BP.tolist(), range(len(ids_BP)), tokens, way)
        return np.concatenate([ids_Bn for ids_Bn, _ in chunks], axis=1)

    def hugging_face(ids_BP: np.ndarray, tokens: int, way: Sampling) -> np.ndarray:
        options: dict[str, Any] = {"do_sample": False}
        if way.temperature:
            options = dict(
                do_sample=True, temperature=way.temperature, top_k=way.top_k, top_p=way.top_p
            )
        length = dict(max_new_tokens=tokens, min_new_tokens=tokens, eos_token_id=None)
        with torch.no_grad():
            ids_BT = theirs.generate(torch.tensor(ids_BP), **length, pad_token_id=0, **options)
        return ids_BT[:, ids_BP.shape[1] :].numpy()

    return ours, hugging_face


def main() -> None:
    """Time all cases and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="1,16", help="batch sizes, comma-separated")
    parser.add_argument("--ways", default=",".join(WAYS), help="how tokens are drawn")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of a row")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of PyTorch")
    args = parser.parse_args()
    peers = dict(zip(("lm_jax", "Hugging Face"), make_peers(args.threads), strict=True))
    rng, agree = np.random.default_rng(0), True
    print(f"{'rows':>4} {'way':16} {'peer':13} {'first s':>8} {'tok/s':>8} {'tok/CPU s':>10}")
    for rows in map(int, args.rows.split(",")):
        ids_BP = rng.integers(1, VOCAB, (rows, PROMPT))
        for way in args.ways.split(","):
            first, found = {}, {}
            times: dict[str, list[tuple[float, float]]] = {peer: [] for peer in peers}
            for turn in range(args.repeats + 1):
                for peer, run in peers.items():
                    began, cpu = time.perf_counter(), time.process_time()
                    found[peer] = run(ids_BP, args.tokens, WAYS[way])
                    spent = time.perf_counter() - began, time.process_time() - cpu
                    if turn:
                        times[peer].append(spent)
                    else:
                        first[peer] = spent[0]
            speeds = {
                peer: [
                    rows * args.tokens / statistics.median(kind)
                    for kind in zip(*spans, strict=True)
                ]
                for peer, spans in times.items()
            }
            for peer, (wall, cpu) in speeds.items():
                print(f"{rows:4} {way:16} {peer:13} {first[peer]:8.1f} {wall:8.0f} {cpu:10.0f}")
            wall, cpu = (a / b for a, b in zip(*speeds.values(), strict=True))
            print(f"{'':21} lm_jax is {wall:.2f}x as fast, {cpu:.2f}x by CPU time", flush=True)
            if way == "greedy":
                ours, theirs = found.values()
                assert ours.shape == theirs.shape == (rows, args.tokens)
                agree &= bool((ours[:, : args.tokens // 2] == theirs[:, : args.tokens // 2]).all())
                print(f"{'':21} greedy tokens: {(ours == theirs).mean():.1%} the same", flush=True)
    sys.exit(not agree)


if __name__ == "__main__":
    main()
