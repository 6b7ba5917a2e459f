"""What the callbacks cost per training step, beside what fastai's own loop costs: python benchmarks/overhead.py

A model of one layer on pictures of 8x8 in memory, so that a step is next to nothing but the loop. Three arms take turns in every round:
a plain PyTorch loop, `Learner.fit` with fastai's own callbacks and a learning-rate schedule, and the same with all of ours.
Figures are medians over rounds, in microseconds of CPU time of this process per step. Pictures are loaded by a worker, as in real training;
with `--workers 0` this process loads them, and what `Checkpoint` costs per picture (a seed of its own, about 8 us) is in the figures too."""
import os
os.environ['OMP_NUM_THREADS'] = '1'
import argparse, statistics, tempfile, time, warnings
warnings.simplefilter('ignore')
from contextlib import redirect_stdout
from unittest import mock
from fastai.vision.all import *
from fastai_fastimagenet.all import *
from setting import setting_line

class Size(Transform):
    "What `ProgressiveResize` sets; the pictures stay as they are"
    size = fastuple(8,8)
    def encodes(self, x:TensorImage): return x

def loaders(n, bs):
    items = [(TensorImage(torch.randn(3,8,8)), torch.tensor(i%10)) for i in range(n)]
    return DataLoaders(TfmdDL(items, bs=bs, shuffle=True, drop_last=True, num_workers=args.workers, after_item=[Size()]),
                       TfmdDL(items[:bs], bs=bs, num_workers=0, after_item=[Size()]))

def model(): return nn.Sequential(Flatten(), nn.Linear(192, 10), nn.BatchNorm1d(10))

def learner(dls, **kwargs):
    return Learner(dls, model(), nn.CrossEntropyLoss(), opt_func=partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9), **kwargs)

def plain(n, bs, folder):
    dl,m = loaders(n, bs).train,model()
    opt,loss_func = torch.optim.SGD(m.parameters(), lr=.01, momentum=.9),nn.CrossEntropyLoss()
    def run():
        for x,y in dl:
            loss_func(m(x), y).backward()
            opt.step()
            opt.zero_grad()
    return run

def fastai_loop(n, bs, folder):
    "As if this package were not imported: it speeds up the events of a batch"
    learn = learner(loaders(n, bs), metrics=accuracy)
    def run():
        with mock.patch.object(Learner, '_call_one', Learner._call_one.__wrapped__), learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, .01)
    return run

def ours(n, bs, folder):
    learn = learner(loaders(n, bs), metrics=accuracy)
    def run():
        cbs = [ProgressiveResize({0:8}), DynamicBatchSize({0:bs}), LRWarmup(1), BNWeightDecayExclusion(), EpochLog(), FiniteLoss(),
               TensorBoard(tempfile.mkdtemp(dir=folder)), Checkpoint(tempfile.mkdtemp(dir=folder)), TimeToAccuracy(top1=1.)]
        with learn.no_bar(), learn.no_logging(), redirect_stdout(io.StringIO()): learn.fit_one_cycle(1, .01, cbs=cbs)
    return run

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--steps', type=int, default=1000)
    p.add_argument('--rounds', type=int, default=9)
    p.add_argument('--workers', type=int, default=1, help='processes that load pictures')
    args,bs = p.parse_args(),16
    with tempfile.TemporaryDirectory() as folder:
        arms = {f.__name__: f(args.steps*bs, bs, folder) for f in (plain, fastai_loop, ours)}
        times = {k: [] for k in arms}
        for i in range(args.rounds+1): # The first round only warms up
            for k,f in arms.items():
                began = time.process_time()
                f()
                if i: times[k].append(1e6*(time.process_time()-began)/args.steps)
    for k,v in times.items(): print(f'{k:12} {statistics.median(v):7.0f} us per step ({min(v):.0f} to {max(v):.0f})')
    own = [(c-b)/(b-a) for a,b,c in zip(*times.values())]
    print(f'ours/fastai loop: {statistics.median(own):.2f} ({min(own):.2f} to {max(own):.2f}), {args.rounds} rounds of {args.steps} steps, {args.workers} workers; {setting_line()}')
