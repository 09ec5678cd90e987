"""A distillation as a black box: teacher, targets, objective and loop."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax.doctor import facts, trees
from lm_jax.doctor.checks import fixture
from lm_jax.doctor.facts import Bound, Broken, Facts, Skip, array, call, function, pair, whole

KINDS = ("forward", "reverse", "jsd", "skew")
SHARE = Bound("give a number inside (0, 1)", lambda x: facts.real(x) and 0 < x < 1)
FLOAT = Bound("give the name of a float type", trees.names_float)
TOKENS = Bound(
    "let its 'tokens' be an array of whole numbers [B, T], T 2 or more",
    lambda x: are_tokens(trees.as_array(x["tokens"])),
)
ROWS = Bound("give a list of mappings", lambda x: all(isinstance(row, Mapping) for row in x))
Function = Annotated[Callable[..., Any] | None, function]
Number = Annotated[int | None, whole(1)]
Objective = Callable[[Any, float], tuple[float, dict[str, float]]]


def are_tokens(ids: np.ndarray) -> bool:
    """Whether these are ids [B, T] in which something is predicted."""
    is_table = ids.ndim == 2 and len(ids) > 0 and ids.shape[1] > 1
    return is_table and bool(np.issubdtype(ids.dtype, np.integer))


@dataclasses.dataclass
class Subject(Facts):
    """Examine a distillation of any framework; what is not given is skipped by name.

    A divergence of PyTorch, of tensors s, t, w and a number T:

        kd_fn = lambda s, t, w, T: kl(*map(torch.tensor, (s, t, w)), T)
        doctor.examine_distillation(kd_fn=kd_fn, kind="forward").show()

    Tokens are [B, T], logits [B, T, V], those at position t about token t + 1. Gradients come from
    JAX, and from PyTorch for the parameters of an objective; checks that need others are skipped.
    The divergence is KL(teacher || student) if forward, KL(student || teacher) if reverse; jsd and
    skew, KL(teacher || mixture), are from a mixture of both.
    """

    _: dataclasses.KW_ONLY
    kd_fn: Annotated[
        Function,
        "(student's logits, teacher's logits, weights [B, T], temperature) -> (sum, count), the "
        "divergence; it gets arrays of NumPy where JAX cannot trace it.",
    ] = None
    kind: Annotated[str, "forward, reverse, jsd or skew.", facts.one_of(*KINDS)] = "forward"
    beta: Annotated[float, "weight of the teacher in jsd's and skew's mixture.", SHARE] = 0.5
    t2: Annotated[bool, "whether kd_fn and topk_fn multiply by temperature^2."] = True
    topk_fn: Annotated[Function, "kd_fn with an argument k more: of the k likeliest tokens."] = None
    topk_union: Annotated[bool, "whether those are of teacher and student, k of each."] = True
    vocab_size: Annotated[int, "V of the logits made for kd_fn and topk_fn.", whole(4)] = 32
    teacher_fn: Annotated[Function, "(teacher_params, tokens) -> logits, as evaluated."] = None
    teacher_params: Annotated[Any, "all that the targets are made of, projections included."] = None
    targets_fn: Annotated[
        Function, "(teacher_params, batch) -> logits that the student's loss reads."
    ] = None
    batch: Annotated[
        Mapping[str, Any] | None,
        "the student's tokens, weights [B, T] (above 0 where a token is scored as a target; "
        "default all), and whatever else the pipeline reads.",
        facts.mapping,
        TOKENS,
    ] = None
    unigram_nats: Annotated[
        float | None, "of a token by the corpus's frequencies; default from batch.", facts.above(0)
    ] = None
    suffix_fn: Annotated[
        Function,
        "(batch, cut) -> batch with another text from student token cut on; default replaces "
        "tokens, so give it where the teacher has tokens of its own.",
    ] = None
    compute_dtype: Annotated[str, "of teacher and objective, for rounding.", FLOAT] = "float32"
    student_params: Annotated[Any, "tree of what is trained."] = None
    objective_fn: Annotated[
        Function,
        "(student_params, teacher_params, batch, alpha) -> (total, parts) without dropout, total "
        "= alpha kd_kl_t2 + (1 - alpha) lm_ce of the raw parts of these names.",
    ] = None
    whole_fn: Annotated[
        Function,
        "(student_params, teacher_params, batch) -> total, all that is differentiated, where "
        "there are other terms; default objective_fn with alpha 1/2.",
    ] = None
    eval_fn: Annotated[Function, "(student_params, teacher_params, batch, update) -> parts."] = None
    init_fn: Annotated[Function, "(seed) -> state of the loop."] = None
    step_fn: Annotated[Function, "(state, batch) -> state or (state, metrics)."] = None
    student_of: Annotated[Function, "(state) -> student_params."] = None
    teacher_of: Annotated[Function, "(state) -> teacher_params."] = None
    calls: Annotated[int, "of step_fn after which the student must have moved.", whole(1)] = 4
    student_parameters: Annotated[Number, "declared number of the student's parameters."] = None
    teacher_parameters: Annotated[Number, "the same of the teacher."] = None
    records: Annotated[
        Sequence[Mapping[str, Any]] | None,
        "log with step, distill/objective, distill/temperature, raw terms distill/NAME and "
        "weighted ones distill/weighted/NAME.",
        ROWS,
    ] = None
    weights_fn: Annotated[Function, "(update) -> {name: weight}, also of temperature."] = None
    steps: Annotated[Number, "updates of the run."] = None
    contrastive_candidates: Annotated[Number, "embeddings that each is told from."] = None
    seed: Annotated[int, "of what is drawn.", whole()] = 0

    @property
    def eps(self) -> float:
        """Step of the compute dtype near 1."""
        return float(jnp.finfo(jnp.dtype(self.compute_dtype)).eps)

    def logits(self, name: str, params: Any, read: Any) -> np.ndarray:
        """What a function of the teacher returns, [B, T, V], in the precision it has."""
        shape = tuple(self.batch["tokens"].shape) if self.batch else ()
        found = array(name, call(name, getattr(self, name), params, read))
        if found.ndim != 3 or found.shape[:2] != shape or not found.size:
            raise Broken(f"{name} returned shape {found.shape}, not {shape} and V")
        # One of -inf is of a token that is ruled out; a position without any other says nothing.
        if not all((row.max(-1) < np.inf).all() & (row.max(-1) > -np.inf).all() for row in found):
            raise Broken(f"{name} returned logits that are NaN or infinite")
        return found


def scalar(value: Any) -> float:
    """A number of any framework."""
    return float(trees.as_array(value))


def numbers(name: str, made: Any) -> dict[str, float]:
    """What a function returned as numbers by name."""
    if not isinstance(made, Mapping):
        raise Broken(f"{name} returned {facts.kind_of(made)}, not a mapping of numbers")
    return {str(n): call(f"the number {n} of {name}", scalar, x) for n, x in made.items()}


def gradients(name: str, total: Callable[..., Any], *args: Any) -> tuple[Any, ...]:
    """JAX's gradients by all arguments; `Skip` if JAX cannot trace the function at all."""
    try:
        return jax.grad(total, tuple(range(len(args))), allow_int=True)(*args)  # type: ignore[no-any-return]
    except Broken:
        raise
    except Exception as error:
        try:
            jax.eval_shape(total, *args)
        except Exception:
            raise Skip(f"JAX cannot differentiate {name} ({type(error).__name__}).") from error
        raise Broken(f"the gradient of {name} raised {facts.described(error)}") from error


