"Chromium without a window, told what to do over two pipes: no driver and no package are needed."
import json
import os
import select
import shutil
import subprocess
import tempfile

program = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
quiet = ('--headless', '--no-sandbox', '--disable-gpu', '--no-first-run', '--disable-background-networking',
         '--disable-component-update', '--disable-sync', '--disable-quic', '--hide-scrollbars', '--remote-debugging-pipe')

# A point of the first line of an element, after scrolling there and once it stands still; what lies over it would get the mouse.
corner = """(async () => {
  const element = document.querySelector(%s);
  element.scrollIntoView({block: 'center', behavior: 'instant'});
  for (let before, now; ; before = now) {
    const {x, y, width, height} = element.getClientRects()[0];
    now = {x: x + Math.min(width / 2, 20), y: y + height / 2};
    if (before && before.x == now.x && before.y == now.y) return now;
    await new Promise((done) => setTimeout(done, 30));
  }
})()"""


def thrown(details):
    "What a script has thrown, in words."
    return details.get('exception', {}).get('description', details['text'])


class Browser:
    "One tab of a fresh Chromium; `requests` and `errors` collect what the open page asked for and complained of."
    def __enter__(self):
        ours, theirs = os.pipe(), os.pipe()
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.count, self.requests, self.errors, self.events = 0, [], [], []

        def pipes():
            "Chromium reads commands from file 3 and writes answers to file 4."
            read, write = os.dup(ours[0]), os.dup(theirs[1])
            os.dup2(read, 3)
            os.dup2(write, 4)
        command = [program, *quiet, f'--user-data-dir={self.folder.name}', 'about:blank']
        silent = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.process = subprocess.Popen(command, preexec_fn=pipes, close_fds=False, **silent)
        os.close(ours[0])
        os.close(theirs[1])
        self.write, self.read, self.rest = ours[1], theirs[0], b''
        self.session = None
        target = self.call('Target.createTarget', url='about:blank')['targetId']
        self.session = self.call('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
        for domain in ('Page', 'Network', 'Runtime', 'Log'): self.call(f'{domain}.enable')
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()
        os.close(self.write)
        os.close(self.read)
        self.folder.cleanup()

    def message(self):
        "The next message; messages end with a zero byte."
        while b'\0' not in self.rest:
            if not select.select([self.read], [], [], 60)[0]: raise RuntimeError(f'{program} says nothing for a minute')
            new = os.read(self.read, 1 << 20)
            if not new: raise RuntimeError(f'{program} has ended')
            self.rest += new
        text, self.rest = self.rest.split(b'\0', 1)
        return json.loads(text)

    def note(self, said):
        "Keep what an event tells."
        name, about = said['method'], said.get('params', {})
        self.events.append(name)
        if name == 'Network.requestWillBeSent': self.requests.append(about['request']['url'])
        if name == 'Runtime.exceptionThrown': self.errors.append(thrown(about['exceptionDetails']))
        if name == 'Runtime.consoleAPICalled' and about['type'] in ('error', 'assert'):
            self.errors.append(' '.join(str(o.get('value', o.get('description', o['type']))) for o in about['args']))
        if name == 'Log.entryAdded' and about['entry']['level'] == 'error': self.errors.append(about['entry']['text'])

    def call(self, method, **params):
        "The answer to a command of the DevTools protocol."
        self.count += 1
        order = dict(id=self.count, method=method, params=params)
        if self.session: order['sessionId'] = self.session
        os.write(self.write, json.dumps(order).encode() + b'\0')
        while (said := self.message()).get('id') != self.count: self.note(said)
        if 'error' in said: raise RuntimeError(f'{method}: {said["error"]["message"]}')
        return said['result']

    def shape(self, width, scheme='light'):
        "Make the window so many pixels wide, light or dark."
        self.call('Emulation.setEmulatedMedia', features=[dict(name='prefers-color-scheme', value=scheme)])
        self.call('Emulation.setDeviceMetricsOverride', width=width, height=900, deviceScaleFactor=1, mobile=width < 600)

    def open(self, path, width, scheme='light'):
        "Load a file in a window of such a shape, to the end."
        self.shape(width, scheme)
        self.arrive(lambda: self.call('Page.navigate', url=path.resolve().as_uri()))

    def click(self, what):
        "Press the mouse on a link, given as a selector; where it leads."
        place = self.run(corner % json.dumps(what))
        press = dict(button='left', clickCount=1, **place)
        kinds = 'mousePressed', 'mouseReleased'
        self.arrive(lambda: [self.call('Input.dispatchMouseEvent', type=o, **press) for o in kinds])
        return self.run('location.href')

    def type(self, what, words):
        "Write into a field, given as a selector."
        self.run(f'document.querySelector({json.dumps(what)}).focus()')
        self.call('Input.insertText', text=words)

    def arrive(self, go):
        "Leave for another page and wait until it is loaded."
        self.requests, self.errors, self.events = [], [], []
        go()
        while 'Page.loadEventFired' not in self.events: self.note(self.message())

    def run(self, script):
        "The value of a piece of JavaScript; promises are awaited."
        answer = self.call('Runtime.evaluate', expression=script, returnByValue=True, awaitPromise=True)
        if 'exceptionDetails' in answer: raise RuntimeError(thrown(answer['exceptionDetails']))
        return answer['result'].get('value')
