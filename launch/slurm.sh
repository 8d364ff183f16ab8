#!/usr/bin/env bash
#SBATCH --job-name=concat
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
# Trains on the GPUs of a SLURM cluster, a process a GPU, as JAX has it there:
#
#   sbatch launch/slurm.sh --config=configs/coco_zps.py --workdir=/shared/runs/coco [FLAG...]
#
# from the repository on a disk that all nodes see, with its environment in .venv. Two minutes before
# the time is up, or when the job is preempted, the state is saved, and the job goes to the queue again.
. .venv/bin/activate || exit
srun python -m concat_jax.main --distributed "$@"
code=$?
if [ $code -eq 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit $code
