"""How fast a folder is indexed, beside Pillow's `open` of the same files, and what the index of 1.3 million files costs: python benchmarks/index.py

Copies of one noisy photo of about 110 KB are written to a temporary folder, 100 for each class; after that they lie in memory (page cache).
Two arms take turns in every round: `index_folder` in this process with no index there (list of the folder, times, headers, table), and
`Image.open(path).size` of a list of paths. Figures are medians over rounds, images per second of CPU time.
The large table is made of names that do not exist. A worker computes all sizes and 1,300 paths from it; what only it has is its memory."""
import argparse, io, os, statistics, tempfile, time, warnings
warnings.simplefilter('ignore')
from functools import partial
from pathlib import Path
import numpy as np
from PIL import Image
from fastai_fastimagenet.index import ImageIndex, index_folder
from fastai_fastimagenet.table import index_dtype, open_index, save_index
from fastai_fastimagenet.photos import render
from fastai_fastimagenet.pool import WorkerPool
from setting import setting_line

def jpeg():
    "A photo with as much noise as gives 110 KB"
    a = np.asarray(render(3, short=375)[0].resize((500,375)))+np.random.default_rng(0).normal(0, 18, (375,500,3))
    out = io.BytesIO()
    Image.fromarray(a.clip(0, 255).astype(np.uint8)).save(out, 'jpeg', quality=93)
    return out.getvalue()

def write_files(folder, n):
    data = jpeg()
    for i in range(n):
        (folder/f'n{i//100:08}').mkdir(exist_ok=True)
        (folder/f'n{i//100:08}/n{i//100:08}_{i}.JPEG').write_bytes(data)
    return len(data)

def ours(folder, files):
    (folder/'.fastimagenet_index.npy').unlink(missing_ok=True)
    return len(index_folder(folder, workers=0))

def again(folder, files): return len(index_folder(folder, workers=0))

def pillow(folder, files):
    for f in files:
        with Image.open(f) as im: im.size
    return len(files)

def private_memory():
    return sum(int(l.split()[1])/1e3 for l in open('/proc/self/smaps_rollup') if l.startswith(('Private_Clean','Private_Dirty')))

def use(idx):
    before = private_memory()
    kept = idx.sizes(),[idx.path(i) for i in range(0, len(idx), 1000)]
    return private_memory()-before

def large(folder, n=1_300_000):
    rows = np.zeros(n, index_dtype(34))
    rows['name'] = np.char.mod('n01440764/n01440764_%08d.JPEG', np.arange(n))
    rows['width'],rows['height'] = 500,375
    file = save_index(folder, rows)
    began = time.perf_counter()
    idx = ImageIndex(folder, open_index(file), file, [])
    opened = time.perf_counter()
    idx.table['kind'].max() # Every page is read once, as when an index is compared with its folder
    read,mb = time.perf_counter(),[f'{o:.0f} MB' for o in WorkerPool(partial(use, idx), 2).run([(),()])]
    print(f'{n:,} rows, {file.stat().st_size/1e6:.0f} MB: opened in {1e3*(opened-began):.1f} ms, read through in {1e3*(read-opened):.0f} ms; '
          f'memory of each of two workers: {", ".join(mb)}')

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--images', type=int, default=4000)
    p.add_argument('--rounds', type=int, default=9)
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder: large(Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        size = write_files(folder, args.images)
        files = [str(f) for f in folder.rglob('*.JPEG')]
        rates = {f: [] for f in (ours, again, pillow)}
        for i in range(args.rounds+1): # The first round only warms up
            for f,v in rates.items():
                began = time.process_time()
                n = f(folder, files)
                if i: v.append(n/(time.process_time()-began))
        for f,v in rates.items(): print(f'{f.__name__:6} {statistics.median(v):9,.0f} images/s of CPU time ({min(v):,.0f} to {max(v):,.0f})')
        print(f'{args.images} files of {size/1e3:.0f} KB, {args.rounds} rounds; {setting_line()}')
