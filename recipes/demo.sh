#!/usr/bin/env bash
# A small Mask R-CNN on drawn images, to see everything work. `make demo` does the same on a fresh clone.
# Command:  recipes/demo.sh RUN_DIR [--set KEY=VALUE ...]
# Hardware: 2 CPU cores.
# Time:     4 minutes on two cores of an Intel Xeon with AVX-512 (results/demo.json); much longer beside other work.
# Expected: box AP 0.52, box AP50 0.75, mask AP50 0.76 on 200 unseen images (results/demo.json).
set -euo pipefail
out=$1; shift 1
python -m scratchdet.toy --out "$out/toy" --train 1000 --val 200 --size 128 160 --seed 0
python -m scratchdet.train --recipe demo --coco "$out/toy" --out "$out/run" --cpu "$@"
