"Prediction from the command line: what it writes, and how it fails."
import json
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from PIL import Image

from scratchdet import evaluate as evaluation, optim, predict as prediction
from scratchdet.coco import coco_split, load_index
from scratchdet.detector import mask_rcnn
from scratchdet.evaluate import detections_to_coco, eval_scale, evaluate
from scratchdet.loader import eval_loader
from scratchdet.predict import find_images, main, parse_args, predict, save_picture
from scratchdet.toy import make_toy, toy_names
from scratchdet.transforms import read_image
from scratchdet.viz import palette, side_by_side
from scratchdet.weights import load_model, save_model


@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    return make_toy(tmp_path_factory.mktemp('toy')/'toy', train=1, val=5, size=(64, 96))


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    "A small untrained Mask R-CNN of the toy set's categories, which knows how large its images are."
    torch.manual_seed(0)
    model = mask_rcnn(num_classes=len(toy_names), blocks=(1, 1, 1, 1), width=16, channels=32, fc=32, groups=4,
                      rpn=dict(post_nms_topk=(30, 30)), max_dets=5)
    names = dict(category_ids=list(range(1, len(toy_names) + 1)), category_names=list(toy_names))
    path = tmp_path_factory.mktemp('run')/'model.safetensors'
    return save_model(path, model, dict(**names, short_side=64, long_side=96))


