"The built site: pages show their code, links and formulas work, and a browser opens every page from the folder, without network."
import os
import re
import subprocess
import sys
import time
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
    to, start = tmp_path_factory.mktemp('docs')/'site', time.time()
    done = subprocess.run([sys.executable, root/'tools/docs.py', 'build', '--to', to], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert time.time() - start < 300, 'five minutes are enough for the site on two cores'
    return to


def need_browser(program, required):
    "Skip what needs a browser where there is none, or fail where one must be there."
    if program is None and required: pytest.fail('SCRATCHDET_REQUIRE_BROWSER is set, and there is no Chromium')
    if program is None: pytest.skip('no Chromium')


@pytest.fixture(scope='session')
def window():
    "A browser without a window."
    need_browser(browser.program, os.environ.get('SCRATCHDET_REQUIRE_BROWSER'))
    with Browser() as opened: yield opened


def test_a_missing_browser_is_no_success_where_it_is_required():
    with pytest.raises(pytest.fail.Exception, match='no Chromium'): need_browser(None, '1')
    with pytest.raises(pytest.skip.Exception, match='no Chromium'): need_browser(None, None)
    need_browser('/usr/bin/chromium', '1')


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
    ('<picture><source srcset="no.svg 2x"></picture>', 'no.svg leads nowhere'),
    ('<svg><a href="no.html"><rect/></a></svg>', 'no.html leads nowhere'),
    ('<svg><image xlink:href="no.png"/></svg>', 'no.png leads nowhere'),
    ('<object data="no.svg"></object>', 'no.svg leads nowhere'),
    ('<a href="https://github.com/scratchdet/scratchdet/blob/main/recipes/no.sh">x</a>', 'no.sh is not in the repository'),
    (r'<math><mi>\unknown</mi></math>', 'formula')])
def test_a_fault_is_found(docs, tmp_path, text, fault):
    (tmp_path/'other.html').write_text(head + '<p id="there"><a href="page.html">x</a>')
    good = '<a href="https://github.com/scratchdet/scratchdet/tree/main/recipes">x</a><a href="other.html#there">x</a><a href="https://example.org">x</a><code>[a](b) $$</code>'
    (tmp_path/'page.html').write_text(head + good)
    assert docs.faults(tmp_path) == []
    (tmp_path/'page.html').write_text(head + good + text)
    found, = docs.faults(tmp_path)
    assert fault in found and found.startswith('page.html: ')


def test_no_network_in_styles(docs, tmp_path):
    (tmp_path/'page.html').write_text(head)
    (tmp_path/'theme.css').write_text('@import url(https://fonts.example/css?family=Lato);')
    assert docs.faults(tmp_path) == ['theme.css: needs the network for https://fonts.example/css?family=Lato']


@pytest.mark.parametrize('text, fault', [
    ('[x](no.md)', 'no.md leads nowhere'), ('[x](#no)', '#no leads nowhere'), ('<img src="no.svg">', 'no.svg leads nowhere'),
    ('<source srcset="no.svg">', 'no.svg leads nowhere'), ('[![x](no.png)](https://example.org)', 'no.png leads nowhere')])
def test_a_fault_of_a_text_in_the_repository_is_found(docs, tmp_path, text, fault):
    good = '# One thing\n[x](#one-thing) [x](READ.md#one-thing) [x](https://example.org) `[x](no.md)`\n```\n[x](no.md)\n```\n'
    (tmp_path/'READ.md').write_text(good)
    assert docs.text_faults(tmp_path/'READ.md') == []
    (tmp_path/'READ.md').write_text(good + text)
    assert docs.text_faults(tmp_path/'READ.md') == [f'READ.md: {fault}']


def test_the_front_page_lists_all_pages(docs):
    "Under the names of the sidebar's chapters; its links lead to the notebooks."
    text = docs.readme()
    assert '<!-- pages' not in text and all(f'- **{o}**: [' in text for o in docs.sections(root/'nbs'))
    listed = re.findall(r'\]\((nbs/[^)]*\.ipynb)\)', text.split('## The pages')[1])
    assert sorted(listed) == sorted(str(o.path.relative_to(root)) for o in every if o.name != 'index')


