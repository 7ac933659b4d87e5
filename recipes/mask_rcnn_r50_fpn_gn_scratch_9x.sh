#!/usr/bin/env bash
# Mask R-CNN, ResNet-50, FPN, GroupNorm, from random weights, 810,000 steps of 16 images of COCO train2017.
# Command:  recipes/mask_rcnn_r50_fpn_gn_scratch_9x.sh COCO_DIR RUN_DIR [--set KEY=VALUE ...]
# Hardware: 8 GPUs of 16 GB or more; ACCELERATE=recipes/accelerate/one_gpu.yaml for one, recipes/slurm.sh for 2 x 8.
# Time:     not measured yet; about 76 h at the 0.338 s a step of detectron2's Mask R-CNN on 8 V100 (MODEL_ZOO.md, scratch 3x).
# Expected: box 43.7, mask 39.6 with short sides 640 to 800 and 64 images a step; detectron2 MODEL_ZOO.md (scratch 9x, GN)
set -euo pipefail
coco=$1 out=$2; shift 2
accelerate launch --config_file "${ACCELERATE:-recipes/accelerate/eight_gpus.yaml}" -m scratchdet.train \
    --recipe mask_rcnn_r50_fpn_gn_scratch_9x --coco "$coco" --out "$out" --set short_sides=640,672,704,736,768,800 "$@"
