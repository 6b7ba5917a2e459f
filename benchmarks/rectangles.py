"""What rectangles gain in validation and in training: python benchmarks/rectangles.py --json rectangles.json

Photos, network and recipe are those of the control in time_to_accuracy.py: fastai's one-cycle, label smoothing, Adam.
For each seed two networks are trained for as many epochs, one on squares of 112 pixels, one with `RectTraining` on rectangles of 96 pixels
short side, which have about as many pixels, and batches of about as many pictures; how many they were is counted. Both are judged at the same test sizes.
Validation, on the network trained on squares: centre crop, rectangles of the same short side, and five crops (corners and centre, predictions
averaged), with the CPU time of each, loading included. Differences are paired by seed; the interval is Student's, of 95 %."""
import os
os.environ |= dict(OMP_NUM_THREADS='1')
import argparse, json, math, statistics, subprocess, sys, time, warnings
warnings.simplefilter('ignore')
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from scipy import stats
from fastai.vision.all import *
from fastai_fastimagenet.all import *
from fastai_fastimagenet.core import FitCallback
import time_to_accuracy as tta

square,rect,epochs,lr,test_sizes = 112,96,8,8e-3,(112,128,144)

class CountPixels(FitCallback):
    run_valid = False
    def before_fit(self): self.pixels = self.pictures = self.steps = 0
    def before_batch(self): self.pixels,self.pictures,self.steps = self.pixels+self.x.numel()//3,self.pictures+len(self.x),self.steps+1

def five_crops(im, size=128, crop_pct=.875):
    "Corners and centre of a picture, decoded once"
    side = min(im.size)*crop_pct
    places = [(dx*(im.width-side),dy*(im.height-side)) for dx,dy in ((0,0),(1,0),(0,1),(1,1),(.5,.5))]
    return [im.resize((size,size), Image.BILINEAR, box=(l,t,l+side,t+side)) for l,t in places]

def centre_crop(im, size=128): return five_crops(im, size)[4:]

def rect_crop(shape, im):
    crop = RectCrop(min(shape))
    crop.shape = shape
    return [crop(im, split_idx=1)]

def pillow(learn, crops, batches):
    "Top-1 of the averaged predictions for crops made with Pillow, and CPU milliseconds for a picture; no fastai in between"
    norm,model,right,n = learn.dls.valid.after_batch,learn.model.eval(),0,0
    began = time.process_time()
    for files,labels,*shape in batches:
        ims = [crops(*shape, Image.open(f).convert('RGB')) for f in files]
        x = norm(TensorImage(torch.from_numpy(np.stack([np.array(v) for o in ims for v in o])).permute(0,3,1,2)))
        with torch.no_grad(): p = model(x).softmax(1).view(len(files), -1, tta.n_class).mean(1)
        right,n = right+int((p.argmax(1)==labels).sum()),n+len(files)
    return right/n,1000*(time.process_time()-began)/n

def evaluate(learn, dls_):
    "Top-1 of the averaged predictions, and CPU milliseconds for a picture"
    began = time.process_time()
    with learn.no_bar(), learn.no_logging(): preds = [learn.get_preds(dl=dl) for dl in dls_]
    return float(accuracy(sum(p for p,_ in preds), preds[0][1])), 1000*(time.process_time()-began)/len(preds[0][1])

