"""Every field of the config changes the resolved run, in the place that the table names.

What depends on the model, the optimiser and the step is seen in the traced step. What the loop
decides is seen in runs of the real loop whose step is replaced by one that only notes what it is
given. Comparing config values would prove nothing and is not done.
"""

import hashlib
import json
import pathlib
import re
import shutil
import subprocess
import sys
import types

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm_jax import (
    checkpoint,
    config,
    console,
    generate,
    heartbeat,
    loop,
    preflight,
    setup,
    step,
    writers,
)
from lm_jax import workdir as run_files
from lm_jax.config import Config
from lm_jax.config.resolve import resolve
from lm_jax.config.section import marks
from lm_jax.data import corpora, shards
from lm_jax.distill.objective import distilled
from lm_jax.doctor import Report, provenance
from lm_jax.kernels import device
from lm_jax.models import families
from lm_jax.objective import NextToken
from tests.distill.toys import toy_teacher
from tests.helpers import batch_hash, thirds
from tests.hugging_face import byte_level, save_tokenizer

V = 29

BASE = {
    "doctor": "off",
    "data.corpus": "text",
    "data.source_dir": "{root}/a",
    "data.files": "*.txt",
    "data.valid_fraction": 0.2,
    "data.test_fraction": 0.2,
    "data.cache_dir": "{root}/cache",
    "data.seq_len": 8,
    "data.batch_size": 4,
    "data.document_mask": False,
    "model.layers": 1,
    "model.d_model": 8,
    "model.heads": 2,
    "optim.warmup": "2",
    "attention.impl": "reference",
    "train.steps": "6",
    "train.eval_every": "3",
    "train.checkpoint_every": "2",
    "train.keep": 1,
    "train.log_every": "5",
}

TAUGHT = {"distill.teachers": "toy"}
ROUTED = TAUGHT | {
    "distill.experts": 2,
    "distill.router_top_k": 1,
    "distill.routed_feature": "0.2",
}

