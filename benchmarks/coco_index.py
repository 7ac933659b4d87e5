"""The index of an annotation file as large as COCO's train2017: built, opened again and used by workers, beside pycocotools on the same file.

The file is drawn at random with the shape of instances_train2017.json: as many images and objects, polygons of about as many points, one crowd in
a hundred. Each measurement runs in a process of its own; the file lies in the page cache for all of them.

    python benchmarks/coco_index.py --out results/coco_index.json
"""
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import orjson

from common import command, hardware_to_time, own_peak, parser, write

sizes = np.array([[480, 640], [640, 480], [427, 640], [640, 427], [375, 500], [500, 375], [612, 612], [360, 640]])


def image_records(n, rng):
    "Records of `n` images in COCO's words, and their sizes."
    hw = sizes[rng.integers(0, len(sizes), n)]
    ids = rng.permutation(5 * n)[:n] + 1
    return [dict(license=3, file_name=f'{i:012}.jpg', coco_url=f'http://images.cocodataset.org/train2017/{i:012}.jpg', height=h, width=w,
                 date_captured='2013-11-14 17:02:52', flickr_url=f'http://farm7.staticflickr.com/6116/{6 * 10 ** 9 + i}_da26cf2c9e_z.jpg', id=i)
            for i, (h, w) in zip(ids.tolist(), hw.tolist())], ids, hw


def blobs(points, center, radius, limit, rng):
    "Closed curves about their centers: (sum of points, 2) coordinates in the image, with two decimals."
    ring = np.repeat(np.arange(len(points)), points)
    angle = rng.random(len(ring)) * .5 + np.arange(len(ring)) - np.repeat(np.cumsum(points) - points, points)
    angle *= 2 * np.pi / points[ring]
    reach = radius[ring] * rng.uniform(.5, 1, (len(ring), 1))
    return (center[ring] + reach * np.stack([np.cos(angle), np.sin(angle)], 1)).clip(0, limit[ring]).round(2)


