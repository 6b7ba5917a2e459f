"""CPU seconds to an accuracy, of several ways to train: python benchmarks/time_to_accuracy.py --json FILE [--data DIR --target .9]

All arms train the same network (`resnet_small`, 0.7 million parameters) on the same pictures for a whole number of epochs, and are then
judged alike, at 128 pixels, with the centre crop and on rectangles. What counts is the CPU time of the fit with loading (one thread, no
workers, without evaluation) in the shortest fit of the arm whose median accuracy over the seeds reaches the target.

  fastai      `ImageDataLoaders`, Adam, cross entropy, `fit_one_cycle` at 128 pixels: what the documentation of fastai shows
  torchvision a plain PyTorch loop in the manner of torchvision's references: `ImageFolder`, SGD, linear warm-up and cosine
  control     fastai's `fit_one_cycle` at 128 pixels with all that the full method uses and that is no trick of it:
              the loader, channels_last, label smoothing; Adam, as in all arms of fastai
  full        the control's parts with the phase table: small pictures first, a linear warm-up and descent, milder crops at the end
              (fastai's Adam decays no batch norms anyway)
  full - X    without one of them; the number of epochs is that of the full method, so accuracy and time are both to be compared
  full + X    with one thing more; the batch of 64 is for the small pictures, with twice the learning rate

Everything above the line "counted" was fixed before the first counted run: arms, grids of the learning rate, epochs, target, seeds.
Learning rates were chosen by `--tune`: the best accuracy of a seed that does not count, from three values for each arm. The best of torchvision and
of full was the largest of the three, and those beyond, tried later, were worse (.4: 84.6 % in 9 epochs; .032: 84.1 % in 7); SGD in the full method takes that of torchvision. Fits of 7 epochs of fastai and torchvision took the place of
those of 9 when the first seeds showed that 8 are enough.
Each run is a process of its own, two at a time on two cores, in an order drawn at random for each seed. In every step of every arm the learning
rate of the optimizer is compared with what the schedule says; a difference ends the run."""
import os
os.environ |= dict(OMP_NUM_THREADS='1')
import argparse, itertools, json, math, random, statistics, sys, time, warnings
warnings.simplefilter('ignore')
from pathlib import Path
import torch, torchvision
from torchvision.transforms import v2
from fastai.vision.all import *
from fastai_fastimagenet.all import *
from setting import setting
from two_at_a_time import run_all
from fastai_fastimagenet.fit import phase_cbs

size,scale = 128,.35 # Of evaluation and of full-size training; the smallest crop
n_train,n_val,n_class = 4000,1000,20 # Of the photos

def n_classes(path): return sum(o.is_dir() for o in (path/'train').iterdir())

# The phase table of the full method for `n` epochs, and its variations
def table(n, lr, sizes=(64,96,128), bs=(32,32,32), shares=(.5,.3,.2), warm=True, min_scale=(.35,.35,.5)):
    ends = [round(n*sum(shares[:k])) for k in range(len(shares)+1)]
    w = max(1, n//5) if warm else 0
    def line(e): # Highest after the warm-up, then down to 0
        return lr*(.1+.9*e/w) if e<w else lr*(n-e)/(n-w)
    cuts = sorted({*ends, w, n})
    of = lambda e: next(i for i in range(len(sizes)) if ends[i]<=e<ends[i+1])
    def phase(a, b):
        i = of(a)
        f = bs[i]/bs[-1]
        return Phase(b-a, sizes[i], bs[i], (f*line(a),f*line(b)), min_scale=min_scale[i])
    return Schedule([phase(a, b) for a,b in zip(cuts, cuts[1:])])

class CheckLR(FitCallback):
    "Compare the learning rate in each step with `prescribed(position in epochs)`"
    order,run_valid = 100,False
    def __init__(self, prescribed): self.prescribed,self.n = prescribed,0
    def before_step(self):
        want,used = self.prescribed(self.learn.pct_train*self.learn.n_epoch),self.opt.hypers[-1]['lr']
        assert abs(used-want)<=1e-9+1e-6*want, f'step {self.n}: the optimizer used {used}, the schedule says {want}'
        self.n += 1

def one_cycle(n, lr): # As `fit_one_cycle` does
    f = combined_cos(.25, lr/25, lr, lr/1e5)
    return lambda e: f(e/n)

sgd = partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9, weight_decay=1e-4)

