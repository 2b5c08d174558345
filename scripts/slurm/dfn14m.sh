#!/bin/bash
# NeuCLIP on DFN-14M, 2 nodes with 4 GPUs each: the published settings.
#SBATCH --time=2-00:00:00
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

srun python -u -m neuclip.training.main --recipe neuclip-dfn14m "$@"