@fixture
def tokens(batch: Any) -> np.ndarray:
    """Student tokens [B, T] of the batch."""
    return trees.as_array(batch["tokens"])


@fixture
def scored(batch: Any, tokens: np.ndarray) -> np.ndarray:
    """Rows and columns [2, N] of the positions whose logits are scored on the next token."""
    weights: np.ndarray = trees.as_array(batch.get("weights", np.ones(tokens.shape)))
    if weights.shape != tokens.shape:
        raise Broken(f"batch['weights'] has shape {weights.shape}, tokens have {tokens.shape}")
    places = np.stack(np.nonzero(weights[:, 1:] > 0))
    if not places.size:
        raise Broken("no token of batch is scored: weights[:, 1:] has nothing above 0")
    return places


@fixture
def alone(subject: Subject, teacher_fn: Any, teacher_params: Any, batch: Any) -> np.ndarray:
    """The teacher's logits on the batch's tokens, outside the pipeline."""
    return subject.logits("teacher_fn", teacher_params, batch["tokens"])


@fixture
def taught(subject: Subject, targets_fn: Any, teacher_params: Any, batch: Any) -> np.ndarray:
    """The targets, as logits."""
    return subject.logits("targets_fn", teacher_params, batch)


@fixture
def objective(objective_fn: Any, student_params: Any, teacher_params: Any, batch: Any) -> Objective:
    """Total and raw parts for parameters of the teacher and a share alpha of distillation."""
    if not trees.float_leaves(teacher_params):
        raise Skip("teacher_params has no floating-point leaves.")

    def found(teacher: Any, alpha: float) -> tuple[float, dict[str, float]]:
        made = call("objective_fn", objective_fn, student_params, teacher, batch, alpha)
        total, parts = pair("objective_fn", made, "(total, parts)")
        return call("the total of objective_fn", scalar, total), numbers("objective_fn", parts)

    return found


class Point(NamedTuple):
    """What the loop holds at a time, copied to the host."""

    student: trees.Arrays
    teacher: trees.Arrays
    targets: np.ndarray | None


@fixture
def loop(
    subject: Subject, init_fn: Any, step_fn: Any, student_of: Any, batch: Any
) -> tuple[Point, Point]:
    """Student, teacher and targets before and after some calls of the loop."""

    def held(name: str, state: Any) -> trees.Arrays:
        if found := trees.named(call(name, getattr(subject, name), state)):
            return found
        raise Broken(f"{name} returned no arrays")

    def point(state: Any) -> Point:
        student, teacher, targets = held("student_of", state), {}, None
        if subject.teacher_of is not None:
            teacher = held("teacher_of", state)
            if subject.targets_fn is not None:
                targets = subject.logits("targets_fn", subject.teacher_of(state), batch).copy()
        return Point(student, teacher, targets)

    state = call("init_fn", init_fn, subject.seed)
    before = point(state)
    shape: Any = jax.tree.structure(state)
    for _ in range(subject.calls):
        made = call("step_fn", step_fn, state, trees.copies(batch))
        # A state may itself be a pair; else metrics are a mapping at its end.
        pair = type(made) is tuple and len(made) == 2 and isinstance(made[1], Mapping)
        state = made[0] if pair and jax.tree.structure(made) != shape else made
    after = point(state)
    if before.student.keys() != after.student.keys():
        raise Broken("student_of returns other leaves after a call of step_fn than before")
    return before, after
