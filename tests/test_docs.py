"What a stranger meets: the site and its links, a wheel without the checkout, and the commands of README and tutorials as they are printed"
import json, os, re, shutil, subprocess, sys, threading, time, urllib.request, zipfile
from html.parser import HTMLParser
from pathlib import Path
import pytest
from procs import kill_all, start
from test_layout import copy_of_repo, root

bin = Path(sys.executable).parent

class Links(HTMLParser):
    "What a page links to, and the places in it that can be linked to"
    def __init__(self, file):
        super().__init__()
        self.to,self.ids = [],set()
        self.feed(file.read_text())
    def handle_starttag(self, tag, attrs):
        for k,v in attrs:
            if k in ('href','src') and v: self.to.append(v)
            if k=='id': self.ids.add(v)

def test_site(tmp_path):
    "It is built without a warning, every link inside leads somewhere, and what `all` exports is described with its parameters"
    subprocess.run([sys.executable,root/'nbs/make_docs.py',tmp_path], check=True, cwd=tmp_path)
    pages = {f: Links(f) for f in tmp_path.glob('*.html')}
    assert {f.stem for f in (root/'nbs').glob('*.ipynb')} <= {f.stem for f in pages}
    for f,p in pages.items():
        for to in p.to:
            if re.match(r'\w+:|//', to): continue
            name,_,place = to.partition('#')
            target = (f.parent/name.partition('?')[0]).resolve() if name else f
            assert target.exists(), f'{f.name}: {to}'
            if place and target in pages: assert place in pages[target].ids, f'{f.name}: {to}'
    text = '\n'.join(f.read_text() for f in pages)
    names = re.findall(r'\w+', ' '.join(re.findall(r'^from \.\w+ import (.+)$', (root/'fastai_fastimagenet/all.py').read_text(), re.M)))
    missing = [n for n in names if not re.search(rf'<h\d>{n}<', text) and n not in ('recipes','profiles')]
    assert len(names)>40 and not missing

@pytest.fixture(scope='module')
def outside(tmp_path_factory):
    "A folder with an environment that has the wheel, and its requirements from this one, but not the checkout; returns the folder and the variables"
    work = tmp_path_factory.mktemp('outside')
    (work/'repo').mkdir()
    copy_of_repo(work/'repo')
    subprocess.run([sys.executable,'-m','build','--no-isolation','--outdir',work,work/'repo'], check=True, capture_output=True) # The wheel is made from the source distribution
    shutil.rmtree(work/'repo')
    wheel = next(work.glob('*.whl'))
    subprocess.run([sys.executable,'-m','venv','--without-pip',work/'.venv'], check=True)
    subprocess.run([sys.executable,'-m','pip','--python',work/'.venv/bin/python','install','-q','--no-deps',wheel], check=True)
    for name,mod in (('torchrun','torch.distributed.run'), ('tensorboard','tensorboard.main'), ('accelerate','accelerate.commands.accelerate_cli')):
        exe = work/'.venv/bin'/name
        exe.write_text(f'#!{work}/.venv/bin/python\nimport sys\nfrom {mod} import {"run_main" if name=="tensorboard" else "main"} as main\nsys.exit(main())\n')
        exe.chmod(0o755)
    site = next(p for p in sys.path if p.endswith('site-packages'))
    env = dict(PYTHONPATH=site, PATH=f'{work}/.venv/bin:{os.environ["PATH"]}', FASTAI_HOME=str(work/'home'), MPLBACKEND='agg')
    assert sub(work, env, 'python -c "import fastai_fastimagenet as f; print(f.__file__)"').startswith(str(work/'.venv'))
    return work,env

def sub(work, env, command):
    r = subprocess.run(command, shell=True, cwd=work, env={**os.environ, **env}, capture_output=True, text=True, timeout=400)
    assert r.returncode==0, f'{command}\n{r.stdout[-1500:]}\n{r.stderr[-3000:]}'
    return r.stdout

def test_wheel_is_complete(outside):
    work,env = outside
    names = zipfile.ZipFile(next(work.glob('*.whl'))).namelist()
    for f in (root/'fastai_fastimagenet').rglob('*'):
        if f.suffix in ('.py','.pyi','.csv','.sh') or f.name=='py.typed': assert str(f.relative_to(root)) in names, f
    for n in ('train','presize','plan','report','cluster','doctor'):
        assert sub(work, env, f'fastimagenet-{n} --version').startswith('fastai_fastimagenet ')
    shown = sub(work, env, 'fastimagenet-train --help')
    assert len(shown.splitlines())<=40 and shown.count('fastimagenet-train --')>=2 # One screen, with examples

