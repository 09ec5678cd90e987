"""The fields of the run config: default, bound or choices, meaning and unit side by side.

A config file returns a `Config`. Assigning an unknown field or a wrong type raises at once and
names the remedy.
"""

import dataclasses

from lm_jax.config.section import (
    Section,
    incidental,
    limited,
    marks,
    not_negative,
    one_of,
    positive,
    share,
)
from lm_jax.config.values import Curve, Duration, RopeScaling, Span


@dataclasses.dataclass(repr=False)
class DataConfig(Section):
    """What is read and how it is cut into windows."""

    corpus: str = "synthetic"  # synthetic | wikitext2 | wikitext103 | text | tfds:NAME
    source_dir: str = incidental("")  # with the corpus's files; empty: download where possible
    # corpus "text": paths, globs or URLs of the training files, separated by commas; a comma in a
    # name is written ?, unless the file stands alone
    files: str = ""
    valid_files: str = ""  # corpus "text": files held out for validation; empty: a share of files
    test_files: str = ""  # corpus "text": files held out for the test
    # corpus "text": what one document is: file | line | jsonl:FIELD | parquet:FIELD |
    # arrayrecord (each record is a text) | arrayrecord:FIELD (each record is JSON); a field within
    # another is OUTER.INNER
    document: str = "file"
    skip_missing: bool = False  # leave out documents whose FIELD is null or missing
    valid_fraction: float = share(0.1)  # held out for validation if the corpus has no such split
    test_fraction: float = share(0.0)  # held out for the test if the corpus has no such split
    cache_dir: str = incidental("~/.cache/lm_jax")  # of prepared corpora and token stores
    # processes that tokenise a corpus of more than 32 MB; 0: one a core
    workers: int = incidental(limited(0, below=1025, why="more processes than a machine bears"))
    seq_len: int = positive(256)  # T, tokens predicted per window
    batch_size: int = positive(32)  # sequences per update, over all devices and micro-batches
    # most sequences that a device computes at a time; 0: all
    micro_batch: int = incidental(not_negative(0))
    document_mask: bool = True  # attention and positions restart at each document
    window_offset: bool = False  # cut the text into windows elsewhere in every epoch
    # the updates in which windows are read in parts: equal shares of them by eighths, quarters and
    # halves; then whole
    growth: Duration = Duration("0")
    # threads that assemble batches ahead of the step; 0: in the loop itself
    threads: int = incidental(limited(1, below=129, why="each would keep two calls in memory"))


@dataclasses.dataclass(repr=False)
class TokenizerConfig(Section):
    """How text becomes ids."""

    # what an id stands for; hf: the tokenizer of a Hugging Face checkpoint
    kind: str = one_of("byte char word bpe hf", default="char")
    folder: str = ""  # of that checkpoint, with tokenizer.json and config.json
    # ids with the separator, for bpe and word; 0: all types (word)
    vocab_size: int = not_negative(0)
    # characters of the train split that bpe and word learn from; 0: all
    sample: int = not_negative(0)


# The fields of the model that a family reads (None: all); the others must keep their defaults.
FAMILY_FIELDS = {
    "dense": None,
    # gated 8 x 8 matrices (models/musota.py): D is 64 and the head untied, whatever stands below
    "musota": "family layers init_std dropout embedding_dropout logit_softcap scan_layers remat",
}


