"""Detections of one image, from its pixels to masks at its own size: scratchdet's `predict` and torchvision's model, alternating.

Both resize 480x640 px to 800x1067, pad to 800x1088 and have the same weights; the classifier is made bold, so that random weights fill all hundred places. Ours computes in bf16 where the processor
gains by it, torchvision's as it does by default, in fp32. Each has a process of its own, and one waits for the other.

    python benchmarks/inference.py --out results/inference.json
"""
import torch

from common import Apart, against, command, hardware_to_time, parser, spread, take_turns, whole, write
from peer import torchvision_mask_rcnn
from scratchdet.detector import mask_rcnn
from scratchdet.init import init_detector
from scratchdet.optim import keep_memory, usable_precision
from scratchdet.predict import predict
from train_step import kinds, with_weights


def build(kind, size, short, long):
    "One of the two as a function that returns the number of detections of one image of noise."
    torch.manual_seed(0)
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    ours = init_detector(mask_rcnn(80)).eval()
    with torch.no_grad(): ours.box_head.cls.weight *= 100
    if kind == 'scratchdet':
        keep_memory()
        return lambda: len(predict(ours, [image], short=short, long=long, precision='bf16')[0]['masks'])
    theirs = with_weights(torchvision_mask_rcnn(80, (short, long), rpn_post_nms_top_n_test=1000, rpn_pre_nms_top_n_test=1000).eval(), ours)
    def run_theirs():
        with torch.inference_mode(): return len(theirs([image / 255])[0]['masks'] >= .5)
    return run_theirs


def main():
    "Time both in turn, print and write."
    p = parser(__doc__, short=(800, 'short side for the network, px'), long=(1333, 'longest side, px'), repeats=(5, 'of each'))
    p.add_argument('--size', type=whole, nargs=2, default=(480, 640), help='height and width of the image, px')
    args = p.parse_args()
    machine, both = hardware_to_time(), {k: Apart(build, k, args.size, args.short, args.long) for k in kinds}
    result = against(take_turns(both, args.repeats), *kinds)
    found = {k: do() for k, do in both.items()}
    peak = {k: o.end() for k, o in both.items()}
    print(f"inference: ratio {spread(result['ratios'])}, seconds {result['median']}, detections {found}, peak GB {peak}")
    write(args.out, dict(command=command(), hardware=machine, precision=usable_precision('bf16', 'cpu'), size=list(args.size), short=args.short, long=args.long, detections=found, peak_gb=peak, **result))


if __name__ == '__main__': main()