def call(*words, module='predict'):
    command = [sys.executable, '-m', f'scratchdet.{module}', *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_a_folder_becomes_pictures_and_json(toy, weights, tmp_path):
    done = call(toy/'val2017', '--weights', weights, '--out', tmp_path/'out', '--score', 0, '--cpu', '--quiet')
    assert (done.returncode, done.stdout) == (0, ''), done.stderr
    doc = json.loads((tmp_path/'out/predictions.json').read_text())
    assert len(doc['images']) == 5 and len(doc['annotations']) > 0
    assert [c['name'] for c in doc['categories']] == list(toy_names)
    assert {o['image_id'] for o in doc['annotations']} <= {o['id'] for o in doc['images']}
    assert all({'score', 'segmentation', 'bbox', 'area', 'iscrowd'} <= set(o) for o in doc['annotations'])
    assert len(list((tmp_path/'out').glob('*.jpg'))) == 5


def test_bf16_finds_what_fp32_does(toy, weights, monkeypatch):
    "Autocast as on a processor that has it: float32 comes out, other numbers, and boxes that differ by a pixel at most."
    image, model = read_image(next((toy/'val2017').iterdir())), load_model(weights)
    monkeypatch.setattr(optim, 'usable_precision', lambda wanted, device: wanted)
    fp32, bf16 = (predict(model, [image], short=64, long=96, precision=o)[0] for o in ('fp32', 'bf16'))
    assert bf16['boxes'].dtype == bf16['scores'].dtype == torch.float32 and not torch.equal(fp32['scores'], bf16['scores'])
    assert (fp32['scores'] - bf16['scores']).abs().max() < .02
    near = (fp32['boxes'][:, None] - bf16['boxes']).abs().amax(-1).amin(1)
    assert (near < 1).float().mean() >= .6, near


def test_bad_images_do_not_stop_the_others(toy, weights, tmp_path, capsys):
    "Two of seven files: five pictures, five images in the json, both names at the end, code 1."
    folder = shutil.copytree(toy/'val2017', tmp_path/'in')
    whole = sorted(folder.glob('*.jpg'))
    (folder/'0_torn.jpg').write_bytes(whole[0].read_bytes()[:99])
    (folder/'empty.png').touch()
    words = ['--weights', str(weights), '--score', '0', '--cpu', '--out']
    with pytest.raises(SystemExit) as e: main(parse_args([str(folder), *words, str(tmp_path/'out')]))
    assert [o.partition('/in/')[2].split()[0] for o in e.value.code.splitlines()] == ['0_torn.jpg', 'empty.png']
    assert '5 pictures' in capsys.readouterr().out
    doc = json.loads((tmp_path/'out/predictions.json').read_text())
    assert [o['file_name'] for o in doc['images']] == [str(o) for o in whole] and len(doc['annotations']) > 0
    assert {o['image_id'] for o in doc['annotations']} <= {o['id'] for o in doc['images']}
    assert sorted(o.stem for o in (tmp_path/'out').glob('*.jpg')) == [o.stem for o in whole]
    by_name = {o['id']: o['file_name'] for o in doc['images']}
    main(parse_args([*map(str, whole), *words, str(tmp_path/'good')]))
    good = json.loads((tmp_path/'good/predictions.json').read_text())
    names = {o['id']: o['file_name'] for o in good['images']}
    assert [(by_name[o['image_id']], o['bbox']) for o in doc['annotations']] == [(names[o['image_id']], o['bbox']) for o in good['annotations']]


def test_each_image_has_a_picture_of_its_own(toy, weights, tmp_path, capsys):
    "Names that differ in the suffix alone; what is no image is counted on one line, without hidden files and folders."
    jpg, folder = sorted((toy/'val2017').glob('*.jpg'))[0], tmp_path/'in'
    (folder/'deep').mkdir(parents=True)
    for name in ('dog.png', 'dog.webp', 'dog.gif', 'cat.jpeg', 'CAT.JPG'): Image.open(jpg).save(folder/name)
    for name in ('a.bmp', 'b.TIF', 'c.tif', 'README', '.DS_Store'): (folder/name).touch()
    words = [str(folder), '--weights', str(weights), '--out', str(folder/'found'), '--cpu']
    for _ in range(2): paths = main(parse_args(words))  # its own pictures are not found again
    names = {'dog.png.jpg', 'dog.webp.jpg', 'dog.gif.jpg', 'cat.jpeg.jpg', 'CAT.JPG'}
    assert {o.name for o in paths} == {o.name for o in (folder/'found').iterdir()} - {'predictions.json'} == names
    assert all(Image.open(o).format == 'JPEG' for o in paths)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[0] == lines[2] == 'passed over: 1 .bmp, 2 .tif, 1 without suffix; images are .jpg, .jpeg, .png, .webp, .gif'
    main(parse_args([*words, '--quiet']))
    assert capsys.readouterr().out == ''


@pytest.mark.parametrize('given, out', [('in', 'in'), ('in', 'link'), ('link', 'in'), ('in/a.png', 'in'), ('lone.png', 'in')])
def test_pictures_never_lie_among_images(toy, weights, tmp_path, monkeypatch, given, out):
    "A folder of images as --out, itself or by a link, would be read again with its pictures."
    monkeypatch.chdir(tmp_path)
    Path('in').mkdir()
    Image.open(sorted((toy/'val2017').glob('*.jpg'))[0]).save('in/a.png')
    Path('link').symlink_to('in')
    Path('lone.png').symlink_to('in/a.png')
    with pytest.raises(SystemExit, match=f'{out} is a folder of images, .*choose another --out, {out}/found for'):
        main(parse_args([given, '--weights', str(weights), '--out', out, '--cpu', '--quiet']))
    assert [o.name for o in Path('in').iterdir()] == ['a.png']
    with pytest.raises(SystemExit, match='val2017 is a folder of images'):
        main(parse_args(['--coco', str(toy), '--weights', str(weights), '--out', str(toy/'val2017'), '--cpu', '--quiet']))


def test_a_data_set_with_a_bad_image(toy, weights, tmp_path):
    root = shutil.copytree(toy, tmp_path/'toy')
    bad = sorted((root/'val2017').glob('*.jpg'))[1]
    bad.write_bytes(b'torn')
    with pytest.raises(SystemExit, match=f'{bad.name} is not an image') as e:
        main(parse_args(['--coco', str(root), '--weights', str(weights), '--out', str(tmp_path/'out'), '--count', '3', '--cpu', '--quiet']))
    assert '\n' not in str(e.value) and len(json.loads((tmp_path/'out/predictions.json').read_text())['images']) == 2
    assert len(list((tmp_path/'out').glob('*.jpg'))) == 2


def test_a_full_disk_stops_the_command(toy, weights, tmp_path, monkeypatch):
    "That a picture cannot be written is no fault of its image."
    def full(*args, **kwargs): raise OSError('no space left on device')
    monkeypatch.setattr('scratchdet.predict.save_picture', full)
    with pytest.raises(SystemExit, match='no space left'):
        main(parse_args([str(toy/'val2017'), '--weights', str(weights), '--out', str(tmp_path), '--cpu', '--quiet']))
    assert list(tmp_path.iterdir()) == []


good = torch.zeros(3, 40, 50, dtype=torch.uint8)
bad_images = {
    'float': [good / 255], 'one channel': [good[:1]], 'four channels': [torch.cat([good, good[:1]])], 'channels last': [good.permute(1, 2, 0)],
    'grey': [good[0]], 'no pixel': [good[:, :, :0]], 'a batch in a list': [good[None]], 'int64': [good.long()], 'an array': [good.numpy()],
    'a path': ['x.jpg'], 'one tensor': good, 'a number': [3], 'None': [None], 'the second one': [good, good.float()]}


@pytest.mark.parametrize('images', bad_images.values(), ids=bad_images)
def test_what_is_no_image_is_refused(weights, images):
    model = load_model(weights).train()
    with pytest.raises(ValueError, match=r'not torch.uint8 \(3, H, W\).*predict\(model, \[image\]\)'): predict(model, images, short=64, long=96)
    assert model.training


@pytest.mark.parametrize('given, says', [
    (dict(short=0), 'short 0 must be 1 or more'), (dict(short=-5), 'short -5'), (dict(long=0), 'long 0'), (dict(short=float('nan')), 'short nan'),
    (dict(score=float('nan')), 'score nan must be from 0 to 1'), (dict(score=1.1), 'score 1.1')], ids=str)
def test_numbers_that_cannot_be_in_python(weights, given, says):
    "As the command line refuses them."
    with pytest.raises(ValueError, match=says): predict(load_model(weights), [good], **given)


@pytest.mark.parametrize('names', [['a'], []])
def test_a_category_without_a_name(names, tmp_path):
    found = dict(boxes=torch.tensor([[2., 3, 20, 30]]), labels=torch.tensor([1]), scores=torch.tensor([.9]))
    with pytest.raises(ValueError, match=f'label 1 has no name, there are {len(names)}: name every category'):
        save_picture(good, found, tmp_path/'x.png', names)
    assert not plt.get_fignums() and not list(tmp_path.iterdir())
    assert save_picture(good, {k: v[:0] for k, v in found.items()}, tmp_path/'x.png', names).exists()


def test_batches_and_iterators_are_images(weights):
    model = load_model(weights)
    for images in (torch.stack([good, good]), iter([good, good])): assert len(predict(model, images, short=64, long=96)) == 2


@pytest.mark.parametrize('words', ['--score 1.1', '--score -0.1', '--score nan', '--score x', '--count 0', '--count -1', '--short 0', '--short -5', '--long 0'])
def test_numbers_that_cannot_be(words, capsys):
    with pytest.raises(SystemExit) as e: parse_args(['a.jpg', '--weights', 'a', '--out', 'b', *words.split()])
    assert e.value.code == 2 and words.split()[0] in capsys.readouterr().err


def test_a_data_set_is_drawn_beside_its_objects(toy, weights, tmp_path):
    done = call('--coco', toy, '--weights', weights, '--out', tmp_path, '--count', 1, '--cpu')
    assert done.returncode == 0 and f'1 picture with 0 detections in {tmp_path}' in done.stdout and '--score' in done.stdout, done.stderr
    assert len(list(tmp_path.glob('*.jpg'))) == 1


def test_prediction_is_evaluation(toy, weights, tmp_path):
    index, model = load_index(*coco_split(toy, 'val')), load_model(weights)
    short, long = eval_scale(model.meta)
    assert (short, long) == (64, 96)
    evaluate(model, index, eval_loader(index, short=short, long=long), out=tmp_path)
    saved = json.loads((tmp_path/'detections.json').read_text())
    images = [read_image(index.path(i)) for i in range(len(index))]
    found = predict(model, images, short=short, long=long)
    rows = [o for i, d in zip(index.image_ids.tolist(), found) for o in detections_to_coco(d, i, index.category_ids)]
    assert rows and len(rows) == len(saved)
    for a, b in zip(rows, saved):
        assert (a['image_id'], a['category_id'], a['segmentation']) == (b['image_id'], b['category_id'], b['segmentation'])
        assert a['bbox'] == pytest.approx(b['bbox'], abs=1e-3) and a['score'] == pytest.approx(b['score'], abs=1e-5)


@pytest.mark.parametrize('words, fault', [
    (['none.jpg'], 'none.jpg does not exist'),
    (['notes.txt'], 'notes.txt is not an image .*: replace the file by a whole JPEG, PNG, WebP or GIF, or leave it out'),
    (['torn.jpg'], 'torn.jpg is not an image'),
    (['empty'], r'empty has no image \(.jpg, .*\): give a folder that has'),
    (['phone'], r'phone has no image \(.jpg, .*\), only 1 .heic: convert these'),
    (['--coco', 'nowhere'], 'nowhere'),
])
def test_faults_are_named_in_one_line(toy, weights, tmp_path, monkeypatch, words, fault):
    monkeypatch.chdir(tmp_path)
    for o in ('empty', 'phone'): (tmp_path/o).mkdir()
    (tmp_path/'phone/a.heic').touch()
    (tmp_path/'notes.txt').write_text('no image')
    jpg = sorted((toy/'val2017').glob('*.jpg'))[0].read_bytes()
    (tmp_path/'torn.jpg').write_bytes(jpg[:40])
    with pytest.raises(SystemExit, match=fault) as e:
        main(parse_args([*words, '--weights', str(weights), '--out', 'out', '--cpu', '--quiet']))
    assert '\n' not in str(e.value) and str(e.value).startswith('scratchdet.predict: ')
    assert Path('out').exists() == (words[0].endswith('.txt') or words[0] == 'torn.jpg')  # not where there is no image to look at


@pytest.mark.parametrize('coco', [True, False])
def test_equal_names_in_two_folders(toy, weights, tmp_path, coco):
    "Every image has its picture, in a data set with folders inside and with two folders on the command line."
    source = tmp_path/'data/val2017'
    files = sorted((toy/'val2017').glob('*.jpg'))[:2]
    for folder, file in zip('ab', files): (source/folder).mkdir(parents=True), shutil.copy(file, source/folder/'x.jpg')
    doc = json.loads((toy/'annotations/instances_val2017.json').read_text())
    names = {file.name: f'{folder}/x.jpg' for folder, file in zip('ab', files)}
    doc['images'] = [o | dict(file_name=names[o['file_name']]) for o in doc['images'] if o['file_name'] in names]
    doc['annotations'] = [o for o in doc['annotations'] if o['image_id'] in {o['id'] for o in doc['images']}]
    (tmp_path/'data/annotations').mkdir()
    (tmp_path/'data/annotations/instances_val2017.json').write_text(json.dumps(doc))
    words = ['--coco', tmp_path/'data'] if coco else [source/'a', source/'b']
    paths = main(parse_args([*map(str, words), '--weights', str(weights), '--out', str(tmp_path/'out'), '--cpu', '--quiet']))
    assert sorted(o.name for o in paths) == ['a_x.jpg', 'b_x.jpg'] and all(o.exists() for o in paths)


@pytest.mark.parametrize('module, words', [('predict', ['x.jpg']), ('evaluate', ['--coco', 'x'])])
def test_missing_weights_end_with_code_1(module, words, tmp_path):
    done = call(*words, '--weights', tmp_path/'none.safetensors', '--out', tmp_path/'out', '--quiet', '--cpu', module=module)
    assert done.returncode == 1 and 'none.safetensors does not exist' in done.stderr
    assert 'Traceback' not in done.stderr and done.stdout == ''


def test_a_slip_in_the_name_of_the_weights(weights, tmp_path):
    "What is there instead is told, if anything."
    words = ['a.png', '--out', str(tmp_path/'out'), '--cpu', '--weights']
    with pytest.raises(SystemExit, match=r'/model.safetensor does not exist: give the .*; beside it: model.safetensors$'):
        main(parse_args([*words, str(weights.with_suffix('.safetensor'))]))
    with pytest.raises(SystemExit, match='give the model.safetensors of a run$'): main(parse_args([*words, str(tmp_path/'x')]))


def test_evaluation_from_the_command_line(toy, weights, tmp_path):
    done = call('--coco', toy, '--weights', weights, '--out', tmp_path, '--cpu', '--workers', 0, '--pycocotools', module='evaluate')
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[:3] == ['AP', 'AP50', 'AP75'] and 'segm' in done.stdout and toy_names[0] in done.stdout
    assert json.loads((tmp_path/'results.json').read_text())['images'] == 5


@pytest.mark.parametrize('module', [evaluation, prediction])
def test_other_categories_are_refused(coco_mini, weights, tmp_path, module):
    words = ['--coco', str(coco_mini), '--weights', str(weights), '--out', str(tmp_path), '--cpu', '--quiet']
    with pytest.raises(SystemExit, match='knows 6 categories, .* has 80; only one of them has the names .*: give annotations with the categories of the training'):
        module.main(module.parse_args(words))


def test_real_images_of_any_size(coco_mini, weights):
    files = find_images([coco_mini/'val2017'])[:4]
    images = [read_image(o) for o in files]
    for image, det in zip(images, predict(load_model(weights), images, short=64, long=96)):
        assert det['masks'].shape[1:] == image.shape[1:] and (det['boxes'][:, 2] <= image.shape[2] + 1e-2).all()


def test_a_picture_of_crowded_detections():
    "Captions stand beside one another, also after the layout has changed; a red object stays red under a mask of any colour."
    red = torch.tensor([200, 40, 40], dtype=torch.uint8)[:, None, None].expand(3, 64, 96)
    boxes = torch.tensor([[8., 20, 60, 50]]) + torch.tensor([[0.], [1], [3], [0], [40], [2], [-9]])
    masks, labels = torch.zeros(len(boxes), 64, 96).bool(), torch.arange(len(boxes))
    masks[labels, 25, 8 * labels + 8] = True
    found = dict(boxes=boxes, labels=labels, scores=torch.full((len(boxes),), .9), masks=masks)
    fig = side_by_side(red, found, found, names=[f'category {i}' for i in range(len(boxes))])
    fig.canvas.draw()
    for ax in fig.axes:
        places = [o.get_window_extent() for o in ax.texts]
        assert len(places) == len(boxes) and not any(a.overlaps(b) for i, a in enumerate(places) for b in places[:i])
        seen = torch.tensor(ax.images[0].get_array().data)[masks.any(0)] / 255
        assert seen.shape == (len(boxes), 3) and len(ax.collections) == len(boxes)
        colours = torch.tensor(palette(len(boxes)))
        assert ((seen - red[:, 0, 0] / 255).norm(dim=1) < .5 * (seen - colours).norm(dim=1)).all()
    plt.close(fig)


def test_a_tall_thin_and_a_tiny_image(weights):
    images = [torch.zeros(3, h, w, dtype=torch.uint8) for h, w in ((400, 3), (3, 400), (1, 1))]
    found = predict(load_model(weights), images, short=64, long=96)
    assert [tuple(o['masks'].shape[1:]) for o in found] == [(400, 3), (3, 400), (1, 1)]