@dataclasses.dataclass(repr=False)
class ModelConfig(Section):
    """The decoder."""

    # dense: a transformer with the options below; musota: models/musota.py
    family: str = one_of(" ".join(FAMILY_FIELDS), default="dense")
    layers: int = positive(4)  # blocks
    d_model: int = positive(128)  # D, width of the residual stream
    heads: int = positive(4)  # H, query heads
    kv_heads: int = not_negative(0)  # key/value heads, a divisor of heads; 0: as many as heads
    head_dim: int = not_negative(0)  # C, width of a head; 0: d_model / heads
    d_ff: int = not_negative(0)  # F, inside the MLP; 0: 4 D, for swiglu 8/3 D (multiple of 8)
    norm: str = one_of("rmsnorm layernorm", default="rmsnorm")  # before each branch and the head
    norm_eps: float = positive(1e-6)  # added to the mean square
    positions: str = one_of("rotary learned none", default="rotary")  # how order is told
    rope_theta: float = positive(10_000.0)  # base of the rotary wavelengths
    # of the rotary wavelengths for longer texts: linear:factor=2, llama3:... or yarn:..., see
    # models/rotary.py; empty: none
    rope_scaling: RopeScaling = RopeScaling("")
    window: int = not_negative(0)  # positions that attention sees, its own included; 0: all
    # activation of the MLP; gelu_tanh: the approximation in GPT-2; relu2: squared ReLU
    mlp: str = one_of("swiglu gelu gelu_tanh relu2", default="swiglu")
    qk_norm: bool = False  # RMS-normalise queries and keys per head before rotary
    # half of each key is that of the token before, so that one layer finds what followed a token
    key_offset: bool = False
    embedding_values: bool = False  # add a linear map of the embedded tokens to the values
    embedding_skip: bool = False  # mix the embedded tokens into the input of every layer
    head_gate: bool = False  # scale what each head found by a number that the token decides on
    bias: bool = False  # biases in the linear maps of the blocks and in layernorm
    # linear maps that have them under bias; qkv: those of queries, keys and values
    bias_in: str = one_of("all attention qkv", default="all")
    tied: bool = True  # the head is the embedding table
    # r of a token table [V, r] times [r, D]; 0: one table [V, D]
    embedding_rank: int = not_negative(0)
    # of matrices; normal: N(0, init_std^2); fan_in: N(0, 1/inputs)
    init: str = one_of("normal fan_in", default="normal")
    init_std: float = positive(0.02)  # std of every table, and of matrices under init "normal"
    dropout: float = share(0.0)  # rate on the residual branches
    attention_dropout: float = share(0.0)  # rate on the attention probabilities
    embedding_dropout: float = share(0.0)  # rate on the embedded tokens
    logit_softcap: float = not_negative(0.0)  # c in c tanh(logits / c); 0: off
    scan_layers: bool = False  # one compiled block scanned over depth: compile time flat in depth
    remat: bool = False  # recompute each block in the backward pass to save memory

    def reads(self, name: str) -> bool:
        """Whether the family reads a field."""
        fields = FAMILY_FIELDS[self.family]
        return fields is None or name in fields.split()


@dataclasses.dataclass(repr=False)
class OptimConfig(Section):
    """Optimiser, schedule and clipping."""

    # muon: the matrices of the blocks by Muon (whose iteration is in bfloat16 under that
    # train.compute_dtype, and always on a GPU that is fast in it), the rest by Adam; normuon: Muon
    # whose outputs each have a second moment
    name: str = one_of("adamw muon normuon", default="adamw")
    peak_lr: float = positive(1e-3)  # learning rate after warm-up
    warmup: Duration = Duration("100")  # linear from peak / warmup; the first update has LR > 0
    # of the learning rate after warm-up; wsd: constant, with a final linear decay
    schedule: str = one_of("cosine linear constant wsd", default="cosine")
    end_lr: float = not_negative(0.1)  # of the last update, as a share of the peak
    decay: Duration = Duration("0")  # schedule "wsd": length of the final linear decay
    weight_decay: float = not_negative(0.1)  # decoupled, on matrices only
    b1: float = share(0.9)  # decay of the first moment per update
    b2: float = share(0.95)  # decay of the second moment per update
    eps: float = positive(1e-8)  # added to the root of the second moment
    clip_norm: float = not_negative(1.0)  # global gradient norm is cut to this; 0: off
    ema_decay: float = share(0.0)  # weight average used for evaluation; 0: off


