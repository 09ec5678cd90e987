"""Checks that find out why a language-model run went wrong, or will."""

from lm_jax.doctor.arms import examine_arms
from lm_jax.doctor.data import examine_data
from lm_jax.doctor.distillation import examine_distillation
from lm_jax.doctor.evaluation import examine_evaluation
from lm_jax.doctor.findings import Finding, Report
from lm_jax.doctor.gradients import examine_gradients
from lm_jax.doctor.kernels import examine_kernel
from lm_jax.doctor.log import examine_log
from lm_jax.doctor.losses import examine_loss
from lm_jax.doctor.model import examine_model
from lm_jax.doctor.optimiser import examine_optimiser
from lm_jax.doctor.preflight import Unfit, examine_config
from lm_jax.doctor.training import examine_training
from lm_jax.doctor.workdir import Watch, examine_workdir

__all__ = [
    "Finding",
    "Report",
    "Unfit",
    "Watch",
    "examine_arms",
    "examine_config",
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
    "examine_workdir",
]