# field: (another value, aspects that must change, what else must be set for it to matter)
TABLE = {
    "seed": (1, "parameters train_batches", {}),
    "doctor": ("fast", "examined", {}),
    "data.corpus": (
        "wikitext2",
        "error: after 0 updates: .*wiki",
        {"data.corpus": "synthetic", "data.files": "", "data.source_dir": "{root}/none"},
    ),
    "data.source_dir": ("{root}/b", "manifest train_batches", {}),
    "data.files": ("0*.txt", "manifest train_batches", {}),
    "data.valid_files": ("valid.md", "manifest eval_batches", {}),
    "data.test_files": ("test.md", "manifest eval_batches", {}),
    "data.document": ("line", "manifest train_batches", {}),
    "data.skip_missing": (
        True,
        "manifest",
        {"data.files": "lines.jsonl", "data.document": "jsonl:text"},
    ),
    "data.valid_fraction": (0.5, "manifest train_batches eval_batches", {}),
    "data.test_fraction": (0.5, "manifest train_batches", {}),
    "data.cache_dir": ("{root}/elsewhere", "store_folder", {}),
    "data.workers": (3, "processes", {"data.workers": 2}),
    "data.seq_len": (6, "train_batches eval_batches", {}),
    "data.batch_size": (2, "train_batches", {"eval.batch_size": 4}),
    "data.micro_batch": (2, "train_step", {}),
    "data.document_mask": (True, "train_batches eval_batches", {}),
    "data.window_offset": (True, "train_batches", {}),
    "data.growth": ("2", "train_batches", {}),
    "data.threads": (2, "reader_threads", {}),
    "tokenizer.kind": ("byte", "manifest train_batches", {}),
    "tokenizer.folder": (
        "{root}/other",
        "manifest train_batches",
        {"tokenizer.kind": "hf", "tokenizer.folder": "{root}/hf"},
    ),
    "tokenizer.vocab_size": (5, "manifest train_batches", {"tokenizer.kind": "word"}),
    "tokenizer.sample": (
        60,
        "manifest train_batches",
        {"tokenizer.kind": "word", "tokenizer.vocab_size": 5},
    ),
    "model.family": (
        "musota",
        "initialisation train_step eval_step",
        {"model.d_model": 128, "model.heads": 4},
    ),
    "model.layers": (2, "initialisation train_step eval_step", {}),
    "model.d_model": (16, "initialisation train_step eval_step", {"model.d_ff": 24}),
    "model.heads": (1, "train_step eval_step", {}),
    "model.kv_heads": (1, "initialisation train_step eval_step", {}),
    "model.head_dim": (8, "initialisation train_step eval_step", {}),
    "model.d_ff": (16, "initialisation train_step eval_step", {}),
    "model.norm": ("layernorm", "train_step eval_step", {}),
    "model.norm_eps": (1e-5, "train_step eval_step", {}),
    "model.positions": ("learned", "initialisation train_step eval_step", {}),
    "model.rope_theta": (500.0, "train_step eval_step", {}),
    "model.rope_scaling": ("linear:factor=2", "train_step eval_step", {}),
    "model.window": (3, "train_step eval_step", {}),
    "model.mlp": ("gelu", "initialisation train_step eval_step", {}),
    "model.qk_norm": (True, "initialisation train_step eval_step", {}),
    "model.key_offset": (True, "train_step eval_step", {}),
    "model.embedding_values": (True, "initialisation train_step eval_step", {}),
    "model.embedding_skip": (True, "initialisation train_step eval_step", {}),
    "model.head_gate": (True, "initialisation train_step eval_step", {}),
    "model.bias": (True, "initialisation train_step eval_step", {}),
    "model.bias_in": ("qkv", "initialisation train_step eval_step", {"model.bias": True}),
    "model.tied": (False, "initialisation train_step eval_step", {}),
    "model.embedding_rank": (4, "initialisation train_step eval_step", {}),
    "model.init": ("fan_in", "initialisation", {}),
    "model.init_std": (0.1, "initialisation", {}),
    "model.dropout": (0.1, "train_step", {}),
    "model.attention_dropout": (0.1, "train_step", {}),
    "model.embedding_dropout": (0.1, "train_step", {}),
    "model.logit_softcap": (30.0, "train_step eval_step", {}),
    "model.scan_layers": (True, "train_step eval_step", {}),
    "model.remat": (True, "train_step", {}),
    "optim.name": ("muon", "train_step", {}),
    "optim.peak_lr": (2e-3, "train_step", {}),
    "optim.warmup": ("3", "train_step", {}),
    "optim.schedule": ("linear", "train_step", {}),
    "optim.end_lr": (0.2, "train_step", {}),
    "optim.decay": ("3", "train_step", {"optim.schedule": "wsd", "optim.decay": "2"}),
    "optim.weight_decay": (0.2, "train_step", {}),
    "optim.b1": (0.8, "train_step", {}),
    "optim.b2": (0.9, "train_step", {}),
    "optim.eps": (1e-6, "train_step", {}),
    "optim.clip_norm": (2.0, "train_step", {}),
    "optim.ema_decay": (0.9, "train_step evaluated_midway evaluated_at_end", {}),
    "attention.impl": ("xla", "implementation", {}),
    "loss.impl": ("fused", "train_step eval_step", {"loss.impl": "materialised"}),
    "loss.label_smoothing": (0.1, "train_step", {}),
    "train.steps": ("7", "calls train_step", {}),
    "train.start_from": ("{root}/none", "error: after 0 updates: config.train.start_from", {}),
    "train.start_state": (True, "error: after 0 updates: config.train.start_state", {}),
    "train.eval_every": ("2", "evaluated_midway rows", {}),
    "train.checkpoint_every": (
        "3",
        "calls saved",
        {"train.eval_every": "0", "train.steps_per_call": 6},
    ),
    "train.keep": (2, "kept", {}),
    "train.log_every": ("2", "progress", {}),
    "train.sample_prompts": ("ba|du", "sampled texts", {}),
    "train.layer_norms": (True, "train_step", {}),
    "train.tensorboard": (True, "tensorboard", {}),
    "train.compilation_cache": (True, "compilations", {"train.compilation_cache": False}),
    "train.wandb": ("project", "wandb", {}),
    "train.profile": ("2:3", "traced", {}),
    "train.compute_dtype": ("bfloat16", "train_step eval_step", {"train.compute_dtype": "float32"}),
    "train.matmul_precision": ("tensorfloat32", "train_step eval_step", {}),
    "train.steps_per_call": (2, "calls", {}),
    "train.max_nonfinite": (2, "error: updates 2 to 3 were all skipped", {}),
    "train.hang_seconds": (60.0, "hang_seconds", {}),
    "eval.batch_size": (3, "eval_batches", {}),
    "eval.stride": (4, "eval_batches", {}),
    "eval.splits": ("valid", "scored", {}),
    "mesh.fsdp": (1 + jax.device_count(), "error: after 0 updates: config.mesh.fsdp", {}),
    "mesh.tensor": (1 + jax.device_count(), "error: after 0 updates: config.mesh.tensor", {}),
    "cluster.xla_flags": ("fast", "error: after 0 updates: config.cluster.xla_flags", {}),
    "cluster.heartbeat_seconds": (0, "error: after 0 updates: config.cluster.heartbeat", {}),
    "distill.teachers": ("{root}/none", "error: after 0 updates: config.distill.teachers", {}),
    "distill.cache": ("{root}/none", "error: after 0 updates: config.distill.cache", {}),
    "distill.next_bytes": (True, "error: after 0 updates: .*next_bytes.* without a teacher", {}),
    "distill.alone": ("{root}/none", "error: after 0 updates: .*alone.* without a teacher", {}),
    "distill.kind": ("reverse", "distill_step", TAUGHT),
    "distill.beta": (0.3, "distill_step", TAUGHT | {"distill.kind": "jsd"}),
    "distill.support": (
        "union",
        "distill_step",
        TAUGHT | {"distill.support": "top_k", "distill.top_k": 3},
    ),
    "distill.top_k": (4, "distill_step", TAUGHT | {"distill.support": "top_k", "distill.top_k": 3}),
    "distill.temperature": ("3@0, 2@1", "distill_step", TAUGHT),
    "distill.kd": ("0.5", "distill_step", TAUGHT),
    "distill.lm": ("0.5", "distill_step", TAUGHT),
    "distill.feature": ("0.1", "distill_step", TAUGHT),
    "distill.layer": ("0.1", "distill_step", TAUGHT),
    "distill.attention": ("0.1", "distill_step", TAUGHT),
    "distill.attention_layers": (
        "0,-1",
        "distill_step",
        TAUGHT | {"distill.attention": "0.1", "model.layers": 2},
    ),
    "distill.contrastive": ("0.1", "distill_step", TAUGHT),
    "distill.routed_feature": ("0.1", "distill_step", ROUTED | {"distill.router_balance": "1"}),
    "distill.routed_attention": ("0.1", "distill_step", ROUTED),
    "distill.router_balance": ("0.1", "distill_step", ROUTED),
    "distill.experts": (3, "distill_step", ROUTED),
    "distill.router_top_k": (2, "distill_step", ROUTED),
    "distill.router_temperature": ("0.5", "distill_step", ROUTED),
    "distill.lr": (1e-2, "distill_step", TAUGHT | {"distill.feature": "0.1"}),
}
TRACED = {"initialisation", "train_step", "eval_step", "distill_step"}
SEED_OF_DROPOUT = {"model.dropout": 0.1}


