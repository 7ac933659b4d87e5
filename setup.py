"Everything about the package stands in settings.ini; this file only hands it to setuptools."
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

config = ConfigParser(delimiters=['='])
config.read('settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
git = f"{cfg['git_url']}/%s/{cfg['branch']}/"

readme = Path('README.md').read_text(encoding='utf-8')  # links into the repository become addresses, for package indexes
readme = re.sub(r'(\]\()(?!https?:|#)', r'\g<1>' + git % 'blob', readme)
readme = re.sub(r'((?:src|srcset)=")(?!https?:)', r'\g<1>' + git % 'raw', readme)

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'], license='Apache-2.0',
    package_dir={'': '.'},  # an editable install adds this folder to the path, so that a clone's folder hides nothing
    packages=find_packages(include=['scratchdet', 'scratchdet.*']),
    install_requires=cfg['requirements'].split(), extras_require={'dev': cfg['dev_requirements'].split()},
    python_requires='>=' + cfg['min_python'],
    classifiers=['Development Status :: 3 - Alpha', 'Intended Audience :: Developers', 'Intended Audience :: Science/Research',
                 *(f'Programming Language :: Python :: {o}' for o in ('3.10', '3.11', '3.12'))],
    entry_points={'nbdev': [f'{cfg["lib_path"]}={cfg["lib_path"]}._modidx:d']},
    long_description=readme, long_description_content_type='text/markdown',
    project_urls={'Documentation': cfg['doc_host'] + cfg['doc_baseurl']}, zip_safe=False)
