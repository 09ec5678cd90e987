#!/bin/bash
# A training on several nodes: sbatch scripts/launch/slurm.sh CONFIG --workdir=/shared/run
# The same again goes on where it stopped. Each task has one GPU of its node; for one task a node
# with all of its GPUs, write --ntasks-per-node=1 and eight times the --cpus-per-task.
#SBATCH --job-name=lm_jax
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --signal=TERM@300
#SBATCH --requeue

# srun does not take the number of CPUs from above by itself. Where one task ends, all do.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 python -m lm_jax.main "$@"