@pytest.mark.parametrize('kind', ['wide', 'tall'])
def test_the_picture_of_the_detector_is_whole(docs, kind):
    "Parts lie side by side and in the picture, words fit their boxes, pages exist, and each page of the three chapters is there, but for faster bodies."
    import picture
    layout = getattr(picture, kind)
    (width, height), places = layout['size'], layout['places']
    assert set(places) == {*picture.parts, 'image', 'found'}
    for name, (x, y, w, h) in places.items():
        assert x >= 0 and y >= 0 and x + w <= width and y + h <= height
        for other in (places[o] for o in places if o > name):
            assert x + w <= other[0] or other[0] + other[2] <= x or y + h <= other[1] or other[1] + other[3] <= y
    for name, part in picture.parts.items():
        assert max(len(part.name), len(part.gives)) * 6.5 < places[name][2] and (root/f'nbs/{part.page}.ipynb').exists()
    chapters = docs.sections(root/'nbs')
    shown = {o.stem for c in ('Features', 'Proposals', 'Regions') for o in chapters[c] if not o.stem.endswith(('_triton', '_winograd'))}
    assert len(shown) >= 9 and shown <= {o.page for o in picture.parts.values()}


def test_names_become_links(docs):
    "To the page and the heading, from wherever it is said; what several pages define is a link on these pages alone."
    nbs = docs.get_config().nbs_path
    names = docs.Names(docs.nbglob(as_path=True))
    boxes, detector, study = nbs/'00_boxes.ipynb', nbs/'50_detector.ipynb', nbs/'studies/00_learning.ipynb'
    assert names.linked('`box_iou` and `box_iou()`', detector) == \
        '[`box_iou`](00_boxes.ipynb#boxes.box_iou) and [`box_iou()`](00_boxes.ipynb#boxes.box_iou)'
    assert names.linked('`box_iou`', boxes) == '[`box_iou`](#boxes.box_iou)'
    assert names.linked('`box_iou(a, b)`', boxes) == '[`box_iou(a, b)`](#boxes.box_iou)'
    assert names.linked('`Detector.forward`', study) == '[`Detector.forward`](../50_detector.ipynb#detector.Detector.forward)'
    assert names.linked('`scratchdet.detector`', boxes) == '[`scratchdet.detector`](50_detector.ipynb)'
    assert names.linked('`main`', nbs/'64_train.ipynb') == '[`main`](#train.main)'
    for text in '`main`', '`nobody`', '# `box_iou`', '[`box_iou`](there)', '```\n`box_iou`\n```': assert names.linked(text, boxes) == text


def test_what_a_name_means_depends_on_the_page(docs):
    "An argument of a function of the page, `start`, is no function of another one; a function and the module of another page need a link by hand."
    nbs, names = docs.get_config().nbs_path, docs.Names(docs.nbglob(as_path=True))
    loader, commands, detector = nbs/'12_loader.ipynb', nbs/'80___main__.ipynb', nbs/'50_detector.ipynb'
    assert names.linked('`start`', loader) == '`start`' and 'command.start' in names.linked('`start`', detector)
    for page in commands, nbs/'67_report.ipynb': assert names.linked('`report`', page) == '`report`'
    assert names.linked('`report`', nbs/'66_plan.ipynb') == '[`report`](#plan.report)'
    assert 'plan.plan' in names.linked('`plan`', commands)  # one page has both
    good = '[`report`](67_report.ipynb) `plan` `nobody` `report.md`\n```\n`report`\n```'
    assert names.doubtful(good, commands) == [] and names.doubtful(good + ' `report` `report()`', commands) == ['report']
    assert docs.unclear(names) == []


def test_arguments_are_found(docs):
    code = 'def f(a, *b, c=1, **d): return [lambda e: 1]\nclass G:\n    h:int\n    i = 2\n    def j(self, k): l = 3'
    assert docs.arguments(docs.mk_cell(code, 'code')) == {*'abcdehk', 'self'}


def test_no_public_name_stays_without_a_link(docs):
    "What a text says in backticks leads to its cell, on every page; what a page has for an argument, leads there by hand."
    names, linked, missing = docs.Names(docs.nbglob(as_path=True)), 0, []
    for path in names.modules:
        for cell in (o for o in docs.page(path, names).cells if o.cell_type == 'markdown'):
            text = re.sub(r'^```.*?^```|^#.*?$', '', cell.source, flags=re.S | re.M)
            said = re.findall(r'(\[?)`([A-Za-z_][\w.]*)(?:\([^`]*\))?`', text)
            linked += sum(bool(bracket) for bracket, name in said if name in names.places)
            missing += [f'{path.name}: {name}' for bracket, name in said if len(names.places.get(name, [])) == 1
                        and not bracket and name not in names.arguments[path]]
    assert linked > 10 and not missing


