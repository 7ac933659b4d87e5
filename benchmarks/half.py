"""bf16 against fp32 on the reference vectors: every loss, and the cosine of the whole gradient; torchvision's own beside.

Weights and images are those of the reference files, with a hundred proposals an image; both samplers of ours keep everything, torchvision's draw the
same anchors and RoIs in both precisions as long as the proposals are the same. All of it once for each number of threads: they sum in another order, and what
differs by that alone is rounding. A processor without bf16 imitates it, slowly.

    python benchmarks/half.py --out results/half.json
"""
import sys
from pathlib import Path

import torch

from common import command, hardware, parser, write
from peer import torchvision_inputs, torchvision_mask_rcnn
from scratchdet.matcher import image_keys
from train_step import kinds, with_weights

sys.path.append(str(Path(__file__).parents[1] / 'tests'))


def losses_and_gradient(model, losses, bf16, device='cpu'):
    "Losses as numbers, and the gradient of their sum as one vector."
    torch.manual_seed(0)
    model.zero_grad()
    with torch.autocast(device, torch.bfloat16, enabled=bf16): out = losses()
    sum(out.values()).backward()
    return {k: v.item() for k, v in out.items()}, torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


def compared(model, losses):
    "Both precisions, the largest relative difference of a loss, and the cosine."
    (full, a), (half, b) = (losses_and_gradient(model, losses, o) for o in (False, True))
    return dict(fp32=full, bf16=half, largest_loss_difference=max(abs(half[k] / full[k] - 1) for k in full if full[k]),
                cosine=torch.cosine_similarity(a, b, 0).item())


def main():
    "Compare both models on every file of masks, print and write."
    p = parser(__doc__)
    p.add_argument('--threads', type=int, nargs='+', default=[1, 2], help='numbers of them, one after the other')
    args = p.parse_args()
    from test_reference import FILES, Case
    machine, result = hardware(), {}
    for name in (o for o in FILES if o.startswith('mask')):
        case = Case(name)
        batch, model = case.batch, case.model.train()
        keys, model.rpn.post_nms_topk = image_keys(0, 0, batch.image_ids), (100, 100)
        peer = with_weights(torchvision_mask_rcnn(80, batch.images.shape[-2:], post_nms_train=100).train(), model)
        images, targets = torchvision_inputs(batch)
        both = (model, lambda: model(batch, keys)), (peer, lambda: peer([o.clone() for o in images], targets))
        result[name] = {}
        for threads in args.threads:
            torch.set_num_threads(threads)
            result[name][f'threads {threads}'] = found = {k: compared(*o) for k, o in zip(kinds, both)}
            for k, o in found.items():
                print(f"{name}, threads {threads}, {k}: losses within {o['largest_loss_difference']:.4f}, cosine {o['cosine']:.4f}", flush=True)
    write(args.out, dict(command=command(), hardware=machine, files=result))


if __name__ == '__main__': main()