def test_the_table_names_every_field():
    assert list(TABLE) == [path for path, _ in config.named_fields(Config())]


def digest(*values):
    return hashlib.sha256(repr(values).encode()).hexdigest()[:12]


def arrays(tree):
    return [(str(p), np.asarray(x).tolist()) for p, x in jax.tree.leaves_with_path(tree)]


def text_of(traced):
    """A jaxpr as text, without the addresses of Python objects, which differ every time."""
    return digest(re.sub(r"0x[0-9a-f]+", "", str(traced.jaxpr)))


def trace(cfg):
    """The initialisation and the steps as they are compiled."""
    cfg = resolve(cfg, windows=50)
    graphdef, init = families.create_model(cfg, V, cfg.attention.impl)
    key = jax.random.key(0)
    state = jax.eval_shape(lambda key: step.init_state(cfg, init(key)), key)

    def distillation():
        teacher = toy_teacher()
        objective = distilled(cfg, graphdef, init, teacher)
        with_it = jax.eval_shape(
            lambda key: step.init_state(cfg, init(key), objective.beside(key)), key
        )
        steps = step.make_train_step(cfg, objective)
        return text_of(steps.trace(with_it, batch(1), objective.reads))

    def batch(*lead):
        shape = (*lead, cfg.data.batch_size, cfg.data.seq_len + 1)
        ids = jax.ShapeDtypeStruct(shape, jnp.int32)
        return {
            "tokens": ids,
            "segment_ids": ids,
            "weights": jax.ShapeDtypeStruct(shape, jnp.float32),
        }

    return {
        "initialisation": lambda: text_of(jax.jit(init).trace(key)),
        "train_step": lambda: text_of(
            step.make_train_step(cfg, NextToken.of(cfg, graphdef)).trace(state, batch(1))
        ),
        "eval_step": lambda: text_of(
            step.make_eval_step(cfg, graphdef).trace(state.params, batch())
        ),
        "distill_step": distillation,
    }


