"Make README.md from index.ipynb: `python nbs/make_readme.py`"
import re
from pathlib import Path
import nbformat
from nbconvert import MarkdownExporter

nbs = Path(__file__).parent

def readme()->str:
    "index.ipynb as Markdown, with links that work from the root of the repository"
    nb = nbformat.read(nbs/'index.ipynb', 4)
    nb.metadata['language_info'] = dict(name='python')
    nb.cells = [c for c in nb.cells if not c.source.startswith('#| hide')]
    for c in nb.cells:
        if c.cell_type=='code': c.outputs = [o for o in c.outputs if o.get('name')!='stderr' and 'text/plain' in o.get('data', {})]
    text,_ = MarkdownExporter().from_notebook_node(nb)
    text = re.sub(r'\]\(([\w.]+\.ipynb)\)', r'](nbs/\1)', text)
    return re.sub(r'\n{3,}', '\n\n', text).strip()+'\n'

if __name__=='__main__': (nbs.parent/'README.md').write_text(readme())
