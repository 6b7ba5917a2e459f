"""`auto_schedule` against `fit_one_cycle`: python benchmarks/autotune.py --json autotune.json

Three tasks of photos, with one small ResNet:
  A  4,000 pictures of 20 classes at 128 px, Adam, label smoothing
  B  2,000 others of 20 classes at 96 px, SGD with momentum
  C  2,000 others labelled by their ten families at 64 px, Adam
Arms, on the same loaders, models and optimizers:
  auto       `auto_schedule` with so many minutes, then `fit_phases` with its table
  lr_find    `lr_find`, then `fit_one_cycle` with its suggestion, for about 1.25 times as long or more
  same lr    `fit_one_cycle` with the highest learning rate that `auto_schedule` chose, for about 1.25 times as long: what remains without the better rate
The minutes, the targets and the seeds were fixed after ten runs with other seeds (200, 201), the lengths after eight runs of seed 0, some of which were longer; the rule that
chooses the learning rate was made with photos and weights of seeds 100 to 102. An arm that does not reach the target in its median takes longer than its time here, so the ratio is below auto's time over its own.
Times are CPU seconds of training steps with their loading; `search` is `auto_schedule` or `lr_find`; evaluation is left out, the same in all arms but for the sizes.
Each run is a process of its own, two at a time on two cores, in an order drawn at random for each seed."""
import os
os.environ |= dict(OMP_NUM_THREADS='1')
import argparse, json, random, statistics, time, warnings
warnings.simplefilter('ignore')
from pathlib import Path
import torch
from fastai.vision.all import *
from fastai_fastimagenet.all import *
from setting import setting
from two_at_a_time import run_all
from fastai_fastimagenet.phase import ends

sgd = partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9)

def families(path):
    "The same pictures, labelled by family, as links"
    dest = path.with_name(f'{path.name}_families')
    for f in get_image_files(path):
        d = dest/f.parent.parent.name/f.parent.name.rpartition('_')[0]
        d.mkdir(parents=True, exist_ok=True)
        if not (link := d/f'{f.parent.name}_{f.name}').exists(): link.symlink_to(f)
    return dest

tasks = dict( # Data, size, optimizer, label smoothing
    A=(lambda: photos(4000, 1000), 128, Adam, .1),
    B=(lambda: photos(2000, 1000, seed=1), 96, sgd, 0),
    C=(lambda: families(photos(2000, 1000, seed=2)), 64, Adam, 0))

# Fixed before the first counted run
targets = dict(A=.83, B=.70, C=.70)
minutes = dict(A=1.2, B=.6, C=.5)
epochs = {'auto': dict(A=(0,), B=(0,), C=(0,)), 'lr_find': dict(A=(6,), B=(8,), C=(9,12)), 'same lr': dict(A=(5,), B=(8,), C=(9,))} # 0: as many as fit into the minutes

class Clock(FitCallback):
    "CPU seconds of training"
    order = -50
    def before_fit(self): self.cpu = 0.
    def before_train(self): self.began = time.process_time()
    def after_train(self): self.cpu += time.process_time()-self.began

def learner(task, seed):
    data,size,opt,smooth = tasks[task]
    set_seed(seed)
    dls = imagenet_dls(data(), size, 32, min_scale=.35, workers=0)
    loss = LabelSmoothingCrossEntropyFlat(smooth) if smooth else CrossEntropyLossFlat()
    return Learner(dls, resnet_small(dls.c).to(memory_format=torch.channels_last), loss, opt_func=opt, metrics=accuracy)

def one_run(task, arm, n, seed):
    torch.set_num_threads(1)
    default_device(False)
    learn,clock = learner(task, seed),Clock()
    with learn.no_bar(), learn.no_logging():
        began = time.process_time()
        if arm=='lr_find': lr = learn.lr_find(show_plot=False).valley
        else:
            sched = auto_schedule(learn, minutes[task])
            lr = max(o for p in sched.phases for o in ends(p.lr))
        search,began = time.process_time()-began,time.perf_counter()
        if arm=='auto': learn.fit_phases(sched, cbs=clock)
        else: learn.fit_one_cycle(n, lr, cbs=clock)
        wall = time.perf_counter()-began
        top1 = learn.validate()[1]
    return dict(task=task, arm=arm, n=n, seed=seed, lr=lr, epochs=learn.n_epoch, search=search, cpu=clock.cpu, wall=wall, top1=top1)

def spread(v, form='.1f'): return f'{statistics.median(v):{form}} ({min(v):{form}} to {max(v):{form}})'

def cells(): return [(t,a,n) for t in tasks for a in epochs for n in epochs[a][t]]

def show(rows):
    of = {c: [r for r in rows if (r['task'],r['arm'],r['n'])==c] for c in cells()}
    def med(rs, *keys): return statistics.median(sum(r[k] for k in keys) for r in rs)
    print(f'{"task":5}{"arm":9}{"runs":>4}{"epochs":>7}  highest lr                 search, s           training, s           top-1, %               auto / this: training, with the search')
    for (task,arm,n),rs in of.items():
        if not rs: continue
        auto,ratio = of[task,'auto',0],''
        if arm!='auto' and auto: ratio = f'{med(auto, "cpu")/med(rs, "cpu"):.2f}, {med(auto, "cpu", "search")/med(rs, "cpu", "search"):.2f}'
        print(f'{task:5}{arm:9}{len(rs):4}{med(rs, "epochs"):7g}  {spread([r["lr"] for r in rs], ".3g"):27}{spread([r["search"] for r in rs]):20}'
              f'{spread([r["cpu"] for r in rs]):22}{spread([100*r["top1"] for r in rs]):20} {"reaches" if med(rs, "top1")>=targets[task] else "misses "} {targets[task]:.0%}  {ratio}')
    walls = [r['wall']/60/minutes[r['task']] for r in rows if r['arm']=='auto']
    print(f'Time that auto took, over the minutes given: {spread(walls, ".2f")}')

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--json', type=Path, default='autotune.json', help='file for the result; runs are appended to FILE.runs, and not repeated')
    p.add_argument('--one', type=json.loads, help='one run: [task, arm, epochs, seed]')
    args = p.parse_args()
    if args.one: return print(json.dumps(one_run(*args.one)))
    for data,*_ in tasks.values(): data()
    jobs = [[*c,s] for s in range(5) for c in random.Random(s).sample(cells(), len(cells()))]
    rows = run_all(__file__, jobs, args.json.with_suffix('.runs'), ('task','arm','n','seed'))
    show(rows)
    args.json.write_text(json.dumps(dict(targets=targets, minutes=minutes, setting=setting(), runs=rows), indent=1))

if __name__=='__main__': main()
