"Models of others: commands that read a model from a folder or over HTTP from a Hub, which here is a small server."
import hashlib
import os
import shutil
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import torch
from huggingface_hub import ModelCard

from scratchdet import hub
from scratchdet.detector import mask_rcnn
from scratchdet.hub import Detector
from scratchdet.predict import main, parse_args
from scratchdet.toy import make_toy, toy_names

commit = 'c' * 40


@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    return make_toy(tmp_path_factory.mktemp('toy')/'toy', train=1, val=2, size=(64, 96))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    torch.manual_seed(0)
    model = mask_rcnn(len(toy_names), blocks=(1, 1, 1, 1), width=16, channels=32, fc=32, groups=4, max_dets=5)
    model.meta = dict(category_ids=list(range(1, 7)), category_names=list(toy_names), short_side=64, long_side=96)
    return model.save_pretrained(tmp_path_factory.mktemp('hub')/'model')


@pytest.fixture
def server(folder, monkeypatch):
    "The folder as USER/NAME of a Hub; a list of what was asked for."
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self, body=True):
            asked.append(self.path)
            repo, _, name = self.path.lstrip('/').partition('/resolve/main/')
            known = repo == 'USER/NAME' and (folder/name).is_file()
            data = (folder/name).read_bytes() if known else b''
            self.send_response(200 if known else 404)
            for k, v in {'X-Repo-Commit': commit, 'ETag': f'"{hashlib.sha256(data).hexdigest()}"', 'Content-Length': len(data),
                         **({} if known else {'X-Error-Code': 'EntryNotFound' if repo == 'USER/NAME' else 'RepoNotFound'})}.items():
                self.send_header(k, str(v))
            self.end_headers()
            if body: self.wfile.write(data)

        def do_HEAD(self): self.do_GET(body=False)
        def log_message(self, *_): pass

    with ThreadingHTTPServer(('127.0.0.1', 0), Handler) as http:
        Thread(target=http.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{http.server_port}', asked
        http.shutdown()


def test_a_model_is_read_over_http(server, folder, toy, tmp_path):
    "What the command finds with hf://USER/NAME is what it finds with the folder; a name that is not there is one line."
    address, asked = server
    env = {**os.environ, 'HF_ENDPOINT': address, 'HF_HOME': str(tmp_path/'hf'), 'HF_HUB_DISABLE_XET': '1', 'HF_HUB_OFFLINE': '0'}
    def predict(weights):
        words = [toy/'val2017', '--weights', weights, '--out', tmp_path/'there', '--score', 0, '--cpu', '--quiet']
        return subprocess.run([sys.executable, '-m', 'scratchdet.predict', *map(str, words)], capture_output=True, text=True, env=env, timeout=300)
    done = predict('hf://USER/NAME')
    assert done.returncode == 0, done.stderr
    assert {o for o in asked if o.startswith('/USER/')} == {'/USER/NAME/resolve/main/model.safetensors'}
    main(parse_args([str(toy/'val2017'), '--weights', str(folder), '--out', str(tmp_path/'here'), '--score', '0', '--cpu', '--quiet']))
    there, here = ((tmp_path/o/'predictions.json').read_bytes() for o in ('there', 'here'))
    assert there == here and b'"score"' in here
    done = predict('hf://USER/OTHER')
    assert done.returncode == 1 and done.stderr.startswith('scratchdet.predict: USER/OTHER: neither a file or folder here')
    assert len(done.stderr.splitlines()) == 1


def test_from_pretrained_over_http(server, folder, tmp_path):
    address, asked = server
    code = ("import sys; from scratchdet.hub import Detector; model = Detector.from_pretrained('USER/NAME');"
            "print(model.meta['category_names'], model.save_pretrained(sys.argv[1]))\n"
            "try: Detector.from_pretrained('USER/OTHER')\nexcept OSError as e: print(e)")
    env = {**os.environ, 'HF_ENDPOINT': address, 'HF_HOME': str(tmp_path/'hf'), 'HF_HUB_DISABLE_XET': '1', 'HF_HUB_OFFLINE': '0'}
    done = subprocess.run([sys.executable, '-c', code, str(tmp_path/'again')], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    assert str(list(toy_names)) in done.stdout and 'USER/OTHER: neither a file or folder here, nor a model on the Hub' in done.stdout
    for name in ('model.safetensors', 'config.json', 'README.md'):
        assert (tmp_path/'again'/name).read_bytes() == (folder/name).read_bytes()


def test_a_path_is_never_asked_for_on_the_network(monkeypatch, tmp_path):
    def refuse(*args, **kwargs): raise AssertionError('asked for')
    monkeypatch.setattr(hub, 'hf_hub_download', refuse)
    words = [str(tmp_path), '--out', str(tmp_path/'out'), '--cpu', '--weights']
    for source in ('runs/mine', str(tmp_path/'none.safetensors'), str(tmp_path)):
        with pytest.raises(SystemExit, match='does not exist'): main(parse_args([*words, source]))
    with pytest.raises(AssertionError, match='asked for'): main(parse_args([*words, 'hf://runs/mine']))


def test_the_mixin_reads_folders(folder, tmp_path, monkeypatch):
    "Also a run's, which has no config.json, by a path that no model on the Hub can have."
    run = shutil.copytree(folder, tmp_path/'run 1')
    (run/'config.json').unlink()
    monkeypatch.chdir(tmp_path)
    assert hub.HubModel.from_pretrained('run 1').meta == Detector.from_pretrained('run 1').meta == Detector.from_pretrained(folder).meta


def test_no_name_is_no_weights(folder, monkeypatch, tmp_path):
    "Not even where the current folder holds some."
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match="'' names no weights: give a file, a folder, or hf://USER/NAME"): Detector.from_pretrained('')
    with pytest.raises(SystemExit, match="scratchdet.predict: '' names no weights"): main(parse_args([str(tmp_path), '--out', str(tmp_path/'out'), '--weights', '']))


@pytest.mark.parametrize('at, says', [('notes.txt', 'notes.txt is a file: give a folder'), ('/proc/x', '/proc/x is no folder to write into')])
def test_a_folder_that_cannot_be_made_is_named(folder, tmp_path, at, says):
    (tmp_path/'notes.txt').write_text('kept')
    with pytest.raises(OSError, match=says): Detector.from_pretrained(folder).save_pretrained(tmp_path/at)
    assert (tmp_path/'notes.txt').read_text() == 'kept'


def test_a_revision_is_passed_on(monkeypatch, folder):
    asked = []
    def download(*args, **kwargs): return asked.append((args, kwargs)) or str(folder/'model.safetensors')
    monkeypatch.setattr(hub, 'hf_hub_download', download)
    assert Detector.from_pretrained('hf://USER/NAME@v2').meta['short_side'] == 64
    assert asked == [(('USER/NAME', 'model.safetensors'), dict(revision='v2'))]


def test_a_model_without_meta_has_a_card(tmp_path):
    model = mask_rcnn(2, blocks=(1, 1, 1, 1), width=8, channels=16, fc=16, groups=4)
    card = ModelCard.load(model.save_pretrained(tmp_path/'m')/'README.md')
    assert card.data.library_name == 'scratchdet' and '0, 1' in card.text and 'Nothing was measured' in card.text
