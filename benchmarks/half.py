"""bf16 against fp32 on the reference vectors: every loss, and the cosine of the whole gradient; torchvision's own beside.

Weights and images are those of the reference files, with a hundred proposals an image; both samplers of ours keep everything, torchvision's draw the
same anchors and RoIs in both precisions as long as the proposals are the same. All of it once for each number of threads, which sum in another order, and on the
images as they are and with noise of one grey level: what differs by that alone is the noise of rounding, its mean over the draws is what bf16 shifts.
The reference files are looked for in SCRATCHDET_REFERENCE, by default ../shared/reference beside the project.
A processor without bf16 imitates it, slowly: twenty minutes.

    python benchmarks/half.py --out results/half.json
"""
import sys
from pathlib import Path
from statistics import fmean, median

import torch

from common import command, hardware, parser, whole, write
from peer import torchvision_inputs, torchvision_mask_rcnn
from scratchdet.command import one_line
from scratchdet.matcher import image_keys
from train_step import kinds, with_weights

sys.path.append(str(Path(__file__).parents[1] / 'tests'))


def reference_files():
    "Names of the reference files of Mask R-CNN; raises where there are none."
    from test_reference import FILES, FOLDER
    if not (found := [o for o in FILES if o.startswith('mask')]):
        raise FileNotFoundError(f'no reference files of Mask R-CNN under {FOLDER}: name their folder in SCRATCHDET_REFERENCE')
    return found


def losses_and_gradient(model, losses, bf16, device='cpu'):
    "Losses as numbers, and the gradient of their sum as one vector."
    torch.manual_seed(0)
    model.zero_grad()
    with torch.autocast(device, torch.bfloat16, enabled=bf16): out = losses()
    sum(out.values()).backward()
    return {k: v.item() for k, v in out.items()}, torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


def compared(model, losses, device='cpu'):
    "Both precisions, the largest relative difference of a loss, and the cosine."
    (full, a), (half, b) = (losses_and_gradient(model, losses, o, device) for o in (False, True))
    return dict(fp32=full, bf16=half, largest_loss_difference=max(abs(half[k] / full[k] - 1) for k in full if full[k]),
                cosine=torch.cosine_similarity(a, b, 0).item())


def noisy(images, draw):
    "Each value of `images` (uint8) a grey level less, the same or one more; draw 0 leaves them as they are."
    if not draw: return images
    noise = torch.randint(-1, 2, images.shape, generator=torch.Generator().manual_seed(draw))
    return (images.int() + noise).clamp(0, 255).byte()


def over_draws(found):
    "Each loss's relative differences over the draws (of a loss that is never zero): mean, median and largest size; the lowest cosine."
    losses = {}
    for k in (k for k in found[0]['fp32'] if all(o['fp32'][k] for o in found)):
        far = [o['bf16'][k] / o['fp32'][k] - 1 for o in found]
        losses[k] = dict(mean=fmean(far), typical=median(map(abs, far)), largest=max(map(abs, far)))
    return dict(draws=found, losses=losses, lowest_cosine=min(o['cosine'] for o in found))


def main():
    "Compare both models on every file of masks, print and write."
    p = parser(__doc__, draws=(9, 'of noise on the images; the first is none'))
    p.add_argument('--threads', type=whole, nargs='+', default=[1, 2], help='numbers of them, one after the other')
    args = p.parse_args()
    with one_line('half.py'): names = reference_files()
    from test_reference import Case
    machine, result = hardware(), {}
    for name in names:
        case = Case(name)
        batch, model, pixels = case.batch, case.model.train(), case.batch.images
        keys, model.rpn.post_nms_topk = image_keys(0, 0, batch.image_ids), (100, 100)
        peer = with_weights(torchvision_mask_rcnn(80, pixels.shape[-2:], post_nms_train=100).train(), model)
        both = (model, lambda: model(batch, keys)), (peer, lambda: peer(*torchvision_inputs(batch)))
        result[name] = {}
        for threads in args.threads:
            torch.set_num_threads(threads)
            found = {k: [] for k in kinds}
            for draw in range(args.draws):
                batch.images = noisy(pixels, draw)
                for k, o in zip(kinds, both): found[k].append(compared(*o))
            result[name][f'threads {threads}'] = rows = {k: over_draws(v) for k, v in found.items()}
            for k, o in rows.items():
                typical, largest = (max(v[m] for v in o['losses'].values()) for m in ('typical', 'largest'))
                print(f"{name}, threads {threads}, {k}: losses within {o['draws'][0]['largest_loss_difference']:.4f}; over {args.draws} draws within "
                      f"{typical:.4f} in half of them, {largest:.4f} in all; lowest cosine {o['lowest_cosine']:.4f}", flush=True)
    write(args.out, dict(command=command(), hardware=machine, draws=args.draws, files=result))


if __name__ == '__main__': main()