double = jax.jit(lambda params: jax.tree.map(lambda x: 2 * x, params))


def run_loop(cfg, workdir):
    """The real loop around a step that notes what it is given; updates 2 and 3 are not finite."""
    seen = {name: [] for name in "train_batches eval_batches calls evaluated saved".split()}
    seen |= {name: [] for name in "tensorboard wandb traced reader_threads examined".split()}
    seen |= {name: [] for name in "processes progress sampled texts hang_seconds".split()}

    def examine_once(cfg, *, level, store):
        seen["examined"].append(level)
        return Report(), ""

    def create_model(cfg, vocab_size, impl):
        seen["implementation"] = impl
        return None, lambda key: {"kernel": jax.random.normal(key, (4, 2))}

    def make_train_step(cfg, objective):
        def train_steps(state, batches, reads):
            batches = jax.device_get(batches)
            count = len(batches["tokens"])
            first = sum(seen["calls"])
            if not first:
                seen["parameters"] = arrays(jax.device_get(state.params))
            seen["calls"].append(count)
            seen["train_batches"] += [
                batch_hash({k: v[i] for k, v in batches.items()}) for i in range(count)
            ]
            names = "loss lr grad_norm skipped".split()
            metrics = {name: np.ones(count, np.float32) for name in names}
            metrics["skipped"] = np.isin(first + np.arange(count), (1, 2)).astype(np.float32)
            return state._replace(params=double(state.params)), {
                "train/loss": metrics["loss"],
                "data/scored": metrics["loss"],
                "optim/lr": metrics["lr"],
                "optim/grad_norm": metrics["grad_norm"],
                "optim/param_norm": metrics["grad_norm"],
                "optim/skipped_updates": metrics["skipped"],
            }

        return train_steps

    def make_eval_step(cfg, graphdef, mesh):
        def eval_step(params, batch):
            batch = jax.device_get(batch)
            seen["eval_batches"].append(batch_hash(batch))
            seen["evaluated"].append((sum(seen["calls"]), digest(arrays(jax.device_get(params)))))
            scored_BT = batch["weights"][:, 1:]
            sums = {"nats": 2 * scored_BT.sum(), "count": scored_BT.sum(), "correct": 0}
            return {**sums, "token_nats": 2 * scored_BT, "token_weights": scored_BT}

        return eval_step

    class Checkpoints(checkpoint.Checkpoints):
        def save(self, state, manifest, *, best=False):
            seen["saved"].append((manifest["position"], best))
            super().save(state, manifest, best=best)

    class SummaryWriter:
        def __init__(self, logdir, **_):
            self.logdir = logdir

        def add_scalar(self, name, value, step):
            seen["tensorboard"].append((name, step))

        def add_text(self, name, text, step):
            seen["tensorboard"].append((name, text, step))

        def close(self):
            pass

    read_options = grain.ReadOptions

    def note_threads(**options):
        seen["reader_threads"].append(options["num_threads"])
        return read_options(**options)

    prepare, popen = setup.open_data, subprocess.Popen

    def open_data(cfg):
        if "manifest" not in seen:  # otherwise nothing would be left to tokenise
            shutil.rmtree(pathlib.Path(cfg.data.cache_dir) / "stores", ignore_errors=True)
        store = prepare(cfg)
        seen["manifest"], seen["store_folder"] = store.manifest, str(store.path.parent)
        return store

    def note_process(command, **options):
        seen["processes"].append(command[0])
        return popen(command, **options)

    def sample(run, prompts, **_):
        seen["sampled"].append((run.step, prompts))
        return [generate.Sample(prompt, " and on", [], [], 0) for prompt in prompts]

    watched = heartbeat.watched

    def note_watch(folder, seconds):
        seen["hang_seconds"].append(seconds)
        return watched(folder, seconds)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heartbeat, "watched", note_watch)
        patch.setattr(setup, "create_model", create_model)
        patch.setattr(run_files, "create_model", create_model)
        patch.setattr(step, "make_train_step", make_train_step)
        patch.setattr(step, "make_eval_step", make_eval_step)
        patch.setattr(setup, "Checkpoints", Checkpoints)
        patch.setattr(setup, "open_data", open_data)
        patch.setattr(generate, "generate", sample)
        patch.setattr(writers.Writers, "text", lambda self, *one: seen["texts"].append(one))
        patch.setattr(run_files, "git_revision", lambda: None)
        patch.setattr(
            console, "say", lambda line: seen["progress"].extend(re.findall(r" (\d+)/\d+ ", line))
        )
        patch.setattr(setup, "check_environment", lambda *_: None)  # it need not be of this machine
        patch.setattr(
            setup,
            "keep_compilations",
            lambda cfg: seen.update(compilations=cfg.train.compilation_cache),
        )
        patch.setattr(preflight, "examine_once", examine_once)
        patch.setattr(provenance, "trace", lambda *_, **__: None)
        patch.setattr(grain, "ReadOptions", note_threads)
        patch.setattr(corpora, "SYNTHETIC_LENGTH", 40)
        if cfg.data.workers:
            patch.setattr(shards, "PIECE", 200)
        patch.setattr(subprocess, "Popen", note_process)
        tensorboard = types.SimpleNamespace(SummaryWriter=SummaryWriter)
        patch.setitem(sys.modules, "tensorboardX", tensorboard)
        run = types.SimpleNamespace(
            define_metric=lambda *_, **__: None, log=seen["wandb"].append, finish=lambda: None
        )
        wandb = types.SimpleNamespace(init=lambda **_: run, Settings=dict)
        patch.setitem(sys.modules, "wandb", wandb)
        patch.setattr(jax.profiler, "start_trace", lambda folder: seen["traced"].append("begun"))
        patch.setattr(jax.profiler, "stop_trace", lambda: seen["traced"].append(seen["calls"][:]))
        try:
            loop.train_and_evaluate(cfg, workdir)
        except (ValueError, OSError, FloatingPointError) as error:
            return {"error": f"after {sum(seen['calls'])} updates: {error}"}
    rows = (workdir / "metrics.jsonl").read_text().splitlines()
    end = sum(seen["calls"])
    return seen | {
        "evaluated_midway": [found for found in seen["evaluated"] if found[0] < end],
        "evaluated_at_end": [found for found in seen["evaluated"] if found[0] == end],
        "rows": [(json.loads(row)["step"], sorted(json.loads(row))) for row in rows],
        "kept": sorted(path.name for path in (workdir / "checkpoints").iterdir()),
        "scored": sorted(path.name for path in workdir.glob("eval_*.json")),
    }


