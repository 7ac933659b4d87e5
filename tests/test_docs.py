"The built site: pages show their code, links and formulas work, and a browser opens every page from the folder, without network."
import re
import subprocess
import sys
from html import unescape

import browser
import pytest
from browser import Browser
from pages import every, pages, root

pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason='smalldocs needs Python 3.11')
by_name = dict(argnames='page', argvalues=pages, ids=[o.name for o in pages])


@pytest.fixture(scope='session')
def site(tmp_path_factory):
    "Folder of the site, built once."
    to = tmp_path_factory.mktemp('docs')/'site'
    done = subprocess.run([sys.executable, root/'tools/docs.py', 'build', '--to', to], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return to


@pytest.fixture(scope='session')
def window():
    "A browser without a window."
    if browser.program is None: pytest.skip('no Chromium')
    with Browser() as opened: yield opened


@pytest.fixture
def docs(monkeypatch):
    monkeypatch.syspath_prepend(root/'tools')
    import docs
    return docs


def built(site, page): return site/page.path.relative_to(root/'nbs').with_suffix('.html')


def test_every_notebook_is_a_page(site): assert len(every) >= 30 and all(built(site, o).exists() for o in every)


def code(text): return '\n'.join(o.rstrip() for o in text.splitlines() if not o.startswith('#|')).strip()


@pytest.mark.parametrize(**by_name)
def test_a_page_shows_all_that_it_exports(site, page):
    "Every exported cell with the bodies of its functions, private helpers too; no hidden cell."
    blocks = re.findall(r'<code class="[^"]*python[^"]*">(.*?)</code>', built(site, page).read_text(encoding='utf-8'), re.S)
    shown = {code(unescape(re.sub('<[^>]+>', '', o))) for o in blocks}
    exported, hidden = ({code(o.source) for o in page.code if flag in o.flags} - {''} for flag in ('export', 'hide'))
    assert len(exported) > 1 and exported <= shown and not hidden & shown


@pytest.mark.parametrize(**by_name)
def test_each_public_name_has_its_place(site, page):
    text = built(site, page).read_text(encoding='utf-8')
    for _, node in page.symbols:
        assert re.search(rf'id="{page.module}\.(\w+\.)?{node.name}"', text), node.name


def test_nothing_is_wrong_in_the_site(docs, site): assert docs.faults(site) == []


head = '<html><head></head><body>'


@pytest.mark.parametrize('text, fault', [
    ('<a href="no.html">x</a>', 'no.html leads nowhere'),
    ('<a href="other.html#no">x</a>', '#no leads to no place'),
    ('<a href="https://scratchdet.github.io/scratchdet/masks.html#pack_masks">x</a>', 'masks.html#pack_masks leads nowhere'),
    ('<img src="no.png">', 'no.png leads nowhere'),
    ('<script src="https://cdn.jsdelivr.net/npm/katex.js"></script>', 'needs the network'),
    ('<link rel="stylesheet" href="https://fonts.example/a.css">', 'needs the network'),
    ('<p id="a"></p><p id="a"></p>', 'a is there twice'),
    ('<h1>[`Detector`](50_detector.html)</h1>', 'raw Markdown'),
    (r'<span class="math">\(x^2\)</span>', 'formula'),
    (r'<math><mi>\unknown</mi></math>', 'formula')])
def test_a_fault_is_found(docs, tmp_path, text, fault):
    (tmp_path/'other.html').write_text(head + '<p id="there"><a href="page.html">x</a>')
    good = '<a href="other.html#there">x</a><a href="https://example.org">x</a><code>[a](b) $$</code>'
    (tmp_path/'page.html').write_text(head + good)
    assert docs.faults(tmp_path) == []
    (tmp_path/'page.html').write_text(head + good + text)
    found, = docs.faults(tmp_path)
    assert fault in found and found.startswith('page.html: ')


def test_no_network_in_styles(docs, tmp_path):
    (tmp_path/'page.html').write_text(head)
    (tmp_path/'theme.css').write_text('@import url(https://fonts.example/css?family=Lato);')
    assert docs.faults(tmp_path) == ['theme.css: needs the network for https://fonts.example/css?family=Lato']


def test_names_become_links(docs):
    "To the page and the heading, from wherever it is said; what several pages define is a link on these pages alone."
    nbs = docs.get_config().nbs_path
    names = docs.Names(docs.nbglob(as_path=True))
    boxes, detector, study = nbs/'00_boxes.ipynb', nbs/'50_detector.ipynb', nbs/'studies/00_learning.ipynb'
    assert names.linked('`box_iou` and `box_iou()`', detector) == \
        '[`box_iou`](00_boxes.ipynb#boxes.box_iou) and [`box_iou()`](00_boxes.ipynb#boxes.box_iou)'
    assert names.linked('`box_iou`', boxes) == '[`box_iou`](#boxes.box_iou)'
    assert names.linked('`Detector.forward`', study) == '[`Detector.forward`](../50_detector.ipynb#detector.Detector.forward)'
    assert names.linked('`scratchdet.detector`', boxes) == '[`scratchdet.detector`](50_detector.ipynb)'
    assert names.linked('`main`', nbs/'64_train.ipynb') == '[`main`](#train.main)'
    for text in '`main`', '`nobody`', '# `box_iou`', '[`box_iou`](there)', '```\n`box_iou`\n```': assert names.linked(text, boxes) == text


def test_code_leads_to_what_it_imports(docs, site):
    "A name wherever it stands, its module, but not a string, a keyword or an attribute of that name."
    text = (site/'50_detector.html').read_text(encoding='utf-8')
    for link in ('30_anchors.html">scratchdet.anchors', '30_anchors.html#anchors.Anchors">Anchors', '02_toy.html">toy_names'):
        assert f'<a href="{link}</a>' in text
    python = '<code class="sourceCode python">{}</code>'
    kept = ['f(draw<span class="op">=</span>1)', 'o.draw', '<span class="st">"draw"</span>', 'drawn', '<span class="co"># draw</span>']
    for code in kept: assert docs.linked_code(python.format(code), dict(draw='x')) == python.format(code)
    for code in 'draw(1)', 'draw <span class="op">==</span> 1':
        linked = python.format(code.replace('draw', '<a href="x">draw</a>'))
        assert docs.linked_code(python.format(code), dict(draw='x')) == linked
    assert docs.linked_code('<code>draw</code>', dict(draw='x')) == '<code>draw</code>'


def test_formulas_are_mathml(site):
    "As many as the notebooks have, and none waits for a script."
    for page in every:
        text = built(site, page).read_text(encoding='utf-8')
        wanted = sum(o.source.count('$$') // 2 for o in page.text)
        assert text.count('<math xmlns="http://www.w3.org/1998/Math/MathML" display="block">') == wanted, page.name
        assert 'katex' not in text.lower() and 'class="math' not in text


# What a reader would see as broken, as JavaScript that gives a list of words.
broken = """(() => {
  const wide = (o, limit) => o.getBoundingClientRect().right > limit + 1;
  const box = (o) => { while (o.tagName != 'MAIN' && !/auto|scroll/.test(getComputedStyle(o).overflowX)) o = o.parentElement; return o; };
  const all = (what, bad) => [...document.querySelectorAll(what)].filter(bad).map((o) => `${what}: ${o.outerHTML.slice(0, 120)}`);
  return [
    ...all('html', (o) => o.scrollWidth > innerWidth),
    ...all('main img', (o) => !o.complete || !o.naturalWidth),
    ...all('main :is(img, table, pre, math)', (o) => wide(o, innerWidth) && (box(o).tagName == 'MAIN' || wide(box(o), innerWidth))),
    ...all('main math', (o) => o.getBoundingClientRect().width < 3 || o.getBoundingClientRect().height < 3)];
})()"""
cut = """[...document.querySelectorAll('main pre.sourceCode')].filter((o) => o.scrollWidth > o.clientWidth)
  .filter((o) => Math.max(...o.innerText.split('\\n').map((l) => l.length)) <= 110).map((o) => o.innerText)"""


@pytest.mark.parametrize('page', every, ids=[o.name for o in every])
def test_a_browser_shows_the_page(window, site, page):
    "On a desk and on a phone: no complaint, nothing from the network, nothing missing or off the screen; lines of 110 characters fit the desk."
    for width in 1300, 390:
        window.open(built(site, page), width)
        assert window.run(broken) == [] and window.errors == []
        assert len(window.requests) > 4 and {o.split(':')[0] for o in window.requests} <= {'file', 'data'}
        if width == 1300: assert window.run(cut) == []


search = """(async () => {
  const input = document.querySelector('.smalldocs-search input');
  input.focus();
  input.value = '%s';
  input.dispatchEvent(new Event('input'));
  const found = () => [...document.querySelectorAll('.search-result')].map((o) => o.getAttribute('href'));
  for (let i = 0; i < 50 && !found().length; i++) await new Promise((done) => setTimeout(done, 50));
  return found();
})()"""


@pytest.mark.parametrize('start', ['index.html', 'studies/00_learning.html'])
def test_search_leads_to_what_is_defined(window, site, start):
    "From a folder, where a browser reads no json."
    for word, target in ('nms_keep', '00_boxes.html#boxes.nms_keep'), ('cell_anchors', '30_anchors.html#anchors.cell_anchors'):
        window.open(site/start, 1300)
        found, = (o for o in window.run(search % word) if o.endswith(target))
        assert window.click(f'.search-result[href="{found}"]') == f'{site.as_uri()}/{target}'
    window.open(site/start, 1300)
    assert window.run(search % 'random') and window.errors == []


# Contrast of the texts that a selector names, 1 to 21, by the formula of WCAG 2: colours are opaque or lie on what is behind them.
contrast = """((what) => {
  const colour = (text) => text.match(/[\\d.]+/g).map(Number);
  const blend = ([r, g, b, a = 1], under) => [r, g, b].map((v, i) => v * a + under[i] * (1 - a));
  const behind = (o) => o ? blend(colour(getComputedStyle(o).backgroundColor), behind(o.parentElement)) : [255, 255, 255];
  const light = (c) => c.map((v) => v / 255).map((v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], .05);
  return [...document.querySelectorAll(what)].map((o) => {
    const ground = behind(o), pair = [light(ground), light(blend(colour(getComputedStyle(o).color), ground))];
    return Math.max(...pair) / Math.min(...pair);
  });
})('%s')"""


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_words_stand_out_from_what_is_behind_them(window, site, scheme):
    window.open(site/'30_anchors.html', 1300, scheme)
    window.run(search % 'anchors')
    result = '.smalldocs-search input, .search-result-title, .search-result-section, .search-result-text, .search-result-text mark'
    for what in result.split(', ') + ['main p', 'main td', 'main pre code', 'main math', '#TOC a', '#quarto-sidebar a']:
        found = window.run(contrast % what)
        assert found and min(found) > 3.5, (what, min(found))


@pytest.mark.parametrize('width', [1300, 390])
def test_the_sidebar_leads_to_every_page(window, site, width):
    window.open(site/'index.html', width)
    if width == 390: window.run("document.querySelector('.quarto-btn-toggle').click()")
    links = window.run("[...document.querySelectorAll('#quarto-sidebar a[href]')].map((o) => o.href)")
    assert {built(site, o).as_uri() for o in every} <= set(links)
    top = window.run("document.querySelector('#quarto-sidebar').getBoundingClientRect().top")
    assert top >= window.run("document.querySelector('#quarto-header').offsetHeight") > 0
    assert window.click('#quarto-sidebar a[href$="30_anchors.html"]') == (site/'30_anchors.html').as_uri()
