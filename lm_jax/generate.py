"""Samples from a trained run, from its workdir alone.

    python -m lm_jax.generate runs/quickstart-0 --prompt="..." --samples=3

prints samples as they come and appends them to `samples.jsonl` of the run; in a notebook
`lm_jax.open_run(workdir).generate(prompt)` returns them. In place of a run, the folder of a
Hugging Face checkpoint may be given, or several runs with commas, whose probabilities are averaged;
nothing is written there.
"""

import codecs
import contextlib
import io
import math
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags

from lm_jax import console, processes
from lm_jax.config import Config
from lm_jax.config.flags import parse_flags
from lm_jax.data.tokenizers.base import Tokenizer
from lm_jax.decode import Sampling, continuations
from lm_jax.door import command
from lm_jax.ensemble import MODELS, open_models
from lm_jax.files import user_path
from lm_jax.places import put_back
from lm_jax.pretrained import define_model
from lm_jax.samples import Sample, Samples, record_samples
from lm_jax.workdir import SAMPLES, Trained

TOKENS = 200  # of a sample, where no number is given
EVALUATED = 64  # tokens of a sample at an evaluation


class ArgumentError(ValueError):
    """An argument that is impossible, or impossible with this run."""


def generate(
    run: Trained,
    prompts: str | Sequence[str] = "",
    *,
    tokens: int = TOKENS,
    samples: int = 1,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    show: Callable[[str], Any] | None = None,
) -> Samples:
    """Continue prompts, each of which opens a document, as each would be continued alone.

    Args:
        run: from `open_trained` or `open_models`.
        prompts: one text or several; empty to start from nothing. Where a text grows longer than
            the window of the model, its last part is kept.
        tokens: length of each continuation.
        samples: number of continuations of each prompt.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: keep only so many of the most likely tokens; 0: all.
        top_p: keep the fewest tokens that have this probability, after temperature and top_k.
        seed: the same seed gives the same samples.
        stop: one text or several, before the first of which a continuation ends.
        show: called with each new piece of the first continuation.

    Returns:
        All samples of the first prompt, then those of the next.

    Raises:
        ArgumentError: if an argument is impossible, naming the command's flag and the remedy.
        FloatingPointError: if the logits are not finite.
    """
    prompts, stop = ([text] if isinstance(text, str) else text for text in (prompts, stop))
    sampling = Sampling(temperature, top_k, top_p, seed)
    _check_options(tokens, samples, sampling, stop)
    _check(len(prompts) > 0, "--prompt=[]", "give one or more; '' starts from nothing")
    # A document starts with its separator, in training too.
    separator = run.tokenizer.separator
    contexts = [[separator, *encode_prompt(run.tokenizer, prompt)] for prompt in prompts]
    _say_window(run.cfg.data.seq_len, max(map(len, contexts)) + tokens - 1)
    numbers = [*range(samples)] * len(prompts)
    several = [context for context in contexts for _ in range(samples)]
    rows = continued(run, several, numbers, tokens, sampling, stop, show)
    return Samples(
        Sample(prompts[n // samples], row.text, row.ids, row.log_probs, run.step)
        for n, row in enumerate(rows)
    )


def continued(
    run: Trained,
    contexts: Sequence[Sequence[int]],
    numbers: Sequence[int],
    tokens: int,
    how: Sampling,
    stop: Sequence[str],
    show: Callable[[str], Any] | None = None,
) -> list["_Row"]:
    """Rows with the text of `continuations`, each before the first of the stop texts."""
    rows = [_Row(run.tokenizer, stop) for _ in contexts]
    rows[0].show = show
    for ids_Bn, log_probs_Bn in continuations(run, contexts, numbers, tokens, how):
        for row, ids, log_probs in zip(rows, ids_Bn, log_probs_Bn.tolist(), strict=True):
            row.add(ids, log_probs)
        if all(row.ended for row in rows):
            break
    for row in rows:
        row.finish()
    return rows


def _say_window(window: int, length: int) -> None:
    if length > window:
        console.say(
            f"the model's window is {window} tokens (config.data.seq_len): whenever a text fills "
            "it, its last half is kept"
        )


class _Row:
    """A continuation as it grows."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]):
        self._tokenizer, self._stop = tokenizer, stop
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.ids: list[int] = []
        self.log_probs: list[float] = []
        self.text, self.ended = "", False
        self.show: Callable[[str], Any] | None = None
        self._shown = 0

    def add(self, ids: np.ndarray, log_probs: Sequence[float]) -> None:
        """Go on to the first stop string; the bytes of one character may be several tokens."""
        pieces = self._tokenizer.token_bytes(ids)
        for token, log_prob, piece in zip(ids.tolist(), log_probs, pieces, strict=True):
            if self.ended:
                break
            self.ids.append(token)
            self.log_probs.append(log_prob)
            self._grow(self._decoder.decode(piece))
        self._tell()

    def finish(self) -> None:
        """A character that was left unfinished shows as U+FFFD."""
        if not self.ended:
            self._grow(self._decoder.decode(b"", final=True))
        self.ended = True
        self._tell()

    def _tell(self) -> None:
        if self.show is not None:
            self.show(self.text[self._shown : self.settled])
            self._shown = self.settled

    def _grow(self, new: str) -> None:
        before, self.text = len(self.text), self.text + new
        places = (self.text.find(stop, max(0, before + 1 - len(stop))) for stop in self._stop)
        if found := [place for place in places if place >= 0]:
            self.text, self.ended = self.text[: min(found)], True

    @property
    def settled(self) -> int:
        """Length of the text that no later token takes away."""
        begun = (
            length
            for stop in self._stop
            for length in range(1, len(stop))
            if not self.ended and self.text.endswith(stop[:length])
        )
        return len(self.text) - max(begun, default=0)


def encode_prompt(tokenizer: Tokenizer, prompt: str, where: str = "--prompt") -> list[int]:
    """The ids of a prompt.

    Raises:
        ArgumentError: if the tokenizer has none for a part of it, naming the flag or field `where`
            it was given.
    """
    try:
        return tokenizer.encode(prompt).tolist()
    except ValueError as error:
        reason, _, _ = str(error).partition(": set ")  # another tokenizer, which comes too late
        raise ArgumentError(f"{where}={prompt[:40]!r}: {reason}; leave it out.") from error


def _check_options(tokens: int, samples: int, how: Sampling, stop: Sequence[str]) -> None:
    _check(tokens >= 1, f"--tokens={tokens}", "give 1 or more")
    _check(samples >= 1, f"--samples={samples}", "give 1 or more")
    _check(0 <= how.temperature < math.inf, f"--temperature={how.temperature}", "give 0 or more")
    _check(how.top_k >= 0, f"--top_k={how.top_k}", "give 1 or more, or 0 for all tokens")
    _check(0 < how.top_p <= 1, f"--top_p={how.top_p}", "give more than 0 and at most 1")
    # JAX drops the higher bits of a seed, so two of them would give the same samples.
    _check(0 <= how.seed < 2**32, f"--seed={how.seed}", "give 0 or more and below 2**32")
    _check("" not in stop, "--stop=''", "give a text, or leave it out")


def _check(ok: bool, flag: str, remedy: str) -> None:
    if not ok:
        raise ArgumentError(f"{flag} is impossible; {remedy}.")


def evaluation_prompts(cfg: Config) -> list[str]:
    """Those of `config.train.sample_prompts`."""
    return cfg.train.sample_prompts.split("|") if cfg.train.sample_prompts else []


def sample_prompts(run: Trained, folder: pathlib.Path) -> Samples:
    """Continue each of `config.train.sample_prompts`, the same way at every evaluation of a run.

    The samples are appended to `samples.jsonl`.

    Args:
        run: the run as it is at this evaluation.
        folder: its workdir.
    """
    prompts = evaluation_prompts(run.cfg)
    if not prompts:
        return Samples()
    with console.phase("sampling"):
        made = generate(run, prompts, tokens=min(EVALUATED, run.cfg.data.seq_len // 2 + 1))
    record_samples(folder, {"evaluation": True}, made)
    return made


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Print samples; append those of a run to its `samples.jsonl`."""
    given = flags.FlagValues()
    flags.DEFINE_integer("tokens", TOKENS, "Length of a sample.", flag_values=given)
    flags.DEFINE_integer("samples", 1, "Number of samples of a prompt.", flag_values=given)
    flags.DEFINE_float("temperature", 0.8, "0: the most likely token.", flag_values=given)
    flags.DEFINE_integer("top_k", 0, "Most likely tokens kept; 0: all.", flag_values=given)
    flags.DEFINE_float("top_p", 1.0, "Probability mass kept.", flag_values=given)
    flags.DEFINE_integer("seed", 0, "The same seed gives the same samples.", flag_values=given)
    stop = "A sample ends before this text, in which \\n is a line end; may be repeated."
    flags.DEFINE_multi_string("stop", [], stop, flag_values=given)
    names = list(given)  # the arguments of `generate`
    define_model(given, MODELS)
    flags.DEFINE_multi_string("prompt", [], "Opens a document; may be repeated.", given)
    flags.DEFINE_string("prompts", None, "File of prompts, one a line.", given)
    flags.DEFINE_bool("interactive", False, "Ask for prompts until Ctrl-D.", given)
    flags.DEFINE_bool("logprobs", False, "Print the log-probability of each token.", given)
    parse_flags(given, argv, __doc__, subject=["workdir"])
    processes.only_first("generate")
    console.use(aside=True)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal may lack some characters
        sys.stdout.reconfigure(errors="replace")
    options: dict[str, Any] = {name: given[name].value for name in names}
    options["stop"] = [text.replace("\\n", "\n") for text in given.stop]
    prompts = _prompts(given)
    with console.phase(f"opening {given.workdir}"):
        run, folder = open_models(given.workdir, given.checkpoint)
    if given.interactive:
        _interact(run, folder, options, given.logprobs)
    else:
        _print_samples(run, folder, prompts, options, given.logprobs)


def _prompts(given: flags.FlagValues) -> list[str]:
    """Those of the flags, which must not name other sources as well."""
    if given.interactive and (given.prompt or given.prompts):
        raise ArgumentError("--interactive asks for its prompts; leave out --prompt and --prompts.")
    lines = []
    if given.prompts:
        try:
            text = user_path(given.prompts).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ArgumentError(f"--prompts={given.prompts}: is no UTF-8; convert it.") from error
        lines = text.removesuffix("\n").split("\n")
    return [*given.prompt, *lines] or [""]


def _interact(
    run: Trained, folder: pathlib.Path | None, options: Mapping[str, Any], log_probs: bool
) -> None:
    """Each prompt has a seed of its own: asked twice, it is continued twice."""
    seed = options["seed"]
    while True:
        try:
            prompt = input("prompt> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        try:
            _print_samples(run, folder, [prompt], {**options, "seed": seed}, log_probs)
        except ArgumentError as error:
            print(error, file=sys.stderr)
        seed += 1


def _print_samples(
    run: Trained,
    folder: pathlib.Path | None,
    prompts: Sequence[str],
    options: Mapping[str, Any],
    log_probs: bool,
) -> None:
    """Print samples, one alone as it comes, and append them to `samples.jsonl`."""
    alone = len(prompts) * options["samples"] == 1
    unsaid = [prompts[0]]  # by the first piece the options are known to be possible
    with contextlib.ExitStack() as silence:
        silence.enter_context(console.phase("sampling"))

        def show(piece: str) -> None:
            silence.close()
            print(*unsaid, piece, sep="", end="", flush=True)
            unsaid.clear()

        made = generate(run, prompts, **options, show=show if alone else None)
    facts = {name: value for name, value in options.items() if name != "tokens"}
    # Of a run or an ensemble; the folder of a Hugging Face checkpoint stays as it is.
    if run.data and folder is not None:
        record_samples(folder, facts, made)
        put_back(folder, SAMPLES)
    for number, one in enumerate(made, start=1):
        if alone:
            print()
        else:
            print(f"--- sample {number} of {len(made)}\n{one.prompt}{one.text}")
        if log_probs:
            pieces = run.tokenizer.token_bytes(np.array(one.ids))
            for piece, nats in zip(pieces, one.log_probs, strict=True):
                print(f"{nats:10.4f}  {piece.decode(errors='replace')!r}")


if __name__ == "__main__":
    main()
