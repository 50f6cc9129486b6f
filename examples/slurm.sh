#!/bin/bash
#SBATCH --job-name=sid
#SBATCH --nodes=2 --ntasks-per-node=1 --gpus-per-node=8
#SBATCH --time=24:00:00 --signal=USR1@300 --requeue
# Two nodes with eight GPUs each. SLURM sends SIGUSR1 300 seconds before the time limit: sid saves a checkpoint and exits. The same job,
# started again, continues the run.
set -euo pipefail
export HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n1)
srun bash -c 'accelerate launch --multi_gpu --num_machines 2 --num_processes 16 --machine_rank $SLURM_NODEID \
    --main_process_ip $HEAD --main_process_port 29500 \
    -m sidcli distill --teacher stable-diffusion-v1-5/stable-diffusion-v1-5 --output /shared/run'
