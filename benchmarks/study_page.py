"What the pages of the studies share: reading a result, naming its settings, showing every seed, telling settings apart."
import json
from pathlib import Path
from statistics import mean


def load(name):
    "The result of a study; prints its command, machine and setup."
    study = json.loads((Path(__file__).parents[1] / 'results' / f'{name}.json').read_text())
    setup, seconds = study['setup'], sum(o['cpu_seconds'] for o in study['runs'])
    recipe, unit = setup['recipe'], setup['unit']
    print(study['command'])
    print(f"{study['hardware']['cpu']}, one thread, torch {setup['torch']}: {seconds / 60:.0f} CPU minutes in all")
    print(f"{setup['train']} images to learn from, {setup['val']} unseen, {recipe['short_sides'][0]} x {recipe['long_side']} px;",
          f"1x is {unit} images, the base is {setup['base']['length']}x")
    print(f"ResNet of width {recipe['width']}, {recipe['blocks']} bottlenecks; pyramid and heads of {recipe['channels']} channels,",
          f"{recipe['groups']} groups; {recipe['roi_batch']} RoIs")
    print(f"SGD, lr {recipe['lr']} for {recipe['batch_size']} images, seeds {study['seeds']}")
    return study


def place(study, run, names):
    "What a run is called in `by`: the values of its settings `names`."
    key = tuple(str(run.get(k, study['setup']['base'][k])) for k in names)
    return key if len(key) > 1 else key[0]


def by(study, *names):
    "AP50 in percent, one a seed, for each combination of the settings `names`."
    rows = {}
    for run in study['runs']: rows.setdefault(place(study, run, names), {})[run['seed']] = 100 * run['AP50']
    wrong = [k for k, v in rows.items() if len(v) < 3 or len(v) != len(study['seeds'])]
    if wrong: raise ValueError(f'{study["command"]}: no three seeds for {wrong}')
    return {k: [v[s] for s in study['seeds']] for k, v in rows.items()}


def table(rows, first='setting'):
    "Mean, and from the lowest to the highest seed, of each row."
    names = {k: ', '.join(k) if isinstance(k, tuple) else k for k in rows}
    width = max(map(len, [first, *names.values()]))
    print(f'{first:{width}}  {"mean":>5}  {"lowest":>6} to highest')
    for k, v in rows.items(): print(f'{names[k]:{width}}  {mean(v):5.1f}  {min(v):6.1f} to {max(v):.1f}')


def dots(ax, rows, labels):
    "Every seed as a dot, the mean as a line, one column a row of the table."
    for i, v in enumerate(rows.values()):
        ax.plot([i - .25, i + .25], [mean(v)] * 2, color=f'C{i}')
        ax.plot([i + .08 * (j - (len(v) - 1) / 2) for j in range(len(v))], v, 'o', ms=4, color=f'C{i}')
    ax.set_xticks(range(len(rows)), labels, fontsize=8)
    ax.set_ylim(bottom=0)
    ax.grid(axis='y', alpha=.3)


def curves(ax, study, names, rows, labels):
    "The loss of every run over the images it saw, one colour a row of the table."
    for i, (row, label) in enumerate(zip(rows, labels)):
        for run in (o for o in study['runs'] if place(study, o, names) == row):
            images = run['every'] * run.get('batch', study['setup']['base']['batch'])
            x = [(k + .5) * images for k in range(len(run['losses']))]
            ax.plot(x, run['losses'], color=f'C{i}', lw=.8, label=None if run['seed'] else label)
    ax.set(xlabel='images', title='sum of the losses')
    ax.legend(fontsize=7)
    ax.grid(alpha=.3)


def apart(a, b):
    "True when every seed of `a` lies above every seed of `b`."
    return min(a) > max(b)


def verdict(name, a, other, b):
    "One line: how far two settings differ, and whether the seeds hide it."
    more = mean(a) - mean(b)
    sure = 'every seed above every seed' if apart(a, b) else 'every seed below every seed' if apart(b, a) else 'the seeds overlap: not told apart'
    print(f'{name} - {other}: {more:+.1f}, {sure}')
