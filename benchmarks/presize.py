"""How fast smaller copies are made: python benchmarks/presize.py

Photos of about 500x375 pixels become copies of 160 and 352 pixels, quality 90. Arms take turns in every round: ours with one process and with two,
as JPEG and raw, and Pillow (full decode, LANCZOS, save) in one process. Each writes into a folder of its own, in memory, and nothing is removed before
the end: for minutes after many files were removed, ext4 makes new ones slowly (it spares their inodes), and two processes wait for each other.
Figures are medians over rounds, in pictures per second, and per second of CPU time of all processes, which says more on a busy machine.
Ratios are medians of the ratios in each round."""
import os
os.environ['OMP_NUM_THREADS'] = '1'
import argparse, io, resource, statistics, tempfile, time
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from PIL import Image
import torch
from fastai_fastimagenet.photos import photos
from fastai_fastimagenet.presize import presize
from setting import setting_line

def pillow(src, dst, shorts=(160,352)):
    "What most scripts do"
    for f in src.rglob('*.jpg'):
        im = Image.open(f).convert('RGB')
        for s in shorts:
            out = dst/str(s)/f.relative_to(src)
            out.parent.mkdir(parents=True, exist_ok=True)
            k = min(1, s/min(im.size))
            im.resize((round(im.width*k),round(im.height*k)), Image.LANCZOS).save(out, quality=90)

def ours(src, dst, **kwargs):
    with redirect_stdout(io.StringIO()): presize(src, dst, **kwargs)

def cpu(): return sum(u.ru_utime+u.ru_stime for u in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))

def ratio(a, b, k):
    r = [x[k]/y[k] for x,y in zip(rates[a], rates[b])]
    return f'{statistics.median(r):.2f} ({min(r):.2f} to {max(r):.2f})'

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--pictures', type=int, default=1000)
    p.add_argument('--rounds', type=int, default=5)
    p.add_argument('--folder', default='/dev/shm', help='for the photos and copies: about 1 MB for each picture and round')
    args = p.parse_args()
    torch.set_num_threads(1)
    arms = {'ours, 1 process': partial(ours, workers=1), 'ours, 2 processes': partial(ours, workers=2), 'ours, 2 processes, raw': partial(ours, workers=2, format='raw'),
            'ours, 1 process, 160 only': partial(ours, workers=1, short=160), 'Pillow': pillow, 'Pillow, 160 only': partial(pillow, shorts=(160,))}
    rates = {k: [] for k in arms}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        src = photos(args.pictures, 1, short=375, path=Path(folder)/'src')
        for i in range(args.rounds+1): # The first round only warms up
            for k,f in arms.items():
                dst = Path(folder)/f'copies{i}'/k
                began = time.perf_counter(),cpu()
                f(src, dst)
                if i: rates[k].append([(args.pictures+1)/(t-b) for t,b in zip((time.perf_counter(),cpu()), began)])
    for k,v in rates.items(): print(f'{k:26}', ', '.join(f'{statistics.median(o):4.0f} ({min(o):.0f} to {max(o):.0f}) {unit}' for o,unit in zip(zip(*v), ('pictures/s','per CPU second'))))
    for a,b in (('ours, 2 processes','ours, 1 process'), ('ours, 1 process','Pillow'), ('ours, 1 process, 160 only','Pillow, 160 only')):
        print(f'{a} / {b}: {ratio(a, b, 0)}, per CPU second {ratio(a, b, 1)}')
    print(f'{args.rounds} rounds of {args.pictures+1} pictures; {setting_line()}')
