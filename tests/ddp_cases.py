"What the processes of tests/test_distributed.py do: `python ddp_cases.py CASES FOLDER`, alone or started by a launcher"
import hashlib, json, os, random, shutil, sys, warnings
from functools import partial
from pathlib import Path
import numpy as np, torch
warnings.simplefilter('ignore')
from fastai.vision.all import *
from fastai.callback.training import GradientAccumulation
from fastai_fastimagenet.all import *
from fastai_fastimagenet.group import check_same, check_state, gather
from fastai_fastimagenet.rank_dl import RankDL

rank,world,out = rank_distrib(),num_distrib() or 1,Path(sys.argv[2])
classes = 'abcd'

def images(folder, n):
    "`n` JPEG files of odd shapes; the names say the class"
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        rng = np.random.default_rng(i)
        w,h = rng.integers(40, 90, 2)
        im = PILImage.create(rng.integers(0, 255, (5,6,3), np.uint8)).resize((w,h), 3)
        im.save(folder/f'{i:04}_{classes[(i*i+i//7)%4]}.jpg', quality=90)

def label(o): return o.stem[-1]

def loaders(folder, n_train=0, n_valid=0, size=32, bs=16, workers=0, persistent=False, tfms=None):
    files = sorted(folder.glob('*.jpg'))
    block = DataBlock((ImageBlock, CategoryBlock(vocab=list(classes))), get_items=lambda o: files[:n_train+n_valid], get_y=label,
                      splitter=IndexSplitter(range(n_train, n_train+n_valid)), item_tfms=tfms or Resize(size))
    return block.dataloaders(folder, bs=bs, num_workers=workers, persistent_workers=persistent)

def learner(dls, model=None, metrics=None, loss_func=None, **kwargs):
    sgd = partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9)
    return Learner(dls, model or resnet_small(4), loss_func or CrossEntropyLossFlat(), opt_func=sgd, metrics=metrics, path=out, **kwargs)

def sha(*tensors): return hashlib.sha1(b''.join(t.detach().contiguous().numpy().tobytes() for t in tensors)).hexdigest()

class RightByClass(Metric):
    "A metric of its own kind: right answers of each class, and the largest batch"
    def reset(self): self.right,self.biggest = [0]*4,0
    def accumulate(self, learn):
        self.biggest = max(self.biggest, len(learn.y))
        for p,t in zip(learn.pred.argmax(1), learn.y): self.right[t] += int(p==t)
    @property
    def value(self): return [*self.right, self.biggest]

def seen(preds, targs): return float(len(targs)), sha(preds, targs)

def evaluate():
    "Losses, metrics and predictions for several numbers of images, plain and rectangular"
    res = {}
    for n in (1,2,53,997):
        dls = loaders(out/'images', 1, n, bs=16, workers=0)
        mets = [accuracy, partial(top_k_accuracy, k=2), RightByClass(), AccumMetric(seen, flatten=False)] + ([RocAuc()] if n>4 else [])
        learn = learner(dls, metrics=mets)
        learn.model.load_state_dict(torch.load(out/'weights.pth'))
        with learn.ddp(timeout=1), learn.no_bar(), learn.no_logging():
            for kind,dl in (('plain',dls.valid), ('rect',rect_dl(dls, 32))):
                values = learn.validate(dl=dl)
                preds,targs,losses = learn.get_preds(dl=dl, with_loss=True, act=noop)
                right = sum(int(v) for v in values[3][:4])
                res[f'{n} {kind}'] = dict(loss=float(values[0]).hex(), top1=float(values[1]).hex(), top2=float(values[2]).hex(),
                    own=values[3], accum=values[4], auc=float(values[5]).hex() if n>4 else None, right=right,
                    preds=sha(preds), targs=sha(targs), both=sha(preds, targs), losses=sha(losses), shares=gather(len(learn.dl.idxs)) if world>1 else [n])
    return res

def evaluate_workers():
    "Worker processes change nothing; a list of batches is evaluated by every process"
    dls = loaders(out/'images', 1, 53, bs=16, workers=2)
    learn = learner(dls, metrics=accuracy)
    learn.model.load_state_dict(torch.load(out/'weights.pth'))
    with learn.ddp(timeout=1), learn.no_bar(), learn.no_logging():
        rect = rect_dl(dls, 32)
        res = dict(plain=float(learn.validate()[0]).hex(), rect=float(learn.validate(dl=rect)[0]).hex())
        batches = list(dls.valid)
        res['batches'] = float(learn.validate(dl=batches)[0]).hex()
        res['one batch'] = len(learn.get_preds(dl=batches[:1])[0])
        res['one item'] = learn.predict(dls.valid_ds.items[3])[0]
    return res