class Lab:
    """Builds configs and remembers what was observed of them."""

    def __init__(self, root):
        self.root, self.runs, self.traces = root, {}, {}

    def config(self, changes):
        values = {
            path.replace(".", "__"): v.format(root=self.root) if isinstance(v, str) else v
            for path, v in (BASE | changes).items()
        }
        return config.replace(Config(), **values)

    def observe(self, changes, aspect, again=False):
        key = (tuple(sorted(changes.items())), again)
        if aspect in TRACED:
            if key not in self.traces:
                self.traces[key] = trace(self.config(changes))
            if callable(self.traces[key][aspect]):
                self.traces[key][aspect] = self.traces[key][aspect]()
            return self.traces[key][aspect]
        if key not in self.runs:
            workdir = self.root / "runs" / str(len(self.runs))
            self.runs[key] = run_loop(self.config(changes), workdir)
        run = self.runs[key]
        if aspect == "error":
            return run.get("error")
        assert "error" not in run, run["error"]
        return run[aspect]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    root = tmp_path_factory.mktemp("effect")
    rng = np.random.default_rng(0)
    for folder in ("a", "b"):
        (root / folder).mkdir()
        for i in range(16):
            words = rng.choice(["ba", "du", "kilo", "no", "pi", "roso", "tu", "wa"], (3, 3))
            lines = "\n".join(" ".join(line) for line in words)
            (root / folder / f"{i:02}.txt").write_text(lines + "\n")
        (root / folder / "valid.md").write_text("ba du kilo\n")
        (root / folder / "lines.jsonl").write_text(
            "".join(json.dumps({"text": "ba du " * (i + 1)}) + "\n" for i in range(40))
        )
        (root / folder / "test.md").write_text("no pi roso\n")
    tree = byte_level()
    save_tokenizer(root / "hf", tree, special="<|endoftext|>")
    tree["model"]["merges"] = []
    save_tokenizer(root / "other", tree, special="<|endoftext|>")
    return Lab(root)