@dataclasses.dataclass(repr=False)
class AttentionConfig(Section):
    """Which attention implementation runs."""

    # see `attend` in kernels/attention.py; auto: the fastest that the device has
    impl: str = one_of(
        "auto reference xla cudnn blockwise pallas pallas_deterministic", default="auto"
    )


@dataclasses.dataclass(repr=False)
class LossConfig(Section):
    """How the loss is computed from hidden states and head."""

    # materialised: all logits at once; fused: in chunks; auto: by the size of the logits
    impl: str = one_of("auto materialised fused", default="auto")
    # share of each target that is spread over all ids; the logged loss is without it
    label_smoothing: float = share(0.0)


@dataclasses.dataclass(repr=False)
class TrainConfig(Section):
    """The loop."""

    steps: Duration = Duration("1000")  # length of the run; a run can be lengthened later
    # RUN or RUN@UPDATE: the newest or another checkpoint in the folder of a run; or the folder of a
    # Hugging Face checkpoint; empty: none
    start_from: str = ""
    # with its optimiser and its place in the data, from that update on, rather than its weights
    start_state: bool = False
    eval_every: Duration = Duration("250")  # valid split scored this often and at the end; 0: end
    checkpoint_every: Duration = incidental(Duration("250"))  # and at the end; 0: at the end alone
    keep: int = incidental(not_negative(2))  # newest checkpoints kept, beside the best; 0: all
    # a progress line stays this often; 0: when time has passed
    log_every: Duration = incidental(Duration("0"))
    # continued at every evaluation, into samples.jsonl; "|" between prompts; empty: none (not with
    # several processes)
    sample_prompts: str = incidental("")
    layer_norms: bool = incidental(False)  # log grad_norm/<path> for every parameter
    tensorboard: bool = incidental(False)  # also write TensorBoard events (extra "tensorboard")
    # XLA keeps what it compiles under data.cache_dir, so that the next start is faster
    compilation_cache: bool = incidental(True)
    # project in which Weights & Biases shows the run too (extra "wandb"); empty: off
    wandb: str = incidental("")
    # FROM:TO, updates of which a profiler's trace goes to WORKDIR/profile; empty: none
    profile: Span = incidental(Span(""))
    # auto: what the device is fast in; float16 comes with dynamic loss scaling
    compute_dtype: str = one_of("auto float32 bfloat16 float16", default="auto")
    # of float32 products on a GPU
    matmul_precision: str = one_of("float32 tensorfloat32", default="float32")
    # updates in one dispatch; a divisor of the spans above compiles once
    steps_per_call: int = positive(1)
    max_nonfinite: int = positive(10)  # stop after this many skipped updates in a row
    # several processes end when one is gone or no update comes for so long; 0: they wait for ever
    hang_seconds: float = incidental(not_negative(300.0))


@dataclasses.dataclass(repr=False)
class EvalConfig(Section):
    """Exact evaluation of whole splits."""

    batch_size: int = incidental(not_negative(0))  # sequences at a time; 0: as in training
    stride: int = not_negative(0)  # targets scored per window, the rest is context; 0: data.seq_len
    # scored at the end: valid,test or one; empty: those that the corpus has
    splits: str = incidental("")


@dataclasses.dataclass(repr=False)
class MeshConfig(Section):
    """How devices are arranged."""

    # devices that share one copy of the parameters and gather them layer by layer, each for rows of
    # its own; what is left is data-parallel
    fsdp: int = incidental(positive(1))
    # devices that compute the same rows, each some heads and a part of the MLP
    tensor: int = incidental(positive(1))


@dataclasses.dataclass(repr=False)
class ClusterConfig(Section):
    """How several GPUs and several processes work together."""

    # flags for XLA where several NVIDIA GPUs take part, written as in the variable XLA_FLAGS, which
    # wins; auto: those of processes.py; empty: none
    xla_flags: str = incidental("auto")
    # one of several processes that shows no sign of life for so long is dead, and all end
    heartbeat_seconds: int = incidental(positive(100))


