#!/usr/bin/env bash
# A small Mask R-CNN on a few hundred real images: shows that a data set in COCO's layout works from end to end.
# Command:  recipes/coco_mini.sh COCO_DIR RUN_DIR [--set KEY=VALUE ...]
# Hardware: 2 CPU cores.
# Time:     under 15 minutes with 80 training and 79 validation images.
# Expected: a loss that falls; AP near 0, because 80 images from random weights teach almost nothing (the paper: 3.5 with 1,000 images).
set -euo pipefail
coco=$1 out=$2; shift 2
accelerate launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
    -m scratchdet.train --recipe coco_mini --coco "$coco" --out "$out" "$@"
