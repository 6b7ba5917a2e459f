"Make README.md from index.ipynb, its picture from a benchmark, and llms.txt from the heads of all notebooks: `python nbs/make_readme.py`"
import json, re
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
    text = re.sub(r'\]\(([\w.]+\.ipynb|images/)', r'](nbs/\1', text).replace('](../', '](')
    return re.sub(r'\n{3,}', '\n\n', text).strip()+'\n'

def llms()->str:
    "What there is, a line for each notebook, for language models (llmstxt.org)"
    text,titles = readme(),dict(zip(('Tutorials','Modules','Measured'), ([],[],[])))
    intro = re.search(r'> .*?\n\n(.*?)\n\n', text, re.S)
    for f in sorted(nbs.glob('[0-9]*.ipynb')):
        head = nbformat.read(f, 4).cells[0].source
        title,what = re.search(r'# (.*)', head)[1],re.search(r'^> (.*)', head, re.M)[1]
        titles['Tutorials' if '_tutorial' in f.name else 'Measured' if f.name[:2]=='91' else 'Modules'].append(f'- [{title}](nbs/{f.name}): {what}')
    return '\n\n'.join([text.split('\n\n')[0], text.split('\n\n')[1], intro[1], '- [README](README.md): commands, examples, all callbacks',
                        *(f'## {k}\n\n'+'\n'.join(v) for k,v in titles.items())])+'\n'

def picture():
    "Accuracy against CPU time of four ways to train, from benchmarks/results/time_to_accuracy.json"
    import pandas as pd
    from matplotlib.figure import Figure
    res = json.loads((nbs.parent/'benchmarks/results/time_to_accuracy.json').read_text())
    runs,fig = pd.DataFrame(res['runs']),Figure((7,3.2), layout='constrained')
    ax = fig.subplots()
    for arm,label,color in (('full','this package','C3'), ('control','fastai with our loader and loss','C1'), ('torchvision','torchvision\'s loop','C7'), ('fastai','fastai','C0')):
        of = runs[runs.arm==arm].groupby('epochs')
        m,lo,hi = of[['cpu','centre']].median(),100*of.centre.min(),100*of.centre.max()
        ax.errorbar(m.cpu, 100*m.centre, [100*m.centre-lo,hi-100*m.centre], fmt='o-', ms=4, lw=1.5, elinewidth=.7, capsize=2, color=color, label=label)
        for n,r in m.iterrows(): ax.annotate(f'{n}', (r.cpu,100*r.centre), xytext=(4,-10), textcoords='offset points', fontsize=7, color=color)
    ax.axhline(100*res['setting']['target'], color='gray', lw=.7, ls=':')
    ax.set(xlim=(0,270), xlabel='CPU seconds of training, loading included', ylabel='top-1, %', title='4,000 photos, 20 classes, 128 px; median and range of 5 seeds, numbers are epochs')
    ax.title.set_fontsize(9)
    ax.legend(fontsize=8, loc='lower right')
    fig.savefig(nbs/'images/time_to_accuracy.png', dpi=110, metadata={'Software':None})

if __name__=='__main__':
    picture()
    (nbs.parent/'README.md').write_text(readme())
    (nbs.parent/'llms.txt').write_text(llms())