def test_code_leads_to_what_it_imports(docs, site):
    "A name wherever it stands, its module, but not a string, a keyword or an attribute of that name."
    text = (site/'50_detector.html').read_text(encoding='utf-8')
    for link in ('30_anchors.html">scratchdet.anchors', '30_anchors.html#anchors.Anchors">Anchors', '02_toy.html">toy_names'):
        assert f'<a href="{link}</a>' in text
    python = '<code class="sourceCode python">{}</code>'
    kept = ['f(draw<span class="op">=</span>1)', 'o.draw', 'o<span class="op">.</span>draw', '<span class="st">"draw"</span>', 'drawn', '<span class="co"># draw</span>']
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
broken = r"""(() => {
  const width = document.documentElement.clientWidth;  // a phone makes innerWidth as large as what sticks out
  const wide = (o, limit) => o.getBoundingClientRect().right > limit + 1;
  const box = (o) => { while (o.tagName != 'MAIN' && !/auto|scroll/.test(getComputedStyle(o).overflowX)) o = o.parentElement; return o; };
  const all = (what, bad) => [...document.querySelectorAll(what)].filter(bad).map((o) => `${what}: ${o.outerHTML.slice(0, 120)}`);
  const words = document.createTreeWalker(document.querySelector('main') || document.body, NodeFilter.SHOW_TEXT);
  const raw = [];
  while (words.nextNode()) {
    const {parentElement: o, data} = words.currentNode;
    if (!o.closest('pre, code, script, style, annotation') && /\$\$|\\[a-zA-Z(\[{]/.test(data)) raw.push(`formula: ${data.slice(0, 120)}`);
  }
  return [
    ...raw,
    ...all('html', (o) => o.scrollWidth > width),
    ...all('img', (o) => !o.complete || !o.naturalWidth),
    ...all('main :is(img, svg, table, pre, math)', (o) => wide(o, width) && (box(o).tagName == 'MAIN' || wide(box(o), width))),
    ...all('main math', (o) => o.getBoundingClientRect().width < 3 || o.getBoundingClientRect().height < 3),
    ...all('merror, .math', () => true)];
})()"""
cut = """[...document.querySelectorAll('main pre.sourceCode')].filter((o) => o.scrollWidth > o.clientWidth)
  .filter((o) => Math.max(...o.innerText.split('\\n').map((l) => l.length)) <= 110).map((o) => o.innerText)"""


# Whether the entry of the open page is in the part of the sidebar that is on the screen.
in_sight = """new Promise((done) => requestAnimationFrame(() => setTimeout(() => {
  const {top, bottom} = document.querySelector('#quarto-sidebar a.active').getBoundingClientRect();
  done(top >= document.querySelector('#quarto-header').offsetHeight && bottom <= innerHeight);
})))"""


def by_sidebar(window, site, page):
    "Go to a page by its entry in the sidebar of the open one, or of the home page where another site is open; where that leads."
    if not window.run('location.href').startswith(site.as_uri()): window.open(site/'index.html', 1300)
    window.shape(1300)
    entry = "[...document.querySelectorAll('#quarto-sidebar a[href]')].find((o) => o.href == '%s').getAttribute('href')"
    return window.click(f'#quarto-sidebar a[href="{window.run(entry % built(site, page).as_uri())}"]')


@pytest.mark.parametrize('page', every, ids=[o.name for o in every])
def test_a_browser_shows_the_page(window, site, page):
    "On a desk and on a phone: no complaint, nothing from the network, nothing missing or off the screen; lines of 110 characters fit the desk."
    assert by_sidebar(window, site, page) == built(site, page).as_uri()
    assert window.run("document.querySelector('h1').innerText") == page.cells[0].source.splitlines()[0][2:]
    assert window.run(broken) == [] and window.run(cut) == [] and window.errors == []
    assert window.run(in_sight)
    asked = window.requests
    window.open(built(site, page), 390, 'dark')
    assert window.run(broken) == [] and window.errors == []
    assert len(window.requests) > 4 and {o.split(':')[0] for o in asked + window.requests} <= {'file', 'data'}


@pytest.mark.parametrize('body, fault', [
    ('<img src="no.png">', 'img: <img'),
    ('<p style="width: 900px">far</p>', 'html: '),
    ('<pre style="width: 900px; position: fixed">far</pre>', '<pre style'),
    ('<p>so $$x^2$$ is</p>', 'formula: so'),
    (r'<p>so \(x\) is</p>', 'formula: so'),
    (r'<p>\frac{a}{b}</p>', 'formula: '),
    ('<span class="math inline">x</span>', 'math: <span'),
    ('<math style="display: none"><mi>x</mi></math>', 'math: <math'),
    ('<script>no.such.name</script>', 'no is not defined'),
    ('<script>console.error("lost", 3)</script>', 'lost 3'),
    ('<script src="no.js"></script>', 'ERR_FILE_NOT_FOUND')])
