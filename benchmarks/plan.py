"""A run of five phases against what a measurement of a minute says of it: python benchmarks/plan.py --json plan.json

Each round measures for at most `--seconds` (`measure`), plans the table with that, then trains by it, with validation in each epoch, and compares minutes.
Sizes, batches and rectangles change: two epochs at 64 px in batches of 32, one in batches of 64, two at 96 px, one in batches of 48,
two at 128 px validated on rectangles. `--workers` 0 and 2 take turns. Errors are predicted over actual minus one, medians over rounds."""
import argparse, contextlib, json, os, statistics, sys, tempfile, time, warnings
warnings.simplefilter('ignore')
from pathlib import Path
from fastai.vision.all import *
from fastai_fastimagenet.all import *
from fastai_fastimagenet.measured import actual
from fastai_fastimagenet.planner import plan_parts
from setting import setting

table = Schedule([Phase(2, 64, 32, .02), Phase(1, bs=64, lr=.04), Phase(2, 96, 32, lr=.02), Phase(1, bs=48, lr=.03), Phase(2, 128, 32, lr=.02, rect=True)])

def one_round(path, workers, seconds):
    "Predicted and actual seconds of each phase, and how long measuring took"
    dls = imagenet_dls(path, 64, 32, workers=workers)
    learn = Learner(dls, resnet_small(dls.c), CrossEntropyLossFlat(), metrics=accuracy)
    began = time.perf_counter()
    p = plan_measured(table, measure(learn, table, seconds))
    took,began = time.perf_counter()-began,time.perf_counter()
    with tempfile.TemporaryDirectory() as out, learn.no_bar(), learn.no_logging(), contextlib.redirect_stdout(None): # `EpochLog` shows its lines
        table.save(Path(out)/'schedule.json')
        learn.fit_phases(table, cbs=EpochLog(Path(out)/'history.csv'))
        was = actual(out)
    def times(plan): return [{k: getattr(o, k) for k in plan_parts} for o in plan.phases]
    return dict(workers=workers, took=took, wall=time.perf_counter()-began, predicted=times(p), actual=times(was))

def total(times): return sum(times.values())

def errors(r): return [total(p)/total(a)-1 for p,a in zip(r['predicted'], r['actual'])],sum(map(total, r['predicted']))/sum(map(total, r['actual']))-1

def spread(v): return f'{statistics.median(v):+.1%} ({min(v):+.1%} to {max(v):+.1%})'

def show(rounds):
    for w in sorted({r['workers'] for r in rounds}):
        rs = [r for r in rounds if r['workers']==w]
        es = [errors(r) for r in rs]
        print(f'\n{w} workers, {len(rs)} rounds; measuring took at most {max(r["took"] for r in rs):.0f} s, the run {statistics.median(r["wall"] for r in rs):.0f} s')
        for i,p in enumerate(table.phases): print(f'phase {i}, {p.size:3} px, batch {p.bs}: {spread([e[0][i] for e in es])}')
        print(f'all: {spread([e[1] for e in es])}; median of the size of the error {statistics.median(abs(e[1]) for e in es):.1%}, of phases {statistics.median(abs(o) for e in es for o in e[0]):.1%}')

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--seconds', type=float, default=50, help='for measuring')
    p.add_argument('--rounds', type=int, default=5)
    p.add_argument('--pictures', type=int, default=3000, help='for training')
    p.add_argument('--workers', type=int, nargs='*', default=[0,2])
    p.add_argument('--json', type=Path, help='file to write everything to')
    args = p.parse_args()
    default_device(False)
    path,rounds = photos(args.pictures, args.pictures*2//5),[]
    for _ in range(args.rounds):
        for w in args.workers:
            rounds.append(one_round(path, w, args.seconds))
            print(w, f'{rounds[-1]["took"]:.0f} s', [f'{e:+.1%}' for e in errors(rounds[-1])[0]], f'{errors(rounds[-1])[1]:+.1%}', flush=True)
    show(rounds)
    if args.json: args.json.write_text(json.dumps(dict(setting=setting(), rounds=rounds), indent=1))

if __name__=='__main__': main()
