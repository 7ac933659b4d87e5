"The picture of the detector on the front page, for wide screens and for phones: each part leads to the notebook that explains it."
from dataclasses import dataclass
from html import escape


@dataclass
class Part:
    "A box of the picture: its name, its page, the chapter that colours it, what it gives, and the sides of maps drawn in it, px."
    name: str
    page: str
    chapter: str
    gives: str = ''
    maps: tuple = ()


parts = dict(
    resnet=Part('ResNet', '21_resnet', 'features', 'C2 to C5', (28, 20, 14, 10)),
    fpn=Part('FPN', '22_fpn', 'features', 'P2 to P6', (28, 20, 14, 10, 7)),
    anchors=Part('Anchors', '30_anchors', 'proposals', 'fixed boxes'),
    rpn=Part('RPN', '32_rpn', 'proposals', 'proposals'),
    matcher=Part('Matching', '31_matcher', 'proposals', 'samples'),
    roi=Part('RoIAlign', '40_roi_align', 'regions', 'crops'),
    box=Part('Box head', '41_box_head', 'regions', 'class, box'),
    mask=Part('Mask head', '42_mask_head', 'regions', 'mask'),
    norm=Part('GroupNorm', '20_norm', 'around'), init=Part('Initialization', '51_init', 'around'),
    batch=Part('Batches', '12_loader', 'around'), schedule=Part('Schedule', '60_schedule', 'around'),
    optimizer=Part('Optimizer', '61_optim', 'around'), train=Part('Training', '64_train', 'around'),
    evaluate=Part('Evaluation', '63_evaluate', 'around'))


def row(names, x, y, width, height, gap):
    "Places of equal boxes beside each other, by name."
    return {o: (x + i * (width + gap), y, width, height) for i, o in enumerate(names.split())}


# Of each layout: size; places as x, y, width, height in px; arrows as `from to`, or with the corners that they turn at;
# those of training alone; words, their place and kind; where the name of the whole stands.
wide = dict(
    size=(830, 318),
    frame=(104, 8, 614, 246),
    places=dict(
        image=(2, 89, 84, 84), found=(744, 89, 84, 84),
        **row('resnet fpn', 118, 83, 106, 96, 22), **row('anchors', 376, 40, 100, 48, 0), **row('rpn', 376, 107, 100, 48, 0),
        **row('matcher', 376, 174, 100, 48, 0), roi=(500, 107, 86, 48), box=(612, 70, 92, 52), mask=(612, 140, 92, 52),
        **row('batch norm init schedule optimizer train evaluate', 2, 276, 110, 34, 9)),
    arrows=['image resnet', 'resnet fpn', 'fpn rpn', 'anchors rpn', 'rpn roi', 'roi box', 'roi mask', 'box found', 'mask found',
            [(299, 179), (299, 240), (558, 240), (558, 155)]],
    training=['rpn matcher', [(476, 198), (528, 198), (528, 155)]],
    words=[('image', 44, 190, 'gives'), ('detections', 786, 190, 'gives'), ('dashed: training', 118, 238, 'note')],
    title=(118, 32))

tall = dict(
    size=(350, 656),
    frame=(4, 112, 342, 370),
    places=dict(
        image=(88, 4, 84, 84), found=(130, 504, 84, 84),
        resnet=(16, 150, 144, 82), fpn=(186, 150, 138, 82), **row('anchors rpn matcher', 16, 258, 96, 48, 12),
        roi=(124, 336, 96, 48), box=(52, 414, 112, 52), mask=(180, 414, 112, 52),
        **row('batch norm init', 4, 600, 108, 24, 9), **row('schedule optimizer train evaluate', 4, 630, 80, 24, 7.3)),
    arrows=['image resnet', 'resnet fpn', 'anchors rpn', 'fpn rpn', 'rpn roi', 'roi box', 'roi mask', 'box found', 'mask found',
            [(324, 191), (336, 191), (336, 370), (220, 370)]],
    training=['rpn matcher', [(274, 306), (274, 350), (220, 350)]],
    words=[('image', 186, 50, 'note'), ('detections', 228, 550, 'note'), ('dashed: training', 14, 364, 'note')],
    title=(16, 136))


def middle(a, la, b, lb):
    "The middle of what two intervals share, given their beginnings and lengths; None where they share less than 8 px."
    low, high = max(a, b), min(a + la, b + lb)
    return (low + high) / 2 if high - low >= 8 else None


def route(a, b):
    "Corners of an arrow between two places: straight where they face each other, with two turns halfway where not."
    (x, y, w, h), (X, Y, W, H) = a, b
    if x + w < X:
        if (level := middle(y, h, Y, H)) is not None: return [(x + w, level), (X, level)]
        half = (x + w + X) / 2
        return [(x + w, y + h / 2), (half, y + h / 2), (half, Y + H / 2), (X, Y + H / 2)]
    if (level := middle(x, w, X, W)) is not None: return [(level, y + h), (level, Y)]
    half = (y + h + Y) / 2
    return [(x + w / 2, y + h), (x + w / 2, half), (X + W / 2, half), (X + W / 2, Y)]