def one(seed, kind):
    torch.set_num_threads(1)
    default_device(False)
    path = photos(tta.n_train, tta.n_val)
    set_seed(seed)
    learn,count = tta.our_learner(path, bs=32 if kind=='square' else round(32*(square/rect)**2), size=square if kind=='square' else rect),CountPixels()
    clock = tta.Clock()
    class NoValid(Callback):
        def before_validate(self): raise CancelValidException()
    with learn.no_bar(), learn.no_logging(), clock:
        learn.remove_cb(Recorder)
        learn.fit_one_cycle(epochs, lr, cbs=[count, NoValid(), *([RectTraining()] if kind=='rect' else [])])
    res = dict(seed=seed, kind=kind, cpu=clock.cpu, pixels=count.pixels, pictures=count.pictures, steps=count.steps)
    ways = {f'{name} {s}': [f(learn.dls, s)] for s in test_sizes for name,f in (('centre',centre_dl), ('rect',rect_dl))}
    for dls_ in ways.values(): dls_[0].one_batch()
    res |= {k: evaluate(learn, v) for k,v in ways.items()}
    if kind=='square':
        items,dl = learn.dls.valid_ds.items,rect_dl(learn.dls, 128)
        plain,rects = learn.dls.valid.batches(range(len(items))),dl.batches(dl.get_idxs())
        def of(batches): return [([items[i] for i in b],tensor(items.labels[list(b)]),*([s] if s else [])) for b,s in batches]
        for _ in range(2): # The first time only warms up
            res |= {'Pillow centre 128': pillow(learn, centre_crop, of(plain)), 'Pillow rect 128': pillow(learn, rect_crop, of(rects)),
                    'Pillow five 128': pillow(learn, five_crops, of(plain))}
    return res

def interval(v):
    half = stats.t.ppf(.975, len(v)-1)*statistics.stdev(v)/math.sqrt(len(v))
    return f'{statistics.mean(v):+.2f} ({statistics.mean(v)-half:+.2f} to {statistics.mean(v)+half:+.2f})'

def show(rows):
    of = {k: sorted((r for r in rows if r['kind']==k), key=lambda r: r['seed']) for k in ('square','rect')}
    for k,rs in of.items(): print(f'{k:7} {len(rs)} seeds, {statistics.mean(r["pixels"] for r in rs)/1e6:.0f} million pixels of {rs[0]["pictures"]} pictures in {rs[0]["steps"]} steps, CPU {tta.spread([r["cpu"] for r in rs])} s')
    print('\ntop-1, %, mean over seeds     squares  rectangles  difference, paired (95 %)')
    for way in (k for k in of['rect'][0] if k[0] in 'cr' and ' ' in k):
        a,b = ([100*r[way][0] for r in of[k]] for k in ('square','rect'))
        print(f'tested with {way:16} {statistics.mean(a):9.2f} {statistics.mean(b):10.2f}   {interval([y-x for x,y in zip(a, b)])}')
    print('\nvalidation, same networks (trained on squares): top-1 %, CPU time')
    for a,b in (('rect 128','centre 128'), ('Pillow rect 128','Pillow centre 128'), ('Pillow rect 128','Pillow five 128'), ('rect 112','Pillow five 128')):
        d = [100*(r[a][0]-r[b][0]) for r in of['square']]
        print(f'{a} - {b}: {interval(d)} points, {statistics.median(r[b][1]/r[a][1] for r in of["square"]):.1f} times as many pictures per second')
    for k in of['square'][0]:
        if ' ' in k: print(f'{k:18} {statistics.mean(100*r[k][0] for r in of["square"]):6.2f} %  {statistics.median(r[k][1] for r in of["square"]):6.2f} ms')

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--json', type=Path, default='rectangles.json')
    p.add_argument('--seeds', type=int, default=6)
    p.add_argument('--one', nargs=2)
    args = p.parse_args()
    if args.one:
        print(json.dumps(one(int(args.one[0]), args.one[1])))
        sys.exit()
    photos(tta.n_train, tta.n_val)
    def run(job): # Two at a time
        r = subprocess.run([sys.executable, __file__, '--one', *map(str, job)], capture_output=True, text=True)
        if r.returncode: raise RuntimeError(f'{job}: {r.stderr}')
        return json.loads(r.stdout.splitlines()[-1])
    with ThreadPoolExecutor(2) as pool: rows = list(pool.map(run, [(s,k) for s in range(args.seeds) for k in ('square','rect')]))
    show(rows)
    args.json.write_text(json.dumps(dict(setting=tta.of_task(), runs=rows), indent=1))
