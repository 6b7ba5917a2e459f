"""Seconds lost at the boundaries of epochs in a run of six phases: python benchmarks/switch.py --json switch.json

Phases of two epochs each: 64 px in batches of 64, 64/128, 96/64, 96/96, 128/64, and 128/96 validated on rectangles: eleven boundaries, five of them
with a new phase. Both phases at 64 px read copies of 80 px short side. Arms take turns in every round, in random order:
  ours         one `imagenet_dls`, one `Learner.fit_phases`
  stock        `ImageDataLoaders.from_folder` with RandomResizedCrop and FlipItem; for each phase new loaders, `learn.dls = dls`, `learn.fit`
  stock ahead  the same, with the loaders of all phases made before the first
Stock fastai reads the same files, copies too; its validation is square in all phases, in batches as large as ours, 64.

Lost at a boundary is the time from the end of an epoch's last training step to the start of its first validation step (train->valid), and from the
end of its last validation step to the start of the next epoch's first training step (valid->train). A step starts when its batch is there, on
the device and with its transforms done; what else happens between steps, such as new loaders, processes that end and start, is in it. `inside` is the
time between all other steps: about zero where loading keeps up with the steps. `start` is the time from nothing to the first step, loaders and
learner included; `run` is all of it.

The model sleeps: `--step` milliseconds for 64 pictures in a training step, a third of that in a validation step. So loading happens beside the steps as
with a GPU; on a CPU a real model competes with the loaders for the cores. `--model real` takes a small ResNet all the same. Nothing here says how
long a process with CUDA takes to fork, which adds to what stock fastai does at a boundary, nor what queued GPU work hides.
Figures are medians over rounds; ratios are medians of the ratios of each round. Pictures are rendered once, and lie in the page cache."""
import os
os.environ['OMP_NUM_THREADS'] = '1'
import argparse, itertools, json, random, statistics, sys, time, warnings
from setting import setting
warnings.simplefilter('ignore')
from fastai.vision.all import *
from fastai_fastimagenet.all import *
from fastai_fastimagenet.presize import presize

schedule = Schedule([Phase(2, size=64, bs=64, lr=.01, data='-sz/80'), Phase(2, bs=128, lr=.01), Phase(2, size=96, bs=64, lr=.01, data=''),
                     Phase(2, bs=96, lr=.01), Phase(2, size=128, bs=64, lr=.01), Phase(2, bs=96, lr=.01, rect=True)])
n_val_batch = schedule.phases[0].bs # That of `imagenet_dls`, which `fit_phases` leaves as it is

class Sleeper(nn.Module):
    "Takes its time, and no core"
    def __init__(self, n_out):
        super().__init__()
        self.head = nn.Linear(3, n_out)

    def forward(self, x):
        time.sleep(args.step/1000*len(x)/64/(1 if self.training else 3))
        return self.head(x.mean((2,3)))

class Starts(Callback):
    "Note when each step starts"
    order = -100 # Before all others
    def __init__(self, steps): self.steps = steps
    def before_batch(self): self.steps.append([self.training, time.perf_counter()])

class Ends(Callback):
    "Note when each step ends"
    order = 100 # After all others
    def __init__(self, steps): self.steps = steps
    def after_batch(self): self.steps[-1].append(time.perf_counter())

def learner(dls, steps):
    model = (resnet_small if args.model=='real' else Sleeper)(dls.c)
    return Learner(dls, model, nn.CrossEntropyLoss(), metrics=accuracy, cbs=[Starts(steps), Ends(steps)])

def ours(path, steps):
    p = schedule.phases[0]
    learn = learner(imagenet_dls(path, p.size, p.bs, workers=args.workers), steps)
    with learn.no_bar(), learn.no_logging(): learn.fit_phases(schedule)

def stock_dls(path, p):
    return ImageDataLoaders.from_folder(f'{path}{p.data}', valid='val', bs=p.bs, val_bs=n_val_batch, num_workers=args.workers,
                                        item_tfms=[RandomResizedCrop(p.size), FlipItem()], batch_tfms=Normalize.from_stats(*imagenet_stats))

def fit_each(all_dls, steps):
    learn = None
    for p,dls in zip(schedule.phases, all_dls):
        if learn is None: learn = learner(dls, steps)
        learn.dls = dls
        with learn.no_bar(), learn.no_logging(): learn.fit(p.n_epoch, p.lr)

def stock(path, steps): fit_each((stock_dls(path, p) for p in schedule.phases), steps)

def stock_ahead(path, steps): fit_each([stock_dls(path, p) for p in schedule.phases], steps)

