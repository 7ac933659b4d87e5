"Fail unless a tag such as `v0.1.0` names what is here: the version in settings.ini and in the package, and a heading with a date in CHANGELOG.md."
import re
import sys
from configparser import ConfigParser
from pathlib import Path


def faults(tag, root):
    "What does not fit the tag, one line each."
    config = ConfigParser(delimiters=['='])
    config.read(root/'settings.ini', encoding='utf-8')
    version = config['DEFAULT']['version']
    package = re.search(r"__version__ = ['\"](.+)['\"]", (root/'scratchdet/__init__.py').read_text(encoding='utf-8'))[1]
    heading = next(iter(re.findall(r'^## (.*)', (root/'CHANGELOG.md').read_text(encoding='utf-8'), re.M)), '')
    found = [] if tag == f'v{version}' else [f'the tag is {tag}, settings.ini has version {version}']
    if package != version: found.append(f'scratchdet/__init__.py has {package}, settings.ini {version}: make export')
    if not re.fullmatch(rf'{re.escape(version)}, \d{{4}}-\d\d-\d\d', heading):
        found.append(f'CHANGELOG.md begins with "{heading}", not with "{version}, YYYY-MM-DD"')
    return found


if __name__ == '__main__':
    if len(sys.argv) != 2: sys.exit('usage: python tools/release.py TAG')
    if found := faults(sys.argv[1], Path(__file__).resolve().parents[1]): sys.exit('\n'.join(found))
    print(f'{sys.argv[1]} can be released')
