#!/usr/bin/env bash
# A small Mask R-CNN on drawn images, to see everything work. `make demo` does the same on a fresh clone.
# Command:  recipes/demo.sh RUN_DIR [--set KEY=VALUE ...]
# Hardware: 2 CPU cores.
# Time:     under 10 minutes.
# Expected: box AP 0.50, box AP50 0.75, mask AP50 0.65 or more on 200 unseen images; the goal that the recipe was tuned for.
set -euo pipefail
out=$1; shift 1
python -m scratchdet.toy --out "$out/toy" --train 1000 --val 200 --size 128 160 --seed 0
accelerate launch --cpu --num_processes 1 -m scratchdet.train --recipe demo --coco "$out/toy" --out "$out/run" "$@"