def test_a_browser_finds_what_is_broken(window, tmp_path, body, fault):
    page = tmp_path/'page.html'
    head = '<!doctype html><meta name="viewport" content="width=device-width"><main>'
    page.write_text(head + '<p>well <code>$$ \\alpha</code> <math><mi>x</mi></math> <img src="data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7">')
    window.open(page, 390)
    assert window.run(broken) == [] and window.errors == []
    page.write_text(head + body)
    window.open(page, 390)
    found = window.run(broken) + window.errors
    assert any(fault in o for o in found), found


@pytest.mark.parametrize('body', ['<a href="other.html" style="position: absolute; left: 50px; top: 50px">x</a>',
                                  '<svg width="99" height="99"><a href="other.html"><rect width="99" height="99"/></a></svg>'])
def test_a_click_goes_to_what_is_on_top(window, tmp_path, body):
    page, other = tmp_path/'page.html', tmp_path/'other.html'
    cover = '<a href="page.html" style="position: fixed; inset: 0; z-index: 1">over it</a>'
    other.write_text('<p>x')
    for over, target in ('', other), (cover, page):
        page.write_text(body + over)
        window.open(page, 1300)
        assert window.click('[href="other.html"]') == target.as_uri()


field = '.smalldocs-search input'
search = """(async () => {
  const found = () => [...document.querySelectorAll('.search-result')].map((o) => o.getAttribute('href'));
  for (let i = 0; i < 50 && !found().length; i++) await new Promise((done) => setTimeout(done, 50));
  return found();
})()"""


def look_up(window, words):
    "Addresses that the search offers for some words."
    window.type(field, words)
    return window.run(search)


@pytest.mark.parametrize('start', ['index.html', 'studies/00_learning.html'])
def test_search_leads_to_what_is_defined(window, site, start):
    "From a folder, where a browser reads no json."
    for word, target in ('nms_keep', '00_boxes.html#boxes.nms_keep'), ('cell_anchors', '30_anchors.html#anchors.cell_anchors'):
        window.open(site/start, 1300)
        found, = (o for o in look_up(window, word) if o.endswith(target))
        assert window.click(f'.search-result[href="{found}"]') == f'{site.as_uri()}/{target}'
    window.open(site/start, 1300)
    assert look_up(window, 'random') and window.errors == []
    window.open(site/start, 1300)
    assert look_up(window, 'xyzzyq') == []


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
    look_up(window, 'anchors')
    result = '.smalldocs-search input, .search-result-title, .search-result-section, .search-result-text, .search-result-text mark'
    for what in result.split(', ') + ['main p', 'main td', 'main pre code', 'main math', '#TOC a', '#quarto-sidebar a']:
        found = window.run(contrast % what)
        assert found and min(found) > 3.5, (what, min(found))


@pytest.mark.parametrize('width', [1300, 390])
def test_the_sidebar_leads_to_every_page(window, site, width):
    window.open(site/'70_checkpoints.html', width)
    if width == 390: window.run("document.querySelector('.quarto-btn-toggle').click()")
    assert window.run(in_sight)
    links = window.run("[...document.querySelectorAll('#quarto-sidebar a[href]')].map((o) => o.href)")
    assert {built(site, o).as_uri() for o in every} <= set(links)
    top = window.run("document.querySelector('#quarto-sidebar').getBoundingClientRect().top")
    assert top >= window.run("document.querySelector('#quarto-header').offsetHeight") > 0
    assert window.click('#quarto-sidebar a[href$="30_anchors.html"]') == (site/'30_anchors.html').as_uri()


def test_the_picture_leads_to_the_parts(window, site):
    "On a desk and on a phone one drawing is shown: a mouse on any of its boxes is on a link, and its words are large enough."
    for width, kind in (1300, 'wide'), (390, 'phone'):
        window.open(site/'index.html', width)
        shown = "[...document.querySelectorAll('.drawings svg')].filter((o) => o.clientWidth).map((o) => o.classList[1])"
        assert window.run(shown) == [kind]
        size = "((o) => o.getScreenCTM().a * parseFloat(getComputedStyle(o).fontSize))(document.querySelector('.drawings .%s text'))"
        assert window.run(size % kind) >= 12
        links = window.run(f"[...document.querySelectorAll('.drawings .{kind} a')].map((o) => o.getAttribute('href'))")
        assert len(links) == len(set(links)) > 12
        for link in links:
            place = window.run(browser.corner % f"'.drawings .{kind} a[href=\"{link}\"]'")
            under = f"document.elementFromPoint({place['x']}, {place['y']}).closest('a').getAttribute('href')"
            assert window.run(under) == link
        assert window.click(f'.drawings .{kind} a[href="{links[0]}"]') == (site/links[0]).as_uri()
