"The house: layers, one source of metadata, notebooks and modules and README in step"
import ast, re, shutil, subprocess, sys
from configparser import ConfigParser
from importlib.metadata import metadata, entry_points, requires
from pathlib import Path

root = Path(__file__).parents[1]
pkg = root/'fastai_fastimagenet'
ini = ConfigParser(delimiters=['='])
ini.read(root/'settings.ini')
cfg = ini['DEFAULT']

def layers():
    "Module name -> number of its notebook, e.g. {'schedule': 2}"
    found = {nb: re.search(r'#\| *default_exp:? *([\w.]+)', nb.read_text()) for nb in (root/'nbs').rglob('[0-9]*.ipynb')}
    return {m[1]: int(re.match(r'\d+', nb.name)[0]) for nb,m in found.items() if m}

def imports(mod):
    "Modules of this package that `mod` imports"
    for n in ast.walk(ast.parse((pkg/(mod.replace('.','/')+'.py')).read_text())):
        if isinstance(n, ast.Import): names = [a.name for a in n.names]
        elif isinstance(n, ast.ImportFrom):
            base = [pkg.name, *mod.split('.')[:-n.level]] if n.level else []
            name = '.'.join([*base, *([n.module] if n.module else [])])
            names = [name, *(f'{name}.{a.name}' for a in n.names)]
        else: continue
        yield from (o.split('.',1)[1] for o in names if o.startswith(pkg.name+'.'))

def test_imports_are_seen(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), 'pkg', tmp_path/'fastai_fastimagenet')
    (tmp_path/'fastai_fastimagenet').mkdir()
    (tmp_path/'fastai_fastimagenet/a.py').write_text('import fastai_fastimagenet.b\nfrom fastai_fastimagenet import c\n'
                                                     'from . import d\nfrom .e import *\nimport torch')
    assert {'b','c','d','e'} <= set(imports('a'))

def test_imports_point_down():
    num = layers()
    assert len(num)>=15
    for mod,n in num.items():
        deps = [d for d in imports(mod) if d in num]
        for d in deps:
            assert num[d]<n, f'{mod} ({n:02}) imports {d} ({num[d]:02}): import only from a lower number'
            assert not num[d]//10==n//10==2, f'{mod} imports {d}: tricks never import each other; split out what both need'

def test_every_module_has_a_notebook():
    own = {'.'.join(p.relative_to(pkg).with_suffix('').parts) for p in pkg.rglob('*.py') if p.stem not in ('__init__','_modidx','all')}
    assert own==set(layers())

def test_modules_are_small():
    long = {m: n for m in layers() if (n:=len((pkg/f'{m.replace(".","/")}.py').read_text().splitlines()))>250}
    assert not long, f'past 250 lines two ideas share a module: {long}'

def test_metadata_has_one_source():
    import fastai_fastimagenet
    m = metadata(cfg['lib_name'])
    assert m['Version']==cfg['version']==fastai_fastimagenet.__version__
    assert m['Summary']==cfg['description'] and m['License-Expression' if 'License-Expression' in m else 'License']==cfg['license']
    assert m['Requires-Python']=='>='+cfg['min_python']
    assert {r for r in requires(cfg['lib_name']) if 'extra ==' not in r}==set(cfg['requirements'].split())
    scripts = {f'{e.name}={e.value}' for e in entry_points(group='console_scripts') if e.value.startswith(pkg.name)}
    assert scripts==set(cfg['console_scripts'].split())
    assert '[project]' not in (root/'pyproject.toml').read_text()

def copy_of_repo(tmp_path):
    files = subprocess.run(['git','ls-files','-co','--exclude-standard'], cwd=root, capture_output=True, text=True, check=True).stdout.split()
    for f in files:
        if (root/f).exists():
            (tmp_path/f).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root/f, tmp_path/f)
    return tmp_path

def run(cmd, cwd):
    exe = Path(sys.executable).parent/cmd
    subprocess.run([exe], cwd=cwd, check=True, capture_output=True)

def test_notebooks_and_modules_agree(tmp_path):
    copy = copy_of_repo(tmp_path)
    run('nbdev-export', copy)
    for f in pkg.rglob('*.py'):
        assert (copy/f.relative_to(root)).read_text()==f.read_text(), f'{f.name} is not what its notebook says: run nbdev-export or nbdev-update'

def test_notebooks_are_clean(tmp_path):
    copy = copy_of_repo(tmp_path)
    run('nbdev-clean', copy)
    for f in (root/'nbs').rglob('*.ipynb'):
        assert (copy/f.relative_to(root)).read_text()==f.read_text(), f'{f.name}: run nbdev-clean'

def test_notebooks_tell_a_story():
    for f in (root/'nbs').rglob('[0-9]*.ipynb'):
        text = f.read_text()
        assert re.search(r'"source": \[\s*"# ', text), f'{f.name} has no title'
        assert not re.search(r'(?<!\w)/(root|home|tmp|work|usr)/\w', text), f'{f.name} shows a path of the machine it ran on'

def test_readme_is_made_from_index():
    sys.path.insert(0, str(root/'nbs'))
    from make_readme import llms, readme
    assert (root/'README.md').read_text()==readme() and (root/'llms.txt').read_text()==llms(), 'run python nbs/make_readme.py'

def test_ci_runs_the_command_of_the_readme():
    cmds = re.findall(r'```sh\n(.+)\n```', (root/'README.md').read_text())
    assert cmds[1].endswith('nbdev-test') and cmds[1] in (root/'.ci/run').read_text()
    assert all('\n' not in c for c in cmds[:2])

def test_all_has_the_public_names():
    ns = {}
    exec('from fastai_fastimagenet.all import *', ns)
    readme = (root/'README.md').read_text()
    for name in ('ProgressiveResize','DynamicBatchSize','LRWarmup','BNWeightDecayExclusion','RectValidation','rect_dl','to_any_size',
                 'Phase','Schedule','recipes','TimeToAccuracy'):
        assert name in ns and name in readme
    assert all(getattr(v, '__doc__', None) for k,v in ns.items() if getattr(v, '__module__', '').startswith(pkg.name))