ROUTED = "routed_feature routed_attention router_balance".split()
INSIDE = ["layer", "attention", *ROUTED]  # weights of terms on what layers compute
STATES = ["feature", "contrastive", *INSIDE]  # weights of terms on the states of one teacher


@dataclasses.dataclass(repr=False)
class DistillConfig(Section):
    """Training from teachers; the fields of type Curve are raised and lowered over the run."""

    # workdirs of runs or folders of Hugging Face checkpoints, with commas: the mean of their
    # probabilities teaches; empty: no distillation
    teachers: str = ""
    cache: str = ""  # folder that scripts/cache_teacher.py wrote, in place of running teachers
    # whether a teacher with nearly the student's tokenizer, which otherwise is refused, teaches the
    # next bytes, as one with quite another does
    next_bytes: bool = incidental(False)
    alone: str = incidental("")  # workdir of the same student without a teacher, for the report
    kind: str = one_of("forward reverse jsd skew", default="forward")  # kernels/divergences.py
    beta: float = 0.5  # the teacher's share of the mixture in jsd and skew
    # full: the vocabulary; top_k: so many ids of the teacher and the rest as one; union: the top_k
    # ids of both models
    support: str = one_of("full top_k union", default="full")
    top_k: int = 0  # ids of support top_k and union
    temperature: Curve = Curve("2")  # T of both distributions
    kd: Curve = Curve("0.7")  # weight of T^2 times the divergence
    lm: Curve = Curve("0.3")  # weight of the next-token cross-entropy
    feature: Curve = Curve("0")  # weight of the error of projected final states
    layer: Curve = Curve("0")  # the same of the states after each layer
    attention: Curve = Curve("0")  # weight of the divergence of attention maps
    # student layers whose maps are compared, counted from 0 or from the end, with commas
    attention_layers: str = "-1"
    contrastive: Curve = Curve("0")  # weight of telling the rows of a micro-batch apart
    routed_feature: Curve = Curve("0")  # weight of the error against routed teacher layers
    routed_attention: Curve = Curve("0")  # weight of reading the routed states before a token
    router_balance: Curve = Curve("0")  # weight of using all experts evenly
    experts: int = positive(4)  # evenly spaced teacher layers between which the router chooses
    router_top_k: int = positive(4)  # experts of a token at the end of the run; 1 at its start
    router_temperature: Curve = Curve("1@0, 0.1@1")  # of the router's choice
    lr: float = positive(1e-3)  # peak, of projections and router, on the schedule of optim

    @property
    def taught(self) -> bool:
        """True if there is a teacher, running or kept."""
        return bool(self.teachers or self.cache)


@dataclasses.dataclass(repr=False)
class Config(Section):
    """One run.

    Example:
        ```python
        cfg = lm_jax.Config(doctor="off")  # a tiny model of the synthetic corpus
        cfg.model.layers, cfg.model.d_model, cfg.data.seq_len = 1, 16, 32
        cfg.optim.peak_lr = 1e-2
        cfg.optim.warmup, cfg.train.steps = "5", "20"
        ```
    """

    # of parameters, order of the data and dropout
    seed: int = limited(0, below=1 << 32, why="repeats a smaller one")
    # checks before a new run starts: none, those that take seconds, or those that take minutes
    doctor: str = incidental(one_of("off fast full", default="fast"))
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    attention: AttentionConfig = dataclasses.field(default_factory=AttentionConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    cluster: ClusterConfig = dataclasses.field(default_factory=ClusterConfig)
    distill: DistillConfig = dataclasses.field(default_factory=DistillConfig)


def incidental_fields() -> set[str]:
    """Dotted paths of the fields on which no number of the trained model depends."""
    return {path for path, found in marks(Config) if "incidental" in found}
