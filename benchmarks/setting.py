"Where and with what a benchmark ran"
import os, platform, subprocess, sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_names = 'torch torchvision fastai pillow simplejpeg numpy timm ffcv numba'.split()

def _versions():
    for n in _names:
        try: yield n,version(n)
        except PackageNotFoundError: pass

def setting()->dict: # For JSON
    "Arguments, commit, hardware and versions; a commit ends in -dirty if files were changed"
    cpu = next((l.split(':')[1].strip() for l in open('/proc/cpuinfo') if l.startswith('model name')), '') if os.path.exists('/proc/cpuinfo') else ''
    commit = subprocess.run(['git','describe','--always','--dirty'], cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    return dict(argv=sys.argv[1:], commit=commit, cpu=cpu or platform.processor(), cores=os.cpu_count(), python=platform.python_version(), versions=dict(_versions()))

def setting_line()->str:
    "The same in a line of text"
    s = setting()
    return f'{s["cpu"]}, {s["cores"]} cores, Python {s["python"]}, {", ".join(f"{k} {v}" for k,v in s["versions"].items())}, commit {s["commit"]}, {" ".join(s["argv"])}'
