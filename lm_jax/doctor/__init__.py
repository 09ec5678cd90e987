"""Checks that find out why a language-model run went wrong, or will.

A model written in PyTorch (does a position see later tokens? does a fresh model start at ln V?):

    doctor.examine_model(doctor.torch_model(module), vocab_size=65, seq_len=32).show()

Example, the metrics of a run:
    ```python
    report = lm_jax.doctor.examine_log(lm_jax.open_run("runs/example").history().rows)
    report.show()
    ```
"""

from lm_jax.doctor.arms import examine_arms
from lm_jax.doctor.data import examine_data
from lm_jax.doctor.distill import examine_distillation
from lm_jax.doctor.eval import examine_evaluation
from lm_jax.doctor.findings import Finding, Report
from lm_jax.doctor.gradient import examine_gradients, examine_kernel
from lm_jax.doctor.log import examine_log
from lm_jax.doctor.loss import examine_loss
from lm_jax.doctor.model import examine_model
from lm_jax.doctor.optimiser import examine_optimiser
from lm_jax.doctor.pytorch import torch_loss, torch_model
from lm_jax.doctor.training import examine_training

__all__ = [
    "Finding",
    "Report",
    "examine_arms",
    "examine_data",
    "examine_distillation",
    "examine_evaluation",
    "examine_gradients",
    "examine_kernel",
    "examine_log",
    "examine_loss",
    "examine_model",
    "examine_optimiser",
    "examine_training",
    "torch_loss",
    "torch_model",
]
