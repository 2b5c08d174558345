#!/bin/bash
# NeuCLIP on DFN-14M, 2 nodes with 4 GPUs each: the published settings. First: mkdir -p job_output
#SBATCH --time=2-00:00:00
#SBATCH --mem=120G
#SBATCH --nodes=2
#SBATCH --gres=gpu:4
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=6
#SBATCH --job-name=neuclip
#SBATCH --output=./job_output/%x_%j.log
# Add your cluster's `#SBATCH --partition=...` where it has no default.

source .venv/bin/activate

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT="${MASTER_PORT:-12805}"

# srun does not take --cpus-per-task from the job since Slurm 22.05. Processes stop by themselves when
# one of them fails; --wait ends what still hangs two minutes after the first one left.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=0 --wait=120 \
    python -u -m neuclip.training.main --recipe neuclip-dfn14m "$@"
