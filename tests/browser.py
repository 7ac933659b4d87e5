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
        if name == 'Runtime.exceptionThrown': self.errors.append(about['exceptionDetails']['text'])
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

    def open(self, path, width, scheme='light'):
        "Load a file in a window of so many pixels, light or dark, to the end."
        self.call('Emulation.setEmulatedMedia', features=[dict(name='prefers-color-scheme', value=scheme)])
        self.call('Emulation.setDeviceMetricsOverride', width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        self.arrive(lambda: self.call('Page.navigate', url=path.resolve().as_uri()))

    def click(self, what):
        "Follow a link, given as a selector; where it leads."
        self.arrive(lambda: self.run(f'document.querySelector({json.dumps(what)}).click()'))
        return self.run('location.href')

    def arrive(self, go):
        "Leave for another page and wait until it is loaded."
        self.requests, self.errors, self.events = [], [], []
        go()
        while 'Page.loadEventFired' not in self.events: self.note(self.message())

    def run(self, script):
        "The value of a piece of JavaScript; promises are awaited."
        answer = self.call('Runtime.evaluate', expression=script, returnByValue=True, awaitPromise=True)
        if 'exceptionDetails' in answer: raise RuntimeError(answer['exceptionDetails']['exception']['description'])
        return answer['result'].get('value')
