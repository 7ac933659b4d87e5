"What all tests share: the folders of reference numbers and real images, and the marker of slow tests."
import os
from pathlib import Path

import pytest

root = Path(__file__).resolve().parents[1]


def pytest_configure(config):
    config.addinivalue_line('markers', 'slow: takes a minute; run by `make slow`, left out otherwise')
    config.addinivalue_line('markers', 'long: takes many minutes; run by `make long`, left out otherwise')
    named = any('::' in o for o in config.args)
    if not config.option.markexpr and not named: config.option.markexpr = 'not slow and not long'


def shared(variable, default):
    "The folder that `variable` names; without it the test is skipped, or fails under SCRATCHDET_REQUIRE_SHARED=1."
    path = Path(os.environ.get(variable, root/default))
    if path.is_dir(): return path
    message = f'{path} is not there; set {variable} to a folder as CONTRIBUTING.md describes it'
    if os.environ.get('SCRATCHDET_REQUIRE_SHARED') == '1': pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(scope='session')
def reference():
    "Folder of the vectors computed with mmdetection and detectron2."
    return shared('SCRATCHDET_REFERENCE', '../shared/reference')


@pytest.fixture(scope='session')
def coco_mini():
    "Folder of a small part of COCO, laid out as COCO."
    return shared('SCRATCHDET_COCO', '../shared/coco-mini')


@pytest.fixture(scope='module')
def one_thread():
    "Results to the last bit are those of one thread, as in the processes that tests start."
    import torch
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    "No test writes into the user's cache."
    monkeypatch.setenv('SCRATCHDET_CACHE', str(tmp_path/'cache'))