def printed(file):
    "Commands in the shell blocks of a notebook or a page of Markdown"
    text = '\n\n'.join(''.join(c['source']) for c in json.loads(file.read_text())['cells']) if file.suffix=='.ipynb' else file.read_text()
    blocks = re.findall(r'```sh\n(.*?)```', text, re.S)
    return [re.sub(r'\s+# .*', '', l).strip() for b in blocks for l in b.splitlines() if l.strip()]

# Trained until the first epoch is there; a real run takes minutes or hours
_long = ('fastimagenet-train','fastai_fastimagenet.launch','torchrun','accelerate','script.py')
_not_here = {'pip install': 'the network', 'fastimagenet-cluster': 'AWS, or a simulation: test_cluster_cli', 'unzip ': 'ImageNet', 'mv ILSVRC': 'ImageNet', 'aws ec2': 'AWS',
             '--nnodes 2': 'two machines', '--actual runs/imagenet': '8 GPUs', '--data imagenette': 'the network', '--data imagenet ': 'ImageNet', 'nbs/make_docs.py': 'the checkout: test_site', 'nbdev-': 'the checkout'}

_epoch = r' *\d+ +\d+\.?\d* +\d' # A line of a log

def _until_first_epoch(command, work, env):
    "Start `command`, wait for its first epoch, end it as an operator does"
    p = start('bash', '-c', f'exec {command} 2>errors', env={**env, 'PYTHONUNBUFFERED':'1'})
    late = threading.Timer(300, kill_all, [p])
    late.start()
    try:
        seen,ok = '',None
        for line in p.stdout:
            seen += line
            if ok := re.match(_epoch, line): break
        assert ok, f'{command}\n{seen[-1500:]}\n{(work/"errors").read_text()[-3000:]}'
        p.terminate()
        try: p.wait(60)
        except subprocess.TimeoutExpired: pass
    finally:
        late.cancel()
        kill_all(p)

def test_commands_as_printed(outside, small_photos, monkeypatch):
    "Those of the README and the tutorials, in their order; DIR is a small folder"
    work,env = outside
    monkeypatch.chdir(work)
    few = sub(work, env, 'python -c "from fastai_fastimagenet.photos import photos; print(photos(64, 20, short=64))"').split()[-1]
    for name in ('DIR','imagenet'): (work/name).symlink_to(few)
    cells = [''.join(c['source']) for c in json.loads((root/'nbs/index.ipynb').read_text())['cells'] if c['cell_type']=='code']
    (work/'script.py').write_text(next(c for c in cells if 'learn.ddp()' in c))
    sub(work, env, 'python -c "from fastai_fastimagenet.recipes import recipes; recipes[\'photos\'].save(\'mine.json\')"')
    seen,done = set(),[]
    for file in (root/'README.md',*sorted((root/'nbs').glob('90_tutorial.*.ipynb'))):
        for command in printed(file):
            command = command.rpartition('&& ')[2] if 'fastimagenet-train' in command else command # What comes before made the environment
            if any(k in command for k in _not_here) or command in seen: continue
            seen.add(command)
            real = command.replace('/data/imagenet', str(work/'DIR')).replace(' ARGS', '').replace('.venv/bin/', f'{work}/.venv/bin/').replace('--nproc-per-node 8', '--nproc-per-node 2')
            real = re.sub(r'runs/\w+', 'runs/mine', real)
            if 'tensorboard' in command: _serves(real, work, env)
            elif any(k in command for k in _long): _until_first_epoch(real, work, env)
            else: sub(work, env, real)
            done.append(command)
    assert len(done)>=18, done

def _serves(command, work, env):
    p = start('bash', '-c', f'exec {command} --port 16123', env=env)
    try:
        for _ in range(120):
            try:
                with urllib.request.urlopen('http://localhost:16123', timeout=5) as r: assert r.status==200; return
            except OSError: time.sleep(.5)
        raise AssertionError(f'{command} did not answer')
    finally: kill_all(p)