def crowd(box, size, rng):
    "Run lengths of a striped region in a box: some hundreds of numbers, as COCO's crowds have."
    (x, y, w, h), (height, width) = box, size
    bits = np.zeros((width, height), bool)
    bits[int(x):int(x + w), int(y):int(y + h)] = (np.arange(int(y), int(y + h)) // rng.integers(4, 20)) % 2
    flat = bits.ravel()
    ends = np.flatnonzero(np.diff(flat, prepend=False))
    return dict(counts=np.diff(ends, prepend=0, append=flat.size).tolist(), size=[height, width])


def annotation_records(first, image_ids, hw, rng):
    "Records of one object in each of these images; one in a hundred is a crowd."
    n, limit = len(image_ids), hw[:, ::-1].astype(float)
    rings = rng.geometric(1 / 1.08, n)                                         # 1.08 polygons an object
    owner = np.repeat(np.arange(n), rings)
    points = np.exp(rng.normal(2.85, .75, len(owner))).astype(int).clip(3, 400)  # median 17, mean 22
    radius = limit * np.exp(rng.normal(-2.5, .8, (n, 2))).clip(.01, .45)
    center = rng.uniform(0, 1, (n, 2)) * limit
    xy = blobs(points, center[owner], radius[owner], limit[owner], rng)
    starts = np.cumsum(points) - points
    low = np.minimum.reduceat(xy, starts[np.cumsum(rings) - rings]).clip(0, limit - 3)
    high = np.maximum.reduceat(xy, starts[np.cumsum(rings) - rings])
    boxes = np.concatenate([low, (high - low).clip(2)], 1).round(2)
    pieces = np.split(xy.ravel(), 2 * starts[1:])
    last = np.cumsum(rings)
    for i, box in enumerate(boxes.tolist()):
        is_crowd = rng.random() < .01
        shape = crowd(box, hw[i].tolist(), rng) if is_crowd else pieces[last[i] - rings[i]:last[i]]
        yield dict(segmentation=shape, area=box[2] * box[3] * .6, iscrowd=int(is_crowd), image_id=int(image_ids[i]), bbox=box,
                   category_id=int(rng.integers(1, 81)), id=first + i)


def write_coco(path, images=118287, annotations=860001, seed=0, block=20000):
    "Write the file in blocks, its images empty; returns the image folder."
    rng, folder = np.random.default_rng(seed), path.parent / 'images'
    text = lambda o: orjson.dumps(o, option=orjson.OPT_SERIALIZE_NUMPY).replace(b'":', b'": ')
    records, ids, hw = image_records(images, rng)
    folder.mkdir()
    for o in records: (folder / o['file_name']).touch()
    categories = [dict(supercategory='thing', id=i, name=f'thing {i}') for i in range(1, 81)]
    with open(path, 'wb') as f:
        f.write(b'{"info": {"year": 2017},"licenses": [],"images": ' + text(records) + b',"annotations": [')
        for start in range(0, annotations, block):
            rows = rng.integers(0, images, min(block, annotations - start))
            part = text(list(annotation_records(start + 1, ids[rows], hw[rows], rng)))
            f.write(b',' * (start > 0) + part[1:-1])
        f.write(b'],"categories": ' + text(categories) + b'}')
    return folder


def own_memory():
    "Memory of this process that it shares with no other, MB: what one more worker costs."
    rows = dict(o.split(':') for o in Path('/proc/self/smaps_rollup').read_text().splitlines()[1:])
    return sum(int(rows[k].split()[0]) for k in ('Private_Clean', 'Private_Dirty')) / 1024


def build(folder):
    "Seconds and peak memory (GB) of `load_index`: builds the arrays, or opens those that are there."
    from scratchdet.coco import load_index
    start, cpu = time.perf_counter(), time.process_time()
    index = load_index(folder / 'instances.json', folder / 'images', cache=folder / 'cache')
    took = dict(seconds=time.perf_counter() - start, cpu_seconds=time.process_time() - cpu)
    return dict(took, peak_gb=own_peak(), images=len(index), annotations=len(index.arrays['labels']),
                cache_mb=index.cache.stat().st_size / 1e6)


def pycocotools(folder):
    "Seconds and peak memory (GB) of `COCO(...)`."
    from pycocotools.coco import COCO
    start, cpu = time.perf_counter(), time.process_time()
    coco = COCO(str(folder / 'instances.json'))
    took = dict(seconds=time.perf_counter() - start, cpu_seconds=time.process_time() - cpu)
    return dict(took, peak_gb=own_peak(), images=len(coco.imgs), annotations=len(coco.anns))


def read_ours(index, k, images):
    "What a worker of the data loader asks of the index: path, target and run lengths."
    i = k % len(index)
    return index.path(i), index.target(i), index.rles(i)


def read_theirs(coco, k, images):
    "The same from pycocotools."
    anns = coco.loadAnns(coco.getAnnIds(imgIds=[images[k % len(images)]], iscrowd=False))
    return coco.imgs[images[k % len(images)]]['file_name'], anns, [coco.annToRLE(o) for o in anns]


def worker(read, data, images, first, barrier, answers):
    "Read images as one of two workers; answer with private memory (MB) before and after, both alive."
    if read is read_ours: import scratchdet.loader  # noqa: F401, what decodes images is in a real worker's memory, too
    before = own_memory()
    for k in range(first, len(images), 2): read(data, k, images)
    barrier.wait()
    answers.put(dict(before_mb=before, after_mb=own_memory(), images_read=len(range(first, len(images), 2))))
    barrier.wait()


def workers(folder, how, kind, count):
    "Private memory of two workers that share `count` images, started by `how`."
    context = multiprocessing.get_context(how)
    if kind == 'scratchdet':
        import scratchdet.loader  # noqa: F401
        from scratchdet.coco import load_index, training_images
        data, read = training_images(load_index(folder / 'instances.json', folder / 'images', cache=folder / 'cache')), read_ours
        images = data.image_ids[:count].tolist()
    else:
        from pycocotools.coco import COCO
        data, read = COCO(str(folder / 'instances.json')), read_theirs
        images = sorted(data.imgToAnns)[:count]
    barrier, answers = context.Barrier(2), context.Queue()
    started = [context.Process(target=worker, args=(read, data, images, i, barrier, answers)) for i in range(2)]
    for o in started: o.start()
    rows = [answers.get() for _ in started]
    for o in started: o.join()
    return dict(workers=rows, after_mb=max(o['after_mb'] for o in rows))


def measured(name, folder, count):
    "One measurement in a process of its own."
    run = subprocess.run([sys.executable, __file__, '--one', name, '--folder', str(folder), '--read', str(count)], stdout=subprocess.PIPE,
                         text=True, check=True)
    result = json.loads(run.stdout.splitlines()[-1])
    print(name, result, flush=True)
    return result


def main():
    "Write the file, measure all, print and write the numbers."
    p = parser(__doc__, images=(118287, 'images of the drawn file'), annotations=(860001, 'its objects'),
               read=(20000, 'images that two workers read together'), repeats=(5, 'of opening the index'))
    p.add_argument('--folder', type=Path, help='for the drawn file, kept; default a temporary one')
    p.add_argument('--one', help='run one measurement on the file in --folder')
    args = p.parse_args()
    if args.one:
        name, _, how = args.one.partition(' ')
        result = workers(args.folder, how, name, args.read) if how else dict(build=build, pycocotools=pycocotools)[name](args.folder)
        return print(json.dumps(result))
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / 'instances.json').exists(): write_coco(folder / 'instances.json', args.images, args.annotations)
        for o in (folder / 'cache').glob('*'): o.unlink()
        machine = dict(hardware_to_time(), nice=os.nice(0))
        result = dict(command=command(), hardware=machine, json_mb=(folder / 'instances.json').stat().st_size / 1e6)
        runs = ['pycocotools', 'build', *['build'] * args.repeats, 'scratchdet fork', 'scratchdet spawn', 'pycocotools fork']
        theirs, built, *opened, fork, spawn, fork_theirs = [measured(o, folder, args.read) for o in runs]
        result.update(pycocotools=dict(theirs, fork=fork_theirs), scratchdet=dict(built, opened=opened, fork=fork, spawn=spawn))
    write(args.out, result)


if __name__ == '__main__': main()