class Clock:
    def __enter__(self): self.began = time.process_time(),time.perf_counter()
    def __exit__(self, *args): self.cpu,self.wall = time.process_time()-self.began[0],time.perf_counter()-self.began[1]

def fit_fastai(path, n, lr):
    dls = ImageDataLoaders.from_folder(path, valid='val', bs=32, num_workers=0, item_tfms=[RandomResizedCrop(size, min_scale=scale), FlipItem()],
                                       batch_tfms=Normalize.from_stats(*imagenet_stats))
    learn = Learner(dls, resnet_small(n_classes(path)))
    with learn.no_bar(), learn.no_logging(): run(learn, lambda cbs: learn.fit_one_cycle(n, lr, cbs=cbs), one_cycle(n, lr))
    return learn.model,learn.clock

def run(learn, fit, prescribed):
    "Fit without evaluation, with the clock running"
    learn.remove_cb(Recorder)
    class NoValid(Callback):
        def before_validate(self): raise CancelValidException()
    learn.clock,check = Clock(),CheckLR(prescribed)
    with learn.clock: fit([check, NoValid()])
    assert check.n

def our_learner(path, bs=32, smooth=.1, channels_last=True, blur=False, opt=Adam, size=size):
    dls = imagenet_dls(path, size, bs, min_scale=scale, workers=0)
    model = resnet_small(n_classes(path))
    if blur: add_blur(model)
    if channels_last: model = model.to(memory_format=torch.channels_last)
    loss = LabelSmoothingCrossEntropyFlat(smooth) if smooth else CrossEntropyLossFlat()
    return Learner(dls, model, loss, opt_func=opt)

def fit_control(path, n, lr, **kwargs):
    learn = our_learner(path, **kwargs)
    with learn.no_bar(), learn.no_logging(): run(learn, lambda cbs: learn.fit_one_cycle(n, lr, cbs=cbs), one_cycle(n, lr))
    return learn.model,learn.clock

def fit_full(path, n, lr, cbs=(), smooth=.1, channels_last=True, blur=False, opt=Adam, **kwargs):
    sched = table(n, lr, **kwargs)
    learn = our_learner(path, sched.at(0).bs, smooth, channels_last, blur, opt, sched.at(0).size)
    extra = [c() for c in cbs]
    def fit(more): learn.fit(n, cbs=phase_cbs(sched)+extra+more)
    with learn.no_bar(), learn.no_logging(): run(learn, fit, lambda e: sched.at(round(e, 9)).lr)
    return learn.model,learn.clock

