#!/bin/bash
# The same run in a queue with short limits: two minutes before the limit Slurm sends SIGUSR1, the
# run saves and exits with code 75, and the job goes back into the queue and continues.
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --mem=120G
#SBATCH --nodes=2
#SBATCH --gres=gpu:4
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=6
#SBATCH --job-name=neuclip
#SBATCH --output=./job_output/%x_%j.log

source .venv/bin/activate

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=12805

srun python -u -m neuclip.training.main --recipe neuclip-dfn14m --name neuclip-dfn14m \
    --resume auto "$@"
code=$?
if [ "$code" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
else
    exit "$code"
fi
