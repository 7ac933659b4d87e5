#!/usr/bin/env bash
# Any run on a SLURM cluster, 2 machines with 8 GPUs each; the same line again continues it.
# Command:  sbatch recipes/slurm.sh mask_rcnn_r50_fpn_gn_scratch_6x COCO_DIR RUN_DIR [--set KEY=VALUE ...]
# Hardware: 2 x 8 GPUs; change --nodes and --gpus-per-node together with the numbers below. RUN_DIR is on a disk that both machines see.
# Time:     that of the run; two minutes before the limit every process gets SIGTERM, a checkpoint is written, and the job ends. Not USR1:
#           the launcher does not know it and would end at once, without a checkpoint.
# Expected: that of the run; the number of GPUs changes nothing else.
#SBATCH --job-name=scratchdet
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -euo pipefail
recipe=$1 coco=$2 out=$3; shift 3
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun bash -c 'head=$1; shift; exec accelerate launch --config_file recipes/accelerate/two_machines.yaml \
    --machine_rank "$SLURM_NODEID" --main_process_ip "$head" -m scratchdet.train "$@"' \
    launch "$head" --recipe "$recipe" --coco "$coco" --out "$out" "$@"