def fit_torchvision(path, n, lr):
    norm = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(*imagenet_stats)]
    ds = torchvision.datasets.ImageFolder(path/'train', v2.Compose([v2.RandomResizedCrop(size, (scale,1)), v2.RandomHorizontalFlip(), *norm]))
    dl = torch.utils.data.DataLoader(ds, 32, shuffle=True, drop_last=True)
    model,loss = resnet_small(n_classes(path)),nn.CrossEntropyLoss()
    opt = torch.optim.SGD(model.parameters(), lr, momentum=.9, weight_decay=1e-4)
    total,warm = n*len(dl),max(1, n//5)*len(dl)
    def at(k): return lr*((.01+.99*k/warm) if k<warm else .5*(1+math.cos(math.pi*(k-warm)/(total-warm))))
    sched = torch.optim.lr_scheduler.LambdaLR(opt, lambda k: at(k)/lr)
    clock,k = Clock(),0
    with clock:
        for _ in range(n):
            for x,y in dl:
                loss(model(x), y).backward()
                assert abs(opt.param_groups[0]['lr']-at(k))<1e-9
                opt.step()
                opt.zero_grad()
                sched.step()
                k += 1
    return model,clock

class Blurred(nn.Module):
    "A layer with a stride that sees a blurred picture (arxiv.org/abs/1904.11486)"
    def __init__(self, layer, n):
        super().__init__()
        k = torch.tensor([1.,2,1])
        self.layer,self.n = layer,n
        self.register_buffer('k', (k[:,None]*k/16).expand(n, 1, 3, 3).contiguous())
    def forward(self, x): return self.layer(F.conv2d(F.pad(x, (1,)*4, mode='replicate'), self.k, groups=self.n))

def add_blur(model):
    for m in list(model.modules()):
        for name,c in m.named_children():
            if isinstance(c, nn.Conv2d) and c.stride[0]==2 and c.in_channels>3: setattr(m, name, Blurred(c, c.in_channels))

def accuracies(model, path):
    "Top-1 with the centre crop and on rectangles"
    learn = Learner(imagenet_dls(path, size, 50, workers=0), model, CrossEntropyLossFlat(), metrics=accuracy)
    with learn.no_bar(), learn.no_logging(): return [learn.validate(dl=dl)[1] for dl in (learn.dls.valid, rect_dl(learn.dls, size))]

# ---- counted: fixed before the first counted run

target = .86 # Top-1 with the centre crop, median of the seeds
seeds,tune_seeds = range(5),(100,)
n_full = 8 # Epochs of the variations
arms = { # Name: function, learning rate, numbers of epochs, arguments
    'fastai': (fit_fastai, 8e-3, (8,7), {}),
    'torchvision': (fit_torchvision, .2, (8,7), {}),
    'control': (fit_control, 8e-3, (6,7,8), {}),
    'full': (fit_full, 1.6e-2, (7,8,9), {}),
    'full - small pictures': (fit_full, 1.6e-2, (n_full,), dict(sizes=(128,)*3)),
    'full - warm-up': (fit_full, 1.6e-2, (n_full,), dict(warm=False)),
    'full - milder crops': (fit_full, 1.6e-2, (n_full,), dict(min_scale=(.35,)*3)),
    'full - label smoothing': (fit_full, 1.6e-2, (n_full,), dict(smooth=0)),
    'full - channels_last': (fit_full, 1.6e-2, (n_full,), dict(channels_last=False)),
    'full + averaged weights': (fit_full, 1.6e-2, (n_full,), dict(cbs=(partial(WeightEMA, .99),))),
    'full + larger batches': (fit_full, 1.6e-2, (n_full,), dict(bs=(64,32,32))),
    'full + blur': (fit_full, 1.6e-2, (n_full,), dict(blur=True)),
    'full + rectangles': (fit_full, 1.6e-2, (n_full,), dict(cbs=(RectTraining,))),
    'full + SGD for Adam': (fit_full, .2, (n_full,), dict(opt=sgd))}
grids = {'fastai': (4e-3,8e-3,1.6e-2), 'torchvision': (.05,.1,.2), 'control': (4e-3,8e-3,1.6e-2), 'full': (4e-3,8e-3,1.6e-2)} # For --tune
tune_epochs = {'fastai': 8, 'torchvision': 9, 'control': 7, 'full': 7}

# ---- running

def one_run(data, arm, n, seed, lr):
    "In a process of its own: what is counted, as JSON"
    torch.set_num_threads(1)
    default_device(False)
    f,_,_,kwargs = arms[arm]
    path = data or photos(n_train, n_val)
    set_seed(seed)
    model,clock = f(path, n, lr, **kwargs)
    centre,rect = accuracies(model, path)
    return dict(arm=arm, epochs=n, seed=seed, lr=lr, cpu=clock.cpu, wall=clock.wall, centre=centre, rect=rect)

def counted():
    "All counted runs, in random order for each seed: the arms of more than one length without their last, the variations, the last"
    def part(k, s): return [(arm,n,s,lr) for arm,(_,lr,ns,_) in arms.items() for n in (ns[:-1], ns*(len(ns)==1), ns[-1:]*(len(ns)>1))[k]]
    return [j for k in range(3) for s in seeds for j in random.Random(10*k+s).sample(part(k, s), len(part(k, s)))]

def tuning(): return [(arm,tune_epochs[arm],s,lr) for s in tune_seeds for arm,g in grids.items() for lr in g]

def spread(v, form='.1f'): return f'{statistics.median(v):{form}} ({min(v):{form}} to {max(v):{form}})'

def cells(rows):
    "(arm, epochs): the runs"
    res = {}
    for r in rows: res.setdefault((r['arm'],r['epochs']), []).append(r)
    return res

def to_target(rows, arm, judge, target):
    "CPU and wall seconds of the runs of the shortest fit whose median reaches `target`, None if there is none"
    for (a,n),rs in sorted(cells(rows).items()):
        if a==arm and statistics.median(r[judge] for r in rs)>=target: return n,rs

def show(rows, target):
    of = cells(rows)
    print(f'{"arm":28}{"epochs":>6} {"n":>3}  CPU seconds          wall seconds         centre crop, %      rectangles, %')
    for arm in arms:
        for (a,n),rs in sorted(of.items()):
            if a==arm: print(f'{arm:28}{n:6} {len(rs):3}  '+'  '.join(spread([k*r[c] for r in rs]).ljust(19) for c,k in (('cpu',1),('wall',1),('centre',100),('rect',100))))
    for judge in ('centre','rect'):
        base = {a: to_target(rows, a, judge, target) for a in ('fastai','control')}
        print(f'\nShortest fit whose median reaches {target:.0%} on {dict(centre="the centre crop", rect="rectangles")[judge]}')
        for arm in arms:
            if not (t := to_target(rows, arm, judge, target)): print(f'{arm:28} none of those that were run'); continue
            ratios = [f'{statistics.median(r["cpu"] for r in t[1])/statistics.median(r["cpu"] for r in b[1]):.2f} of {a}' for a,b in base.items() if b]
            print(f'{arm:28}{t[0]:3} epochs, CPU {spread([r["cpu"] for r in t[1]])}, {", ".join(ratios)}')

def of_task(data=None, target=target): return dict(setting(), target=target, data=str(data) if data else f'{n_train} and {n_val} photos', size=size)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--json', type=Path, default='time_to_accuracy.json', help='file for the result; runs are appended to FILE.runs, and not repeated')
    p.add_argument('--tune', action='store_true', help='try the learning rates instead')
    p.add_argument('--data', type=Path, help='folder in the layout of ImageNet; by default the built-in photos')
    p.add_argument('--target', type=float, default=target, help='share of right answers')
    p.add_argument('--one', type=json.loads, help='one run: [arm, epochs, seed, lr]')
    args = p.parse_args()
    if args.one: return print(json.dumps(one_run(args.data, *args.one)))
    if not args.data: photos(n_train, n_val)
    rows = run_all(__file__, tuning() if args.tune else counted(), args.json.with_suffix('.tune' if args.tune else '.runs'), ('arm','epochs','seed','lr'), ['--data',str(args.data)] if args.data else [])
    if args.tune:
        for (arm,lr),rs in itertools.groupby(sorted(rows, key=lambda r: (r['arm'],r['lr'])), lambda r: (r['arm'],r['lr'])):
            print(f'{arm:12} lr {lr:g}: {spread([100*r["centre"] for r in rs])}')
        return
    show(rows, args.target)
    args.json.write_text(json.dumps(dict(setting=of_task(args.data, args.target), runs=rows), indent=1))

if __name__=='__main__': main()
