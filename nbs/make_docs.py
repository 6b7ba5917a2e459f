"""Make the documentation site from the notebooks: `python nbs/make_docs.py [FOLDER]`, by default into _docs

Exported cells become tables of what functions take and return; other cells stay as they are, with their outputs. Sphinx with the theme furo makes pages of that.
A link that leads nowhere ends it with an error."""
import argparse, ast, importlib, inspect, re, shutil, sys, tempfile, warnings
from pathlib import Path
import nbformat
from nbconvert import MarkdownExporter
warnings.simplefilter('ignore')

nbs = Path(__file__).parent
groups = {'Tutorials': r'9\d_tutorial\.', 'Measured': r'91_', 'The table': r'0[1-4]_', 'Images and models': r'1\d_', 'Tricks': r'2\d_', 'Training': r'(30_|31_fixres|33_|39_|4\d_(?!cluster))',
          'Plans': r'(31|32|34)_|65_', 'Clusters': r'\d\d_cluster\.', 'Inside': r'0\d_'}
extra = ['CHANGELOG.md','CONTRIBUTING.md']
first = ['90_tutorial.imagenette','90_tutorial.planning','90_tutorial.distributed','90_tutorial.rectangles','90_tutorial.cluster','90_tutorial.imagenet','90_tutorial.moving']

conf = '''
project,author = 'fastai_fastimagenet','fastai_fastimagenet contributors'
extensions = ['myst_parser']
html_theme,html_title = 'furo','fastai_fastimagenet'
myst_heading_anchors,myst_enable_extensions = 3,['html_image']
suppress_warnings = ['misc.highlighting_failure','myst.header']
html_show_sphinx,html_copy_source,html_use_index = False,False,False
html_static_path,html_css_files = ['.'],['site.css']
'''
css = 'table.dataframe, .content table { font-size: .85em; } .sidebar-brand-text { font-size: 1.15rem; }'

def names(cell):
    "Public names that an exported cell defines, e.g. 'plan' or 'Learner.fit_phases'"
    for d in ast.parse(re.sub(r'^\s*[!%].*', '', cell.source, flags=re.M)).body:
        if not isinstance(d, (ast.FunctionDef,ast.ClassDef)) or d.name[0]=='_': continue
        patched = any(ast.unparse(o).startswith('patch') for o in d.decorator_list)
        yield f'{ast.unparse(d.args.args[0].annotation)}.{d.name}' if patched else d.name

def api(mod, name):
    "What `name` of `mod` takes and returns, as Markdown; its public methods that have a docstring too"
    from nbdev.showdoc import BasicMarkdownRenderer, show_doc
    owner,_,attr = name.rpartition('.')
    obj = getattr(getattr(mod, owner), attr) if owner else getattr(mod, name)
    parts = [(name,obj)]
    if inspect.isclass(obj): parts += [(f'{name}.{k}',v) for k,v in vars(obj).items() if k[0]!='_' and inspect.isfunction(v) and v.__doc__ and v.__module__==mod.__name__]
    text = []
    for n,o in parts:
        md = str(show_doc(o, renderer=BasicMarkdownRenderer, name=n, title_level=3 if o is obj else 4)._repr_markdown_())
        md = re.sub(r'^(---\s*|\[source\].*\n)*', '', md.strip()).strip()
        text.append(re.sub(r'fastai_fastimagenet\.[\w.]+\.(\w+)', r'\1', md).replace(':NoneType=None', '=None'))
    return '\n\n'.join(text)

def page(f):
    "Notebook `f` as Markdown, with its pictures {file name: bytes}"
    nb = nbformat.read(f, 4)
    nb.metadata['language_info'] = dict(name='python')
    target = re.search(r'#\|\s*default_exp\s+([\w.]+)', '\n'.join(c.source for c in nb.cells))
    mod = importlib.import_module('fastai_fastimagenet.'+target[1]) if target else None
    cells = []
    for c in nb.cells:
        flags = set(re.findall(r'^#\|\s*(\w+)', c.source, re.M)) if c.cell_type=='code' else set()
        if flags & {'hide','default_exp'}: continue
        if flags & {'export','exports'}:
            docs = [api(mod, n) for n in names(c)]
            if docs: cells.append(nbformat.v4.new_markdown_cell('\n\n'.join(docs)))
            continue
        if 'echo' in flags: c.source = ''
        c.source = re.sub(r'^#\|.*\n?', '', c.source, flags=re.M)
        if c.cell_type=='code':
            c.outputs = [o for o in c.outputs if o.get('name')!='stderr']
            if not c.source.strip() and not c.outputs: continue
        cells.append(c)
    if target: cells.insert(1, nbformat.v4.new_markdown_cell(f'Module `fastai_fastimagenet.{target[1]}`'))
    nb.cells = cells
    text,res = MarkdownExporter().from_notebook_node(nb, dict(output_files_dir=f'{f.stem}_files'))
    text = re.sub(r'```python\n\s*```', '', text)
    def link(m): return f']({m[1]}.md{m[2] or ""})' if (nbs/f'{m[1]}.ipynb').exists() else m[0]
    return re.sub(r'\]\(([\w.]+?)\.(?:html|ipynb)(#[\w-]+)?\)', link, text).replace('](../', ']('),res['outputs']

def toc(files):
    "Tables of contents by group, for the first page"
    left,res = sorted(f.stem for f in files if f.stem!='index'),[]
    for title,pattern in groups.items():
        own = [s for s in left if re.match(pattern, s)]
        left = [s for s in left if s not in own]
        own.sort(key=lambda s: (first.index(s) if s in first else len(first), s))
        res.append('\n'.join(['```{toctree}',':hidden:',f':caption: {title}',*own,'```']))
    assert not left, f'in no group: {left}'
    res.append('\n'.join(['```{toctree}',':hidden:',':caption: About',*(Path(n).stem for n in extra),'```']))
    return '\n\n'.join(res)

def make(out):
    "The site, in folder `out`"
    from sphinx.cmd.build import build_main
    files = sorted(f for f in nbs.glob('*.ipynb') if f.name[0]!='_')
    with tempfile.TemporaryDirectory() as src:
        src = Path(src)
        for f in files:
            text,pictures = page(f)
            if f.stem=='index': text += '\n\n'+toc(files)
            (src/f'{f.stem}.md').write_text(text)
            for name,b in pictures.items():
                (src/name).parent.mkdir(exist_ok=True)
                (src/name).write_bytes(b)
        for f in (*nbs.glob('*.json'),*(nbs.parent/n for n in extra)): shutil.copy(f, src)
        shutil.copytree(nbs/'images', src/'images')
        (src/'conf.py').write_text(conf)
        (src/'site.css').write_text(css)
        status = build_main(['-W','--keep-going','-q','-b','html',str(src),str(out)])
    if not status: print(f'The site: {out/"index.html"}')
    return status

if __name__=='__main__':
    p = argparse.ArgumentParser(description='Make the documentation site from the notebooks')
    p.add_argument('out', nargs='?', type=Path, default=nbs.parent/'_docs', help='folder; _docs by default')
    sys.exit(make(p.parse_args().out))