@pytest.mark.parametrize("path", thirds(TABLE))
def test_a_changed_field_changes_the_run(lab, path):
    value, aspects, companions = TABLE[path]
    if aspects.startswith("error: "):
        before = lab.observe(companions, "error")
        assert before is None
        after = lab.observe(companions | {path: value}, "error")
        assert re.search(aspects.removeprefix("error: "), after, re.DOTALL)
        return
    for aspect in aspects.split():
        before = lab.observe(companions, aspect)
        after = lab.observe(companions | {path: value}, aspect)
        assert after and before != after, aspect


CHOICES = {path: found["choices"] for path, found in marks(Config) if "choices" in found}
# What else must be set for a choice to be possible.
NEEDED = {
    "bpe": {"tokenizer.vocab_size": 258},
    "hf": {"tokenizer.folder": "{root}/hf"},
    "musota": {"model.d_model": 128, "model.heads": 4},
    "wsd": {"optim.decay": "2"},
    "full": {"distill.top_k": 0},
    "top_k": {"distill.top_k": 3},
    "union": {"distill.top_k": 3},
}


@pytest.mark.parametrize("path", thirds(CHOICES))
def test_every_choice_is_a_run_of_its_own(lab, path):
    """A choice that nothing implements would be the same run as another one."""
    _, aspects, companions = TABLE[path]
    seen = {}
    for choice in CHOICES[path]:
        if choice != "auto":  # stands for another one
            changes = companions | NEEDED.get(choice, {}) | {path: choice}
            seen[choice] = [str(lab.observe(changes, aspect)) for aspect in aspects.split()]
    assert len({tuple(found) for found in seen.values()}) == len(seen), seen


@pytest.mark.parametrize(("kind", "dtype"), [("NVIDIA H200", "bfloat16"), ("Tesla T4", "float16")])
def test_the_device_decides_the_dtype(lab, kind, dtype, monkeypatch):
    """As in `TABLE`: a step for a GPU is the step of the dtype that the GPU is fast in."""
    gpu = types.SimpleNamespace(platform="gpu", device_kind=kind)
    monkeypatch.setattr(device, "target", lambda: gpu)
    for aspect in ("train_step", "eval_step"):
        chosen, named, other = (
            trace(lab.config({"train.compute_dtype": name}))[aspect]()
            for name in ("auto", dtype, "float32")
        )
        assert chosen == named != other


def test_the_seed_reaches_dropout(lab):
    before = lab.observe(SEED_OF_DROPOUT, "train_step")
    assert before != lab.observe(SEED_OF_DROPOUT | {"seed": 1}, "train_step")


def test_the_same_config_gives_the_same_run(lab):
    """Otherwise every change above would show an effect."""
    for aspect in TRACED - {"distill_step"}:
        assert lab.observe({}, aspect) == lab.observe({}, aspect, again=True)
    once, twice = (run_loop(lab.config({}), lab.root / name) for name in ("once", "twice"))
    assert once == twice


@pytest.mark.parametrize(
    ("companions", "path", "aspect"),
    [
        ({"model.positions": "none"}, "model.rope_theta", "train_step"),
        ({"model.init": "normal"}, "model.dropout", "eval_step"),
        ({}, "loss.label_smoothing", "eval_step"),
        ({"optim.schedule": "constant"}, "optim.end_lr", "train_step"),
        ({}, "seed", "train_step"),
        ({}, "optim.peak_lr", "initialisation"),
        ({}, "data.threads", "train_batches"),
        ({}, "train.steps_per_call", "train_batches"),
        ({}, "train.steps_per_call", "rows"),
        ({}, "data.cache_dir", "manifest"),
        ({}, "eval.batch_size", "rows"),
    ],
)
def test_what_must_not_matter_does_not(lab, companions, path, aspect):
    after = lab.observe(companions | {path: TABLE[path][0]}, aspect)
    assert lab.observe(companions, aspect) == after
