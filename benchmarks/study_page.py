"What the pages of the studies share: reading a result, naming its settings, showing every seed, telling settings apart."
import json
from pathlib import Path
from statistics import mean, variance

import matplotlib.pyplot as plt

from scratchdet.viz import palette

colours, marks = palette(7), 'os^DvP*'


def load(name):
    "The result of a study; prints its command, machine and setup."
    study = json.loads((Path(__file__).parents[1] / 'results' / f'{name}.json').read_text())
    setup, recipe = study['setup'], study['setup']['recipe']
    before = {o['seed']: o['classifier']['cpu_seconds'] for o in study['runs'] if 'classifier' in o}
    seconds = sum(o['cpu_seconds'] for o in study['runs']) + sum(before.values())
    for key, value in {
        'command': study['command'],
        'machine': f"{study['hardware']['cpu']}, one thread, torch {setup['torch']}; {seconds / 60:.0f} CPU minutes in all",
        'images': f"{setup['train']} to learn from, {setup['val']} unseen, {recipe['short_sides'][0]} x {recipe['long_side']} px",
        'schedule': f"1x is {setup['unit']} images; {setup['base']['length']}x where nothing else is said",
        'backbone': f"ResNet, width {recipe['width']}, bottlenecks a stage {recipe['blocks']}",
        'the rest': f"{recipe['channels']} channels in pyramid and heads, {recipe['groups']} groups, {recipe['roi_batch']} RoIs",
        'SGD': f"lr {recipe['lr']} for {recipe['batch_size']} images, momentum {recipe['momentum']}, weight decay {recipe['weight_decay']}",
        'seeds': ', '.join(map(str, study['seeds'])),
    }.items(): print(f'{key:9} {value}')
    return study


def place(study, run, names):
    "What a run is called in `by`: the values of its settings `names`."
    key = tuple(str(run.get(k, study['setup']['base'][k])) for k in names)
    return key if len(key) > 1 else key[0]


def each(study, names, value):
    "What `value` makes of a run, one a seed, for each combination of the settings `names`."
    rows = {}
    for run in study['runs']: rows.setdefault(place(study, run, names), {})[run['seed']] = value(run)
    wrong = [k for k, v in rows.items() if len(v) < 3 or len(v) != len(study['seeds'])]
    if wrong: raise ValueError(f'{study["command"]}: no three seeds for {wrong}')
    return {k: [v[s] for s in study['seeds']] for k, v in rows.items()}


def by(study, *names):
    "AP50 in percent, one a seed, for each combination of the settings `names`."
    return each(study, names, lambda run: 100 * run['AP50'])


def late(study, *names, reports=6):
    "The mean of the last `reports` of the loss, likewise; 6 are a fifth of a run, more or less."
    return each(study, names, lambda run: mean(run['losses'][-reports:]))


def table(rows, first='setting'):
    "Mean, and from the lowest to the highest seed, of each row."
    names = {k: ', '.join(k) if isinstance(k, tuple) else k for k in rows}
    width = max(map(len, [first, *names.values()]))
    print(f'{first:{width}}  {"mean":>5}  {"lowest":>6} to highest')
    for k, v in rows.items(): print(f'{names[k]:{width}}  {mean(v):5.1f}  {min(v):6.1f} to {max(v):.1f}')


def panels():
    "A figure with two plots, one above the other, whose letters a phone shows."
    fig, axs = plt.subplots(2, 1, figsize=(6.4, 6), dpi=72, layout='constrained')
    return fig, *axs


def dots(ax, rows, labels):
    "Every seed as a dot, the mean as a line, one column a row of the table."
    for i, v in enumerate(rows.values()):
        ax.plot([i - .25, i + .25], [mean(v)] * 2, color=colours[i])
        ax.plot([i + .08 * (j - (len(v) - 1) / 2) for j in range(len(v))], v, 'o', ms=5, color=colours[i], clip_on=False)
    ax.set_xticks(range(len(rows)), labels)
    ax.set_ylim(0, 1.08 * ax.get_ylim()[1])
    ax.grid(axis='y', alpha=.3)


def lines(ax, series, ticks):
    "Every seed as a mark, the means joined: one colour for each of `series`, {name: {tick: values}}, one column for each of `ticks`."
    for i, (name, columns) in enumerate(series.items()):
        at = {k: j + .12 * (i - (len(series) - 1) / 2) for j, k in enumerate(ticks) if k in columns}
        ax.plot(at.values(), [mean(columns[k]) for k in at], color=colours[i])
        seeds = [(x, v) for k, x in at.items() for v in columns[k]]
        ax.plot(*zip(*seeds), marks[i], ms=5, color=colours[i], label=name, clip_on=False)
    ax.set_xticks(range(len(ticks)), ticks)
    ax.set_ylim(0, 1.08 * ax.get_ylim()[1])
    ax.grid(axis='y', alpha=.3)
    ax.legend()


def curves(ax, study, names, rows, labels):
    "The loss of every run over the images it saw, one colour a row of the table."
    for i, (row, label) in enumerate(zip(rows, labels)):
        for run in (o for o in study['runs'] if place(study, o, names) == row):
            images = run['every'] * run.get('batch', study['setup']['base']['batch'])
            x = [(k + .5) * images for k in range(len(run['losses']))]
            ax.plot(x, run['losses'], color=colours[i], lw=.8, label=None if run['seed'] else label)
    ax.set(xlabel='images', title='sum of the losses')
    ax.legend()
    ax.grid(alpha=.3)


def scatter(rows):
    "The deviation from seed to seed, pooled over the rows of a table."
    return mean(variance(v) for v in rows.values()) ** .5


def apart(a, b):
    "True when every seed of `a` lies above every seed of `b`."
    return min(a) > max(b)


def verdict(name, a, other, b):
    "One line: how far two settings differ, and whether the seeds hide it."
    more = mean(a) - mean(b)
    sure = 'all seeds above' if apart(a, b) else 'all seeds below' if apart(b, a) else 'not told apart'
    print(f'{name} - {other}: {more:+.1f}, {sure}')