class Double(Callback):
    def before_batch(self): self.learn.xb = (self.x.double(),)
    def after_loss(self): self.learn.loss = self.loss.float() # What fastai logs must be float32; `loss_grad` is not touched

class KeepGrads(Callback):
    order = 50
    def before_fit(self): self.grads,self.shapes = [],[]
    def before_step(self):
        self.grads.append(torch.cat([p.grad.flatten() for p in self.learn.model.parameters()]))
        self.shapes.append((len(self.y)*world, self.x.shape[-1]))

class AsOneRank(Callback):
    "The order of a distributed run, on one process"
    order = 11
    def before_fit(self): self.start = random.randrange(2**32)
    def before_train(self): self.learn.dl = RankDL(self.learn.dl, 0, 1, train=True, seed=(self.start+self.epoch)%2**32)

def no_bn_model():
    set_seed(3)
    def block(i, o): return nn.Sequential(nn.Conv2d(i, o, 3, 2, 1), nn.GroupNorm(2, o), nn.ReLU())
    return nn.Sequential(block(3,8), block(8,16), nn.AdaptiveAvgPool2d(1), Flatten(), nn.Linear(16,4)).double()

def equal():
    "Gradients of each step and weights, in double precision; a global batch of 12, then 24"
    res = {}
    for name,acc in (('step',None), ('accumulate',2)):
        learn = learner(loaders(out/'images', 60, 20, bs=12//world, tfms=Resize(32, 'squish')), no_bn_model(), wd=.1, loss_func=nn.CrossEntropyLoss())
        keep = KeepGrads()
        cbs = [Double(), keep, ProgressiveResize({0:24, 1:32}), DynamicBatchSize({0:12//world, 1:24//world}), LRWarmup(1),
               BNWeightDecayExclusion(), RectValidation(1)]
        if acc: cbs.append(GradientAccumulation(acc*12//world))
        if world==1: cbs.append(AsOneRank())
        with learn.ddp(timeout=1), learn.no_bar(), learn.no_logging():
            random.seed(5)
            learn.fit(2, .1, cbs=cbs)
        res[name] = dict(grads=torch.stack(keep.grads), weights=torch.cat([p.detach().flatten() for p in learn.model.parameters()]), shapes=keep.shapes)
    if not rank: torch.save(res, out/f'equal_{world}.pth')
    return {}

class Seen(Callback):
    "Which images, in which shapes"
    order = 12
    def before_fit(self): self.rows = getattr(self, 'rows', [])
    def before_train(self): self.rows.append(dict(steps=0, shapes=[]))
    def after_batch(self):
        if not self.training: return
        self.rows[-1]['steps'] += 1
        self.rows[-1]['shapes'].append(tuple(self.x.shape))
    def after_train(self): self.rows[-1]['idxs'] = list(self.learn.dl.idxs) if world>1 else None

def matrix():
    res = {}
    crops = [RandomResizedCrop(32, min_scale=.5, split_idx=0), RectCrop(32)]
    for method in ('fit','fit_one_cycle','fine_tune'):
        for workers,persistent in ((0,False),(2,False),(2,True)):
            for change in ('size','batch'):
                set_seed(1)
                dls = loaders(out/'images', 40, 10, bs=8, workers=workers, persistent=persistent, tfms=crops)
                learn = learner(dls, metrics=accuracy)
                cb,rows = ProgressiveResize({0:24, 1:32}) if change=='size' else DynamicBatchSize({0:4, 1:8}),Seen()
                with learn.ddp(timeout=1), learn.no_bar(), learn.no_logging(): getattr(learn, method)(2, .01, cbs=[cb, rows])
                check_state(learn.model, learn.opt, f'after {method} with {workers} workers')
                left = [len(dls.loaders), type(dls.train).__name__, dls.train.bs, sizes(dls), type(learn.model).__name__, len(learn.cbs)]
                idxs = [sum(o, []) for o in zip(*gather([r.pop('idxs') for r in rows.rows]))] if world>1 else []
                res[f'{method} {workers} {persistent} {change}'] = dict(rows=rows.rows, left=left, acc=float(learn.recorder.values[-1][2]),
                    unique=[len(o)==len(set(o)) for o in idxs])
    return res

def sizes(dls): return [f.size if isinstance(f.size, int) else list(f.size) for f in dls.train.after_item.fs if hasattr(f, 'size')]

class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.body,self.spare = resnet_small(4),nn.Linear(3,3)
    def forward(self, x): return self.body(x)

def options():
    "Mixed precision, 16-bit gradients, DDP's own options: all processes agree in the end, and learn the same in about the same way"
    runs = dict(plain={}, fp16=dict(compress='fp16'), bf16=dict(compress='bf16'), unused=dict(find_unused_parameters=True),
                static=dict(static_graph=True, bucket_cap_mb=1), precision={}, accumulate={})
    res = {}
    for name,kwargs in runs.items():
        set_seed(2)
        model = Unused() if name=='unused' else resnet_small(4)
        learn = learner(loaders(out/'images', 48, 10, bs=8), model)
        cbs = dict(precision=[BF16()], accumulate=[GradientAccumulation(16)]).get(name, [])
        with learn.ddp(timeout=1, **kwargs), learn.no_bar(), learn.no_logging(): learn.fit(2, .02, cbs=cbs)
        check_state(learn.model, learn.opt)
        res[name] = dict(loss=float(learn.recorder.values[-1][0]), change=float(sum((p-q).abs().sum() for p,q in zip(
            learn.model.parameters(), base.parameters()))) if name in ('fp16','bf16','static') else None)
        if name=='plain': base = learn.model
    return res

def starts_equal():
    "Weights, batch norm and optimizer of rank 0 are everybody's, and every rank draws its own crops"
    set_seed(10+rank)
    learn = learner(loaders(out/'images', 40, 10, bs=8), metrics=accuracy)
    learn.create_opt()
    for s in [p for g in learn.opt.opt.param_groups for p in g['params']]: learn.opt.opt.state[s]['momentum_buffer'] = torch.full_like(s, rank+1.)
    learn.model[0][1].running_mean.fill_(rank+7.)
    mine = sha(*learn.model.parameters())
    class Look(Callback):
        order = 30
        def before_train(self): self.row = [sha(*self.learn.model.parameters()), float(self.learn.model[0][1].running_mean[0]), random.random(),
                                            float(next(iter(self.opt.opt.state.values()))['momentum_buffer'].mean())]
    look = Look()
    with learn.ddp(timeout=1), learn.no_bar(), learn.no_logging(): learn.fit(1, 0., cbs=look)
    return dict(before=gather(mine), at_start=gather(look.row))

def refused():
    "What cannot work says so on every process, and leaves the Learner as it was"
    learn = learner(loaders(out/'images', 40, 10, bs=4))
    before,said = sha(*learn.model.parameters()),[]
    def unequal():
        with torch.no_grad(): next(learn.model.parameters())[0] += rank
        try: learn.validate()
        finally:
            with torch.no_grad(): next(learn.model.parameters())[0] -= rank
    with learn.no_bar(), learn.no_logging():
        for f in (lambda: learn.lr_find(num_it=10, show_plot=False), lambda: learn.fit(1, cbs=DynamicBatchSize({0:40})),
                  lambda: learn.fit_phases(Schedule([Phase(1, size=32, bs=4, lr=.1)]), compress='fp16'),
                  lambda: learn.get_preds(save_preds=out), lambda: check_same({'the extra': 1} if rank else {}), unequal, lambda: learn.get_preds() if rank else learn.fit(1)):
            try:
                with learn.ddp(timeout=1): f()
            except ValueError as e: said.append(str(e).strip())
        try: learn.fit(1)
        except ValueError as e: said.append(str(e))
    return dict(said=gather(said), same=before==sha(*learn.model.parameters()), cbs=len(learn.cbs))

class StopAt(Callback):
    order = 20
    def __init__(self, ex): self.ex = ex
    def before_batch(self):
        if self.training and self.iter==1: raise self.ex

def corners():
    "What users do besides: cancel, export, tables, data without targets, one process alone"
    res,models = {},[]
    files = sorted((out/'images').glob('*.jpg'))[:50]
    table = pd.DataFrame(dict(name=[f.name for f in files], label=[label(f) for f in files], valid=[i>=40 for i in range(50)]))
    dls = ImageDataLoaders.from_df(table, out/'images', valid_col='valid', item_tfms=Resize(32), bs=4, num_workers=0)
    class WhichModel(Callback):
        def before_validate(self): models.append(type(self.learn.model).__name__)
    learn = Learner(dls, resnet_small(4), CrossEntropyLossFlat(), opt_func=Adam, metrics=[accuracy, F1Score(average='macro')], cbs=WhichModel(), path=out)
    learn.create_opt()
    for p,*_ in learn.opt.all_params(): learn.opt.state[p]['grad_avg'] = torch.full_like(p, rank+1.)
    with learn.ddp(timeout=1), learn.no_bar(), learn.no_logging():
        learn.fit(1, 0., cbs=Callback(before_train=lambda self: res.update(adam=gather(float(self.opt.state[next(self.learn.model.parameters())]['grad_avg'].mean())))))
        for ex in (CancelTrainException, CancelEpochException, CancelFitException):
            learn.fit(1, .01, cbs=StopAt(ex), reset_opt=True)
            res[ex.__name__] = float(learn.validate()[0])
        res['test_dl'] = gather(sha(learn.get_preds(dl=dls.test_dl(files[:7]))[0]))
        res['test_dl rows'] = len(learn.get_preds(dl=dls.test_dl(files[:7]))[0])
        learn.export('exported.pkl')
    alone = []
    with learn.no_bar(), learn.no_logging():
        if not rank: alone = [float(learn.validate()[0]), len(learn.get_preds()[0]), learn.predict(files[0])[0]]
    return {**res, 'alone':alone, 'models':models}

def phases():
    "A table through fit_phases, inside and outside of learn.ddp()"
    sched = Schedule([Phase(1, size=24, bs=4, lr=(.01,.02)), Phase(1, size=32, bs=8, lr=(.04,0), rect=True)], world=world)
    res = []
    for inside in (False,True):
        set_seed(4)
        learn = learner(loaders(out/'images', 40, 10, bs=8), metrics=[accuracy])
        log = EpochLog(out/f'log_{world}_{inside}.csv')
        with learn.no_bar(), learn.no_logging():
            if inside:
                with learn.ddp(timeout=1): learn.fit_phases(sched, cbs=log)
            else: learn.fit_phases(sched, cbs=log, timeout=1)
        res.append(dict(weights=gather(sha(*learn.model.parameters())), rows=[[r['size'],r['bs']] for r in log.rows]))
    return res

class EveryStep(FitCallback):
    "What each process trains on"
    run_valid = False
    def before_fit(self): self.seen = []
    def before_batch(self): self.seen.append((self.epoch,*self.x.shape[2:],len(self.x)))

def rectangles():
    "Rectangular training, with sizes and batches that change, workers, and averaged weights that are evaluated"
    folder = out/'pictures_in_folders'
    if not rank:
        for i,f in enumerate(sorted((out/'images').glob('*.jpg'))[:160]):
            to = folder/('val' if i%5==0 else 'train')/label(f)/f.name
            to.parent.mkdir(parents=True, exist_ok=True)
            if not to.exists(): shutil.copy(f, to)
    gather(0)
    set_seed(7)
    learn = learner(imagenet_dls(folder, 32, 8, min_scale=.35, workers=1), metrics=[accuracy])
    steps,ema,averages = EveryStep(),WeightEMA(.9),[]
    def note(self): averages.append(sha(*self.learn.model.state_dict().values()))
    with learn.ddp(timeout=1), learn.no_bar(), learn.no_logging():
        learn.fit(3, .02, cbs=[RectTraining({0:True, 2:False}), ProgressiveResize({0:32, 1:64}), DynamicBatchSize({0:8, 1:4}), RectValidation(), steps, ema,
                               Callback(before_validate=note)])
        value = learn.validate()[0]
    learn.dls.pool.close()
    return dict(steps=gather(steps.seen), averages=gather(averages), weights=gather(sha(*learn.model.state_dict().values())), value=gather(float(value).hex()))

if __name__=='__main__':
    cases = sys.argv[1].split(',')
    for name in cases:
        res = globals()[name]()
        if not rank: (out/f'{name}_{world}.json').write_text(json.dumps(res))
