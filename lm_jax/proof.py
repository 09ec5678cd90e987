"""The proof of an exported folder: what other libraries make of it is what the run computes."""

import dataclasses
import importlib.util
import math
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx

from lm_jax import config, console, loss, metrics
from lm_jax.data import windows
from lm_jax.data.store import Split
from lm_jax.data.tokenizers.base import FILE_NAME
from lm_jax.evaluate import Evaluator
from lm_jax.models.families import choose_attention, create_model
from lm_jax.rundir import SCORES, read_scores
from lm_jax.workdir import Trained

WINDOWS = 4  # whose logits are compared
TEXT = 1_000_000  # tokens of documents whose text is compared
LOGIT, OF_SIZE = 1e-4, 1e-5  # largest difference of two logits, and what is added for their size
PERPLEXITY = 1e-4  # largest relative difference of two perplexities
_AT_ONCE = 1 << 26  # logits that transformers computes at a time


@dataclasses.dataclass(frozen=True)
class _Sample:
    """What is compared."""

    origin: str  # "of test"
    documents: list[np.ndarray]  # the ids of each
    batch: windows.Batch


def prove(run: Trained, workdir: pathlib.Path, folder: pathlib.Path, *, scored: bool) -> list[str]:
    """Compare an exported folder with its run.

    Compared are ids and text of documents, the logits of a few windows in float32 and, if `scored`,
    the perplexity of the whole split. The split is test, or valid where there is none. Without the
    run's data, random tokens stand for them; without transformers and PyTorch, the tokenizer alone
    is compared. Both is said.

    Returns:
        Sentences about what is equal.

    Raises:
        RuntimeError: if they differ.
    """
    split = _split(run)
    sample = _of_random(run) if split is None else _of_split(run, split)
    library = tokenizers.Tokenizer.from_file(str(folder / FILE_NAME))
    library.encode_special_tokens = True
    by = f"tokenizers {tokenizers.__version__}"
    told = [_compare_texts(run, sample, by, lambda x: library.encode(x).ids, library.decode)]
    missing = [name for name in ("torch", "transformers") if not importlib.util.find_spec(name)]
    if missing:
        why = f"logits were not compared, for that needs {' and '.join(missing)}"
        return [*told, f"{why}: pip install {' '.join(missing)}"]
    import transformers

    by = f"transformers {transformers.__version__}"
    with console.phase("comparing with transformers"):
        # Documents may be longer than the window, of which there would be a warning.
        own = transformers.AutoTokenizer.from_pretrained(folder, model_max_length=sys.maxsize)
        told.append(_compare_texts(run, sample, by, lambda x: own(x)["input_ids"], own.decode))
        model = _open(folder)
        told.append(_compare_logits(_in_float32(run), model, sample, by))
    if scored and split is not None:
        told.append(_compare_perplexity(run, workdir, model, split, by))
    return told


def _split(run: Trained) -> Split | None:
    """The test split, or the one that the run has in its place; None without its data."""
    try:
        store = run.store
    except (ValueError, OSError) as error:
        console.say(f"random tokens stand for the data of the run, which are not here: {error}")
        return None
    return store.split("test" if "test" in store.manifest["splits"] else "valid")


def _of_split(run: Trained, split: Split) -> _Sample:
    """The first documents of a split, at least one, and windows from everywhere in it."""
    starts, data = split.document_starts, run.cfg.data
    count = max(1, int(np.searchsorted(starts, TEXT, side="right")) - 1)
    documents = np.split(split.tokens[: starts[count]], starts[1:count])
    all_windows = windows.Windows(split, data.seq_len, data.document_mask)
    chosen = np.linspace(0, len(all_windows) - 1, min(WINDOWS, len(all_windows))).astype(int)
    return _Sample(f"of {split.name}", documents, all_windows.batch(chosen))


def _of_random(run: Trained) -> _Sample:
    """Texts that random ids spell, and windows of random ids, each of one document."""
    tokenizer, rng = run.tokenizer, np.random.default_rng(0)
    texts = [tokenizer.decode(rng.integers(0, tokenizer.vocab_size, 100)) for _ in range(20)]
    shape = (WINDOWS, run.cfg.data.seq_len + 1)
    batch = {
        "tokens": rng.integers(0, tokenizer.vocab_size, shape, np.int32),
        "segment_ids": np.ones(shape, np.int32),
        "weights": np.ones(shape, np.float32),
    }
    return _Sample("of random tokens", tokenizer.encode_all(texts), batch)


def _compare_texts(
    run: Trained,
    sample: _Sample,
    by: str,
    encode: Callable[[str], list[int]],
    decode: Callable[[list[int]], str],
) -> str:
    """Raise RuntimeError unless documents are opened, encoded and decoded as by the run."""
    for number, ids in enumerate(sample.documents):
        text = run.tokenizer.decode(ids)
        if encode(text) != [run.tokenizer.separator, *ids.tolist()]:
            raise _differs(f"the ids of document {number} {sample.origin}", by)
        if decode(ids.tolist()) != text:
            raise _differs(f"the text of document {number} {sample.origin}", by)
    tokens = sum(map(len, sample.documents))
    return f"{by}: same ids and text of {tokens:,} tokens {sample.origin}"


def _open(folder: pathlib.Path) -> Any:
    """The model of a folder in transformers, on the CPU."""
    import transformers

    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    if shown:
        transformers.utils.logging.enable_progress_bar()
    return model


