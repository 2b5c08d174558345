#!/bin/bash
# The same run in a queue with short limits: two minutes before the limit Slurm sends SIGUSR1, the
# run saves and exits with code 75, and the job goes back into the queue and continues. A job that is
# preempted gets SIGTERM, saves too, and is put back by Slurm itself. First: mkdir -p job_output
#SBATCH --time=04:00:00
# Without "B:" the signal goes to the processes of srun and not to this shell, which waits for them.
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
# Add your cluster's `#SBATCH --partition=...` where it has no default.

source .venv/bin/activate

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT="${MASTER_PORT:-12805}"

# srun does not take --cpus-per-task from the job since Slurm 22.05. --kill-on-bad-exit=0: the first
# process that leaves with code 75 must not take the others with it; --wait ends what still hangs.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=0 --wait=120 \
    python -u -m neuclip.training.main --recipe neuclip-dfn14m --name neuclip-dfn14m \
    --resume auto "$@"
code=$? # srun's: the highest of its processes'
case "$code" in
    75) ;;  # saved, not finished
    138) ;; # 128 + SIGUSR1: the signal came before the run could listen
    *) exit "$code" ;;
esac
scontrol requeue "$SLURM_JOB_ID"
