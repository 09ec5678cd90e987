"""A run as a model of lm_eval; importing this registers it there as `lm_jax`."""

import json
import os
from collections.abc import Sequence
from typing import Any

import jax
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs

from lm_jax import console
from lm_jax.decode import Sampling
from lm_jax.generate import continued, encode_prompt
from lm_jax.harness.scoring import Scorer
from lm_jax.places import pulled
from lm_jax.pretrained import open_model


@register_model("lm_jax")
class RunLM(TemplateLM):
    """A run or a Hugging Face checkpoint; how contexts are cut is lm_eval's own (`TemplateLM`)."""

    def __init__(
        self,
        workdir: str,
        checkpoint: str = "best",
        add_bos_token: bool = True,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        """Open it.

        Args:
            workdir: folder of the run or checkpoint.
            checkpoint: as of `open_trained`.
            add_bos_token: whether a text begins with the token that opens a document, as in
                training; lm_eval's own `hf` model does what the tokenizer of a checkpoint does.
            batch_size: rows at a time; None or "auto": as in the run's config.
            max_batch_size: not used; lm_eval passes it to every model.
            device: not used; JAX has chosen it.
        """
        super().__init__()
        # Else lm_eval forks this process for errors of perplexities, and a fork of JAX may hang.
        os.environ["DISABLE_MULTIPROC"] = "1"
        rows = {} if batch_size in (None, "auto") else {"eval__batch_size": int(batch_size)}
        self.workdir, self.add_bos_token = workdir, add_bos_token
        self.run = open_model(pulled(workdir, checkpoint), checkpoint=checkpoint, **rows)
        self._score = Scorer(self.run)

    @property
    def eot_token_id(self) -> int:
        """The token that opens a document."""
        return self.run.tokenizer.separator

    @property
    def max_length(self) -> int:
        """Most tokens that are read."""
        return self._score.window

    @property
    def tokenizer_name(self) -> str:
        """What tells this tokenizer from others, for lm_eval's cache of requests."""
        return self.run.tokenizer.content_hash

    def get_model_info(self) -> dict[str, Any]:
        """What lm_eval writes of the model beside its results."""
        return {
            "workdir": self.workdir,
            "step": self.run.step,
            "model_num_parameters": sum(x.size for x in jax.tree.leaves(self.run.params)),
            "model_dtype": self.run.cfg.train.compute_dtype,
            "max_length": self.max_length,
            "add_bos_token": self.add_bos_token,
        }

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """The ids of a text.

        Raises:
            ValueError: if the tokenizer has none for a part of it.
        """
        opens = self.add_bos_token if add_special_tokens is None else add_special_tokens
        ids = encode_prompt(self.run.tokenizer, string, "the task's text")
        return [self.eot_token_id] * opens + ids

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        found = self._score([(context, ids) for _, context, ids in requests])
        for (texts, _, _), likelihood in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, tuple(likelihood))
        return [(log_prob, greedy) for log_prob, greedy in found]

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-likelihood of each text as a document, in nats."""
        texts = [request.args for request in requests]
        found = self._score(
            [([self.eot_token_id], self.tok_encode(text, False)) for (text,) in texts]
        )
        for text, likelihood in zip(texts, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", text, likelihood.log_prob)
        return [likelihood.log_prob for likelihood in found]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Each context continued to the first of its stop texts, without it.

        Only these end a text: as in `lm_jax.generate`, the token that opens a document is never
        drawn, and other special tokens stand for no text.
        """
        made = [""] * len(requests)
        by_options: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            by_options.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(place)
        with console.phase("generating", len(requests)) as generating:
            for places in by_options.values():
                places.sort(key=lambda place: len(requests[place].args[0]))
                options = requests[places[0]].args[1]
                for first in range(0, len(places), self.run.cfg.eval.batch_size):
                    now = places[first : first + self.run.cfg.eval.batch_size]
                    texts = self._continue([requests[place].args[0] for place in now], options)
                    for place, text in zip(now, texts, strict=True):
                        made[place] = text
                        self.cache_hook.add_partial("generate_until", requests[place].args, text)
                    generating.update(generating.done + len(now))
        return made

    def _continue(self, contexts: Sequence[str], options: dict[str, Any]) -> list[str]:
        """Texts after contexts, of which what leaves no room for the new tokens is cut off."""
        options = normalize_gen_kwargs(options)
        tokens, until = options["max_gen_toks"], options["until"]
        kept = max(1, self.max_length - tokens)
        ids = [self.tok_encode(context)[-kept:] for context in contexts]
        how = Sampling(
            temperature=options.get("temperature", 0.0),
            top_k=options.get("top_k", 0),
            top_p=options.get("top_p", 1.0),
            seed=0,
        )
        return [row.text for row in continued(self.run, ids, range(len(ids)), tokens, how, until)]