def _in_float32(run: Trained) -> Trained:
    """The run as it computes in float32."""
    precise = dict(train__compute_dtype="float32", train__matmul_precision="float32")
    cfg = config.replace(run.cfg, attention__impl="auto", **precise)
    graphdef, _ = create_model(cfg, run.tokenizer.vocab_size, choose_attention(cfg)[0])
    return dataclasses.replace(run, cfg=cfg, graphdef=graphdef)


def _segments(segment_ids_T: np.ndarray) -> Iterator[slice]:
    """The places of each document in a window; for transformers it is a row of its own."""
    for segment in np.unique(segment_ids_T[segment_ids_T > 0]):
        places = np.flatnonzero(segment_ids_T == segment)
        if len(places) > 1:
            yield slice(places[0], places[-1] + 1)


def _compare_logits(run: Trained, model: Any, sample: _Sample, by: str) -> str:
    """Raise RuntimeError unless the logits of windows are those of the run."""
    import torch

    @jax.jit
    def ours(params: Any, batch: Any) -> jax.Array:
        b, decoder = loss.shift(batch), nnx.merge(run.graphdef, params)
        with jax.default_matmul_precision("float32"):
            return decoder.logits(decoder(b.inputs, b.segment_ids, b.positions, dtype=jnp.float32))

    batch, widest = sample.batch, 0.0
    for row, tokens_T in enumerate(batch["tokens"]):
        one = {name: array[row : row + 1] for name, array in batch.items()}
        all_TV = np.asarray(ours(run.params, one))[0]
        for places in _segments(batch["segment_ids"][row]):
            inputs = slice(places.start, places.stop - 1)
            with torch.no_grad():
                found_TV = model(torch.tensor(tokens_T[None, inputs])).logits[0].numpy()
            expected_TV = all_TV[inputs]
            difference_TV = np.abs(found_TV - expected_TV)
            widest = max(widest, float(difference_TV.max()))
            if not (difference_TV <= LOGIT + OF_SIZE * np.abs(expected_TV)).all():
                raise _differs(f"the logits {sample.origin}, by up to {widest:.1e},", by)
    return (
        f"{by}: same logits of {len(batch['tokens'])} windows {sample.origin}, "
        f"largest difference {widest:.1e}"
    )


def _compare_perplexity(
    run: Trained, workdir: pathlib.Path, model: Any, split: Split, by: str
) -> str:
    """Raise RuntimeError unless the perplexity of a split is that of the run."""
    data, ours = run.cfg.data, _scored(run, workdir, split.name)
    batches = windows.eval_batches(
        split,
        seq_len=data.seq_len,
        batch_size=run.cfg.eval.batch_size,
        document_mask=data.document_mask,
        stride=ours["stride"],
    )
    nats, count = 0.0, 0
    with console.phase(f"scoring {split.name} with transformers", len(split.tokens)) as scoring:
        for batch in batches:
            nats += _nats(model, batch, run.tokenizer.vocab_size)
            count += int(batch["weights"].sum())
            scoring.update(count)
    found = metrics.exp(nats / count)
    expected = ours["token_ppl"]
    if count != len(split.tokens) or not math.isclose(found, expected, rel_tol=PERPLEXITY):
        raise _differs(f"the perplexity of {split.name}, {found:.6g} for {expected:.6g},", by)
    return f"{by}: {split.name} perplexity {found:.6g}, the run's is {expected:.6g}"


def _scored(run: Trained, workdir: pathlib.Path, name: str) -> dict[str, Any]:
    """The score of a split at this checkpoint in float32: the one on record, or a new one."""
    train, record = run.cfg.train, read_scores(workdir).get(name, {})
    if record.get("step") != run.step:
        other = f"update {run.step:,}"
    elif (train.compute_dtype, train.matmul_precision) != ("float32", "float32"):
        other = "float32"
    else:
        return record
    console.say(f"{workdir / SCORES.format(name)} is not of {other}, so {name} is scored anew")
    return Evaluator.of(_in_float32(run), run.store)(run.params, name)


def _nats(model: Any, batch: windows.Batch, vocab_size: int) -> float:
    """Summed nats of the scored tokens of windows."""
    import torch

    rows = zip(batch["tokens"], batch["weights"], batch["segment_ids"], strict=True)
    pieces = [
        (tokens_T[at], weights_T[at])
        for tokens_T, weights_T, ids_T in rows
        for at in _segments(ids_T)
    ]
    pieces = sorted((piece for piece in pieces if piece[1].any()), key=lambda piece: len(piece[0]))
    nats = 0.0
    while pieces:
        width = len(pieces[-1][0])
        count = max(1, _AT_ONCE // (width * vocab_size))
        some, pieces = pieces[-count:], pieces[:-count]
        tokens_BT = np.zeros((len(some), width), np.int64)  # padded at the end, where none looks
        weights_BT = np.zeros((len(some), width))
        for row, (tokens_T, weights_T) in enumerate(some):
            tokens_BT[row, : len(tokens_T)] = tokens_T
            weights_BT[row, : len(tokens_T)] = weights_T
        with torch.no_grad():
            logits_BTV = model(torch.from_numpy(tokens_BT[:, :-1])).logits
            nats_N = torch.nn.functional.cross_entropy(
                logits_BTV.flatten(0, 1),
                torch.from_numpy(tokens_BT[:, 1:]).flatten(),
                reduction="none",
            )
        nats += float(nats_N.double().numpy() @ weights_BT[:, 1:].flatten())
    return nats


def _differs(what: str, by: str) -> RuntimeError:
    return RuntimeError(
        f"{by} does not give {what} as the run does, so nothing was written; report it with the "
        "config of the run."
    )