def measure(arm, path):
    "Times of one run: `lost` at each boundary as (train->valid, valid->train), `start`, `inside`, `run`; all in seconds"
    steps,began = [],time.perf_counter()
    set_seed(0)
    arm(path, steps)
    run = time.perf_counter()-began
    gaps = [(a[0]!=b[0], b[1]-a[2]) for a,b in itertools.pairwise(steps)]
    switches = [gap for is_switch,gap in gaps if is_switch]
    if len(switches)!=2*schedule.n_epoch-1: raise ValueError(f'{len(switches)} times from training to validation or back, in {schedule.n_epoch} epochs')
    return dict(lost=list(zip(switches[::2], switches[1::2])), start=steps[0][1]-began, inside=sum(gap for is_switch,gap in gaps if not is_switch), run=run)

def is_change(i): return schedule.at(i).phase!=schedule.at(i+1).phase

def figures(run):
    "Sums and medians of one run, over boundaries with and without a new phase"
    res = {k: run[k] for k in ('start','inside','run')}
    for name,ok in (('all',lambda i: True), ('new phase',is_change), ('same phase',lambda i: not is_change(i))):
        lost = [o for i,o in enumerate(run['lost']) if ok(i)]
        res[name] = dict(n=len(lost), median=statistics.median(map(sum, lost)), sum=sum(map(sum, lost)),
                         train_valid=sum(a for a,_ in lost), valid_train=sum(b for _,b in lost))
    return res

def row(runs, arm, name):
    "Medians over rounds"
    rounds = {k: [figures(o)[name] for o in v] for k,v in runs.items()}
    own = rounds[arm]
    ratios = {k: statistics.median(a['sum']/b['sum'] for a,b in zip(own, rounds[k])) for k in runs if k.startswith('stock')}
    return dict(arm=arm, boundaries=name, low=min(o['sum'] for o in own), high=max(o['sum'] for o in own), ratios=ratios,
                **{k: statistics.median(o[k] for o in own) for k in own[0]})

def show(runs):
    print('\nlost, seconds             boundaries   median     sum (range)            train->valid  valid->train   /stock  /stock ahead')
    for name,arm in itertools.product(('new phase','same phase','all'), runs):
        o = row(runs, arm, name)
        print(f'{name:12}{arm:14}{o["n"]:10}{o["median"]:9.3f}{o["sum"]:8.2f} ({o["low"]:.2f} to {o["high"]:.2f})'.ljust(70)
              +f'{o["train_valid"]:8.2f}{o["valid_train"]:14.2f}{o["ratios"]["stock"]:12.3f}{o["ratios"]["stock ahead"]:13.3f}')
    print('\nseconds             start  inside     run')
    for arm,v in runs.items(): print(f'{arm:14}', *(f'{statistics.median(o[k] for o in v):10.2f}'[2:] for k in ('start','inside','run')), sep='   ')
    print('\nours, each boundary, seconds: train->valid, valid->train')
    for i,o in enumerate(zip(*(o['lost'] for o in runs['ours']))):
        print(f'after epoch {i:2} ', *(f'{statistics.median(part):7.3f}' for part in zip(*o)), 'new phase' if is_change(i) else '')

def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--n', type=int, default=1024, help='training pictures')
    p.add_argument('--n-val', type=int, default=256, help='validation pictures')
    p.add_argument('--workers', type=int, default=2, help='processes that load pictures')
    p.add_argument('--step', type=float, default=100, help='milliseconds that a training step of 64 pictures takes')
    p.add_argument('--model', choices=('sleep','real'), default='sleep')
    p.add_argument('--rounds', type=int, default=5)
    p.add_argument('--json', type=Path, help='file to write everything to')
    return p.parse_args()

def main():
    sys.stdout.reconfigure(line_buffering=True)
    default_device(False)
    path = photos(args.n, args.n_val)
    presize(path, short=(80,), workers=args.workers)
    for f in get_image_files(path)+get_image_files(f'{path}-sz'): f.read_bytes()
    print(schedule, *(f'{k}: {v}' for k,v in setting().items()), sep='\n')
    arms = dict(ours=ours, stock=stock, stock_ahead=stock_ahead)
    runs = {k.replace('_', ' '): [] for k in arms}
    for i in range(args.rounds):
        for k in random.Random(i).sample(list(arms), len(arms)): runs[k.replace('_', ' ')].append(measure(arms[k], path))
    show(runs)
    if args.json:
        rows = [row(runs, arm, name) for name in ('new phase','same phase','all') for arm in runs]
        args.json.write_text(json.dumps(dict(setting=setting(), schedule=json.loads(schedule.to_json()), rows=rows, runs=runs), indent=1))

if __name__=='__main__':
    args = arguments()
    main()