def arrow(corners, kind):
    "A line through corners, with a tip at the last one."
    (x, y), (X, Y) = corners[-2:]
    dx, dy = ((X > x) - (X < x)) * 7, ((Y > y) - (Y < y)) * 7
    tip = f'{X:g},{Y:g} {X - dx - dy / 2:g},{Y - dy - dx / 2:g} {X - dx + dy / 2:g},{Y - dy + dx / 2:g}'
    line = ' '.join(f'{x:g},{y:g}' for x, y in [*corners[:-1], (X - dx, Y - dy)])
    return f'<polyline class="{kind}" points="{line}"/><polygon class="tip" points="{tip}"/>'


def text(words, x, y, kind): return f'<text class="{kind}" x="{x:g}" y="{y:g}">{escape(words)}</text>'


def link(page, content): return f'<a href="{page}.ipynb">{content}</a>'


def maps(sides, x, y, width):
    "Squares side by side, on one line at y, centred in a width."
    x += (width - sum(sides) - 5 * (len(sides) - 1)) / 2
    drawn = []
    for side in sides:
        drawn.append(f'<rect class="map" x="{x:g}" y="{y - side:g}" width="{side}" height="{side}"/>')
        x += side + 5
    return ''.join(drawn)


def box(part, place):
    "A part: a rounded box with its name and what it gives, a link as a whole."
    x, y, w, h = place
    height = bool(part.gives) * 17 + (max(part.maps) + 8 if part.maps else 0)  # px below the line of the name
    line = y + (h - height) / 2 + 4.5
    drawn = f'<rect class="{part.chapter}" x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="6"/>'
    drawn += text(part.name, x + w / 2, line, 'name' if part.gives else 'gives')
    if part.maps: drawn += maps(part.maps, x, line + 8 + max(part.maps), w)
    if part.gives: drawn += text(part.gives, x + w / 2, line + height, 'gives')
    return link(part.page, drawn)


shapes = [('<circle cx="22" cy="28" r="13" fill="#d64541"/>', (9, 15, 26, 26)),
          ('<rect x="46" y="10" width="27" height="27" fill="#2e8b57"/>', (46, 10, 27, 27)),
          ('<path d="M40 46 L60 76 L20 76 Z" fill="#3b6fd4"/>', (20, 46, 40, 30))]


def scene(place, boxes):
    "A drawn image with three objects; with boxes around them when found."
    x, y, w, h = place
    drawn = f'<rect width="{w}" height="{h}" rx="4" fill="#d9d2c3"/>' + ''.join(o for o, _ in shapes)
    for a, b, c, d in (o for _, o in shapes if boxes):
        drawn += f'<rect x="{a - 2}" y="{b - 2}" width="{c + 4}" height="{d + 4}" fill="none" stroke="#111" stroke-width="2"/>'
    return f'<g transform="translate({x} {y})">{drawn}</g>'


# The site's colours where it is drawn inside of a page, fixed ones where a page shows it as a file.
style = '''
.detector { --ink: var(--bs-body-color, #1f2328); }
.detector text { fill: var(--ink); font: 13px system-ui, -apple-system, "Segoe UI", "Liberation Sans", sans-serif; text-anchor: middle; }
.detector a { text-decoration: none; }
.detector .name { font-weight: 600; }
.detector .title { font-weight: 600; text-anchor: start; text-decoration: underline; } .detector .note { text-anchor: start; }
.detector :is(.features, .proposals, .regions, .around) { stroke-width: 1.5; fill-opacity: .16; }
.detector .features { fill: #2f81f7; stroke: #2f81f7; } .detector .proposals { fill: #d98200; stroke: #d98200; }
.detector .regions { fill: #2da44e; stroke: #2da44e; } .detector .around { fill: #8b949e; stroke: #8b949e; }
.detector .map { fill: #2f81f7; fill-opacity: .55; }
.detector .frame { fill: none; stroke: #8b949e; stroke-dasharray: 2 3; }
.detector polyline { fill: none; stroke: var(--ink); stroke-width: 1.3; } .detector .training { stroke-dasharray: 4 3; }
.detector .tip { fill: var(--ink); }
.detector a:is(:hover, :focus) :is(.features, .proposals, .regions, .around) { fill-opacity: .4; }
@media (prefers-color-scheme: dark) { .detector { --ink: var(--bs-body-color, #e6edf3); } }
'''.replace('\n', '')


def picture(layout, kind):
    "The picture in one of the layouts, as the text of an SVG file of class `kind`."
    places, (width, height), (x, y, w, h) = layout['places'], layout['size'], layout['frame']
    drawn = [f'<rect class="frame" x="{x}" y="{y}" width="{w}" height="{h}" rx="8"/>']
    for line in 'arrows', 'training':
        found = (o if isinstance(o, list) else route(*(places[p] for p in o.split())) for o in layout[line])
        drawn += [arrow(o, line) for o in found]
    drawn += [scene(places['image'], False), scene(places['found'], True)]
    drawn += [box(part, places[name]) for name, part in parts.items()]
    drawn += [text(*o) for o in layout['words']]
    drawn.append(link('50_detector', text('The detector', *layout['title'], 'title')))
    label = 'From an image to detections: ResNet, FPN, RPN, RoIAlign, box head and mask head'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" class="detector {kind}" viewBox="0 0 {width} {height}" role="img" aria-label="{label}">'
    return '\n'.join([head, f'<style>{style}</style>', *drawn, '</svg>', ''])


def pictures():
    "Text of each picture, by the name of its file."
    return {'detector.svg': picture(wide, 'wide'), 'detector-phone.svg': picture(tall, 'phone')}
