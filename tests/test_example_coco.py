"The pages that read a data set from files hold on real images too, where `SCRATCHDET_COCO` names them."
import os
import subprocess
import sys

import pytest
from pages import every, root

from scratchdet.coco import coco_subset

users = [o.path for o in every if any('example_coco' in c.names for c in o.code)]


def test_no_page_takes_files_elsewhere():
    "One seam: a page calls `example_coco`, and none reads the variable itself but the one that defines it."
    assert len(users) >= 4
    readers = [o.name for o in every if any('SCRATCHDET_COCO' in c.source for c in o.code)]
    assert readers == ['02_toy']


@pytest.mark.long
@pytest.mark.parametrize('path', users, ids=[o.stem for o in users])
def test_a_page_holds_on_real_images(path, coco_mini, tmp_path):
    small = coco_subset(coco_mini, tmp_path/'small', images=24, val_images=10)
    env = {**os.environ, 'SCRATCHDET_COCO': str(small), 'OMP_NUM_THREADS': '2'}
    done = subprocess.run([sys.executable, root/'tools/notebooks.py', 'try', path], cwd=root, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
