"""PyTorch modules and losses in the form in which the doctor examines models and losses."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from lm_jax.doctor import trees

_TARGETS = ("targets", "target", "labels", "y")
_MORE: dict[str, Callable[[Any], Any]] = {  # what a forward pass is given of the ids, by name
    "use_cache": lambda ids: False,
    "attention_mask": lambda ids: ids.new_ones(ids.shape),
    **dict.fromkeys(_TARGETS, lambda ids: ids),
}


class TorchModel:
    """The function that `examine_model` takes, `(params, tokens) -> logits`, of a PyTorch module.

    Its `params` are copies of the parameters and buffers; if there is dropout it has
    `train_fn(params, tokens, update)`. The module is as before after every call.

    Args:
        module: a `torch.nn.Module` whose forward takes ids [B, T] and returns logits [B, T, V],
            alone, as `.logits`, or in a tuple or dictionary. One that needs targets, or returns
            logits of the last position alone without them, as nanoGPT's does, is handed the ids;
            one that needs an `attention_mask`, ones.
    """

    def __init__(self, module: Any):
        """Copy what may be replaced: floating-point tensors, tied ones once."""
        self.module = module
        named = [*module.named_parameters(), *((n, b) for n, b in module.named_buffers() if b.ndim)]
        self.params = {n: x.detach().clone() for n, x in named if x.is_floating_point()}
        drops = [part for part in module.modules() if "Dropout" in type(part).__name__]
        dropout = any(part.p for part in drops if isinstance(getattr(part, "p", 0), float))
        self.train_fn = self._train if dropout else None
        accepted = inspect.signature(module.forward).parameters
        needed = {name for name, p in accepted.items() if p.default is p.empty} | {"use_cache"}
        self._more = {name for name in _MORE if name in accepted and name in needed}
        self._targets = {name for name in _TARGETS if name in accepted}

    def __call__(self, params: Mapping[str, Any], tokens: Any) -> np.ndarray:
        """Logits [B, T, V] in evaluation; batch norms run as in training, for there they leak."""
        with _mode(self.module, training=False):
            return self._logits(params, tokens)

    def _train(self, params: Mapping[str, Any], tokens: Any, update: int) -> np.ndarray:
        """Logits with dropout, whose masks are those of the update."""
        import torch

        gpus = range(torch.cuda.device_count())
        with _mode(self.module, training=True), torch.random.fork_rng(gpus):
            torch.manual_seed(int(update))
            return self._logits(params, tokens)

    def _logits(self, params: Mapping[str, Any], tokens: Any) -> np.ndarray:
        import torch

        # Buffers may be written to in the forward pass: copies of all are handed over.
        state = {name: x.clone() for name, x in self.module.named_buffers()}
        for name, value in params.items():
            state[name] = _tensor(value).to(self.params[name], copy=name in state)
        device = next(iter(self.params.values()), torch.empty(0)).device
        ids = torch.as_tensor(np.asarray(tokens), dtype=torch.int64, device=device)
        more = {name: _MORE[name](ids) for name in self._more}
        with torch.no_grad():
            out = torch.func.functional_call(self.module, state, (ids,), more)
        logits = trees.logits_of(out, *ids.shape)
        if not isinstance(logits, torch.Tensor):
            raise ValueError("forward returns no tensor of logits [B, T, V]; let it do so")
        if logits.shape[1] == 1 < ids.shape[1]:
            if self._targets <= self._more:
                raise ValueError("forward returns logits of the last position alone, not of all")
            self._more |= self._targets
            return self._logits(params, tokens)
        return trees.as_array(logits.float() if logits.element_size() < 4 else logits)


torch_model = TorchModel


def torch_loss(function: Callable[..., Any]) -> Callable[..., tuple[float, float]]:
    """Make the function that `examine_loss` takes of a PyTorch loss.

    `function` takes tensors: (logits [B, T, V], ids int64 [B, T], weights [B, T]) -> (sum of nats,
    count). What is made of it takes NumPy arrays, and has `gradient(logits, tokens, weights)`, that
    of the sum by the logits.
    """
    import torch

    def tensors(logits: Any, tokens: Any, weights: Any) -> tuple[Any, Any, Any]:
        return _tensor(logits), _tensor(tokens).long(), _tensor(weights)

    def loss(*arrays: Any) -> Any:
        with torch.no_grad():
            made = function(*tensors(*arrays))
        if not isinstance(made, tuple | list):  # `examine_loss` says what is wrong with it
            return made
        return tuple(x.item() if getattr(x, "ndim", None) == 0 else x for x in made)

    def gradient(*arrays: Any) -> np.ndarray:
        z, *labels = tensors(*arrays)
        total = function(z.requires_grad_(), *labels)[0]
        if not getattr(total, "requires_grad", False):
            raise ValueError("the sum has no gradient; return it as a tensor, not detached")
        return trees.as_array(torch.autograd.grad(total, z)[0])

    loss.gradient = gradient  # type: ignore[attr-defined]
    return loss


def _tensor(value: Any) -> Any:
    """A tensor of an array of NumPy, JAX or PyTorch; bfloat16 stays bfloat16."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.detach()
    value = np.asarray(value)
    if value.dtype.name == "bfloat16":
        return torch.tensor(value.astype(np.float32)).to(torch.bfloat16)
    return torch.tensor(value)


@contextmanager
def _mode(module: Any, *, training: bool) -> Iterator[None]:
    """Put the whole module into a mode, batch norms into training, and every part back."""
    import torch

    modes = [(part, part.training) for part in module.modules()]
    module.train(training)
    for part, _ in modes:
        if isinstance(part, torch.nn.modules.batchnorm._BatchNorm):
            part.training = True
    try:
        yield
    finally:
        for part, was in modes:
            part.training = was
