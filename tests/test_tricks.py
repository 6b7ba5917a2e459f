"Each trick alone and with the others, under every kind of fit; afterwards the Learner is as it was"
import itertools, time
from functools import partial
import pytest, torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from fastai.vision.all import (Adam, Callback, CancelFitException, CategoryBlock, DataBlock, GrandparentSplitter, ImageBlock,
    DataLoaders, ImageDataLoaders, L, Learner, Normalize, OptimWrapper, ProgressCallback, RandomResizedCrop, RandomResizedCropGPU, Resize, SGD,
    ShortEpochCallback, accuracy, aug_transforms, combined_cos, get_image_files, imagenet_stats, load_learner, nn, noop, params, parent_label)
from fastai_fastimagenet.all import *
from fastai_fastimagenet.core import _fits
from fastai_fastimagenet.sizing import dl_size, sizers

pytestmark = pytest.mark.filterwarnings('ignore')

def torch_sgd(params, lr=.1, **kwargs): return OptimWrapper(params, opt=partial(torch.optim.SGD, momentum=.9), lr=lr)

def block(path, item_tfms, batch_tfms=None, **kwargs):
    db = DataBlock((ImageBlock,CategoryBlock), get_items=get_image_files, get_y=parent_label,
                   splitter=GrandparentSplitter(valid_name='val'), item_tfms=item_tfms, batch_tfms=batch_tfms)
    return db.dataloaders(path, bs=40, **kwargs)

def image_dls(path, item_tfms, batch_tfms=None, **kwargs):
    return ImageDataLoaders.from_folder(path, valid='val', bs=40, item_tfms=item_tfms, batch_tfms=batch_tfms, **kwargs)

pipes = dict(
    resize=lambda: (Resize(48), None),
    rrc=lambda: ([RandomResizedCrop(48, min_scale=.4, split_idx=0), RectCrop(48)], None),
    aug=lambda: (Resize(56), aug_transforms(size=48)),
    gpu=lambda: (Resize(56), [RandomResizedCropGPU(48, min_scale=.4), Normalize.from_stats(*imagenet_stats)]))

class Watch(Callback):
    "Notes shape, batch size and lr of every batch"
    order = 90
    def before_fit(self): self.rows = []
    def before_batch(self):
        h,w = self.x.shape[-2:]
        self.rows.append((self.epoch, self.training, h, w, len(self.x), self.opt.hypers[-1]['lr'], round(self.pct_train, 6)))

def make(path, pipe='resize', dls=image_dls, opt_func=SGD, workers=0, cbs=None, **kwargs):
    item,batch = pipes[pipe]()
    model = resnet_small(20, 4)
    splitter = lambda m: L(params(m[:4]), params(m[4:]))
    learn = Learner(dls(path, item, batch, num_workers=workers, **kwargs), model, splitter=splitter, opt_func=opt_func,
                    metrics=accuracy, cbs=[Watch(), *L(cbs)])
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    learn.create_opt()
    return learn

def snapshot(learn):
    "All that a callback might leave changed"
    def loader(dl): return (id(dl), dl.bs, dl.drop_last, dl.shuffle, [id(getattr(dl, o)) for o in ('after_item','before_batch','after_batch')],
                            [(id(f), f.size, getattr(f, 'min_scale', None)) for f in sizers(dl)])
    opt = getattr(learn.opt, 'opt', None)
    groups = [(sorted(g.keys() - {'params'}), [id(p) for p in g['params']]) for g in opt.param_groups] if opt else \
             [[learn.opt.state[p].get('do_wd') for p in ps] for ps in learn.opt.param_lists]
    hooks = [len(getattr(opt, o)) for o in ('_optimizer_step_pre_hooks','_optimizer_step_post_hooks')] if opt else None
    return dict(dls=[loader(dl) for dl in learn.dls.loaders], cbs=[type(c).__name__ for c in learn.cbs], groups=groups, hooks=hooks,
                model=id(learn.model), loss=id(learn.loss_func), attrs=sorted(k for k,v in vars(learn).items() if isinstance(v, Callback)),
                fits=learn in _fits)

tricks = dict(resize=lambda: ProgressiveResize({0:32, 1:48}), bs=lambda: DynamicBatchSize({0:20, 1:40}), warm=lambda: LRWarmup(1),
              wd=lambda: BNWeightDecayExclusion(), rect=lambda: RectValidation(1))
combos = [c for n in (1,2,5) for c in itertools.combinations(tricks, n)]

fits = dict(fit=lambda l,cbs: l.fit(2, .01, cbs=cbs), one_cycle=lambda l,cbs: l.fit_one_cycle(2, .01, cbs=cbs),
            fine_tune=lambda l,cbs: l.fine_tune(2, .01, freeze_epochs=1, cbs=cbs))

@pytest.fixture(scope='session')
def few(small_photos, tmp_path_factory):
    "80 training and 60 validation photos"
    return photos(80, 60, short=64, path=tmp_path_factory.mktemp('few'))

@pytest.mark.parametrize('combo', combos, ids='+'.join)
@pytest.mark.parametrize('fit', fits)
def test_every_combination_under_every_fit(few, combo, fit):
    k = combos.index(combo)
    learn = make(few, list(pipes)[k%4], (image_dls,block)[k%2], (SGD,torch_sgd)[k//2%2])
    learn.fit(1, 1e-4)
    before = snapshot(learn)
    fits[fit](learn, [tricks[c]() for c in combo])
    assert snapshot(learn)==before
    rows = learn.watch.rows
    train = [{r[2:5] for r in rows if r[0]==e and r[1]} for e in (0,1)]
    side = (32,48) if 'resize' in combo else (48,48)
    bs = (20,40) if 'bs' in combo else (40,40)
    assert train==[{(s,s,b)} for s,b in zip(side, bs)]
    valid = [{r[2:4] for r in rows if r[0]==e and not r[1]} for e in (0,1)]
    assert valid[0]=={(side[0],)*2}
    assert (valid[1]!={(48,48)})==('rect' in combo) and all(min(v)==48 for v in valid[1])
    assert sum(r[4] for r in rows if r[0]==1 and not r[1])==60
    assert [r[-1] for r in rows if r[1]]==[e/2+i/(2*n) for e,n in zip((0,1), (80//b for b in bs)) for i in range(n)]

@pytest.mark.parametrize('fit', ['fit','one_cycle'])
@pytest.mark.parametrize('order', [('bs','warm'), ('warm','bs')])
def test_lr_factors_multiply(few, fit, order):
    "Warm-up and batch factor act on the schedule's own value at the same position, in any order of the callbacks"
    learn = make(few)
    fits[fit](learn, [tricks[c]() for c in order])
    pos = [r[-1] for r in learn.watch.rows if r[1]]
    base = combined_cos(.25, .01/25, .01, .01/1e5) if fit=='one_cycle' else lambda p: .01
    want = [base(p)*(.1+.9*min(1, 2*p))*(1 if p<.5 else 2) for p in pos]
    got = [r[5] for r in learn.watch.rows if r[1]]
    assert got==pytest.approx(want, rel=1e-6)

class Bomb(Callback):
    "Raises in one event of epoch 1"
    order = 95
    def __init__(self, event_name, ex): self.event_name,self.ex = event_name,ex
    def __call__(self, event_name):
        if event_name==self.event_name and (self.epoch==1 or event_name in ('before_fit','after_fit')): raise self.ex

@pytest.mark.parametrize('ex', [RuntimeError('out of memory'), KeyboardInterrupt(), CancelFitException()])
@pytest.mark.parametrize('event_name', ['before_fit','before_train','before_batch','after_step','after_batch','before_validate','after_epoch','after_fit'])
@pytest.mark.parametrize('attached', [True, False])
@pytest.mark.parametrize('opt_func', [SGD, torch_sgd])
def test_put_back_after_failure(few, ex, event_name, attached, opt_func):
    if isinstance(ex, CancelFitException) and event_name=='after_fit': pytest.skip('nothing catches it there in fastai')
    all_five = [t() for t in tricks.values()]
    learn = make(few, opt_func=opt_func, cbs=all_five if attached else None)
    before = snapshot(learn)
    try: learn.fit(2, .01, cbs=[Bomb(event_name, ex), *([] if attached else all_five)])
    except (RuntimeError,KeyboardInterrupt) as e: assert type(e) is type(ex)
    else: assert isinstance(ex, CancelFitException)
    assert snapshot(learn)==before and learn.opt.hypers[-1]['lr']==pytest.approx(.01)
    learn.fit(2, .01, cbs=[] if attached else all_five) # And it can go on
    assert snapshot(learn)==before and len(learn.watch.rows)>0

@pytest.mark.parametrize('opt_func', [SGD, torch_sgd])
def test_two_exclusions_are_one(few, opt_func):
    learn = make(few, opt_func=opt_func, cbs=BNWeightDecayExclusion())
    before = snapshot(learn)
    learn.fit(1, slice(.001,.01), cbs=BNWeightDecayExclusion())
    after = snapshot(learn)
    assert all(after[k]==before[k] for k in ('groups','hooks','dls')) # fastai drops the attribute of two callbacks of one name
    learn.fit_one_cycle(1, slice(.001,.01))

class ValidateInside(Callback):
    "Evaluates in the middle of the fit, as for a test set; fastai sends a second before_fit for it"
    order = 80
    def after_epoch(self):
        if self.epoch<2 and not hasattr(self, 'busy'):
            self.busy = True
            self.learn.validate()
            del self.busy

def test_validate_inside_a_fit(few):
    learn,log,shapes = make(few, opt_func=torch_sgd),EpochLog(),[]
    class Shapes(Callback):
        def before_batch(self): shapes.append((self.epoch, self.training, *self.x.shape[-2:]))
    before = snapshot(learn)
    learn.fit(2, .01, cbs=[ProgressiveResize({0:32, 1:40}), DynamicBatchSize({0:20, 1:40}), RectValidation({0:True, 1:False}),
                           BNWeightDecayExclusion(), log, ValidateInside(), Shapes()])
    assert snapshot(learn)==before and [(r['size'],r['bs']) for r in log.rows]==[(32,20),(40,40)]
    assert {s[2:] for s in shapes if s[0]==1 and not s[1]}=={(40,40)}
    assert any(min(s[2:])==32<max(s[2:]) for s in shapes if not s[1])

def test_lr_does_not_compound_when_an_epoch_is_cut_short(few):
    learn = make(few)
    learn.fit(3, .01, cbs=[DynamicBatchSize({0:10, 1:20}), ShortEpochCallback(.3, short_valid=False)])
    assert {r[0]: r[5] for r in learn.watch.rows if r[1]}==pytest.approx({0:.01, 1:.02, 2:.02})

def test_epoch_log_and_target_when_an_epoch_is_cut_short(few):
    learn,log = make(few),EpochLog()
    learn.fit(2, .01, cbs=[log, DynamicBatchSize({0:20, 1:40}), ShortEpochCallback(.3, short_valid=False), TimeToAccuracy(top1=.99)])
    assert [r['lr'] for r in log.rows]==pytest.approx([.01,.02])
    assert all(0<=r['top1']<=1 and r['valid_loss']>1 for r in log.rows)

def tensor_learner(n_train=12, n_valid=0, bs=4, **kwargs):
    items = [(torch.randn(4), torch.tensor(i%2)) for i in range(n_train+n_valid)]
    dls = DataLoaders.from_dsets(items[:n_train], items[n_train:], bs=bs, num_workers=0, device='cpu', **kwargs)
    learn = Learner(dls, nn.Linear(4, 2), nn.CrossEntropyLoss(), metrics=accuracy)
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

def test_an_epoch_without_a_batch_is_said():
    with pytest.raises(ValueError, match='Epoch 0 has no batch: there are 12 training images, fewer than one batch of 16. Use smaller batches'):
        tensor_learner(bs=16, drop_last=True).fit(1, cbs=EpochLog())

def scalars(path):
    events = EventAccumulator(str(path)).Reload()
    return {k: [e.value for e in events.Scalars(k)] for k in events.Tags()['scalars']}

def test_tensorboard_without_validation_pictures(tmp_path):
    tensor_learner().fit(1, cbs=TensorBoard(tmp_path, every=1))
    assert 'losses/xent' in (found := scalars(tmp_path)) and not {'losses/test_xent','losses/test_1'} & found.keys()

def test_tensorboard_counts_pictures_of_uneven_batches(tmp_path):
    "A point tells of all steps since the one before: here of batches of 8 and 2"
    tensor_learner(10, bs=8, shuffle=False, drop_last=False).fit(1, cbs=TensorBoard(tmp_path, every=2))
    found = scalars(tmp_path)
    assert found['sizes/batch']==found['sizes/batch_total']==[5] and found['times/images_s'][0]==pytest.approx(5000/found['times/step'][0], rel=1e-4)

def test_minutes_to_the_target_count_from_now():
    "Half of the errors go in two minutes; the last epoch ended a minute ago"
    rows = [dict(minutes=m, top1=a) for m,a in ((2,.6), (4,.8), (6,.9))]
    live,learn = LiveView(),tensor_learner()
    learn.add_cbs([live, log := EpochLog(), TimeToAccuracy(top1=.95)])
    for ago,said in ((1,'in 1.0 min'), (5,'in 0.0 min')):
        log.rows,log.began = rows,time.perf_counter()-60*(6+ago)
        assert list(live._targets(1.5))==[f'top1 0.95 {said}']

def test_loaders_wrapped_for_distributed_training_are_unwrapped_after_the_fit(few):
    "As `DistributedTrainer` does: wrap in before_fit (order 11), put back in after_fit"
    class Wrap(Callback):
        order = 11
        def before_fit(self):
            self.plain = list(self.dls.loaders)
            self.learn.dls.loaders = [self.wrap(d) for d in self.plain]
        def after_fit(self): self.learn.dls.loaders = self.plain
        def wrap(self, dl):
            res = dl.new()
            res.dl = dl
            return res
    learn = make(few)
    before = snapshot(learn)
    learn.fit(2, .01, cbs=[Wrap(), RectValidation(1), ProgressiveResize({1:32})])
    assert snapshot(learn)==before

def test_schedule_refuses_its_callbacks_twice(few):
    sched = Schedule([Phase(1, size=32, bs=20, lr=.01)])
    for cb in (ProgressiveResize({0:32}), DynamicBatchSize({0:8}), RectValidation()):
        with pytest.raises(ValueError, match='brings its own'): make(few, cbs=cb).fit_phases(sched)
        with pytest.raises(ValueError, match='brings its own'): make(few).fit_phases(sched, cbs=cb)
    make(few, opt_func=torch_sgd, cbs=BNWeightDecayExclusion()).fit_phases(sched)

def test_what_a_schedule_cannot_do_is_said(few):
    learn = make(few)
    with pytest.warns(UserWarning, match='All phases train on'): learn.fit_phases(Schedule([Phase(1, size=32, bs=20, lr=.01, data='-sz/160')]))
    with pytest.warns(UserWarning, match='min_scale is ignored'):
        learn.fit_phases(Schedule([Phase(1, size=32, bs=20, lr=.01), Phase(1, min_scale=.5)]))
    dl = torch.utils.data.DataLoader([(torch.zeros(3,32,32), torch.tensor(0))]*8, batch_size=4)
    plain = Learner(DataLoaders(dl, dl), resnet_small(2,4), nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match='plain PyTorch DataLoader'): plain.fit_phases(Schedule([Phase(1, size=32, bs=4, lr=.01)]))

def test_pickle_holds_no_loaders(few, tmp_path):
    learn = make(few, cbs=[t() for t in tricks.values()])
    learn.remove_cb(Watch)
    learn.path = tmp_path
    learn.fit(1, .01)
    learn.export()
    assert (tmp_path/'export.pkl').stat().st_size<2e6 and load_learner(tmp_path/'export.pkl').predict(few/'val/star_a/00000.jpg')

def test_idle_outside_fit(few):
    learn = make(few, cbs=[t() for t in tricks.values()])
    before = snapshot(learn)
    shapes = set()
    class Shapes(Callback):
        def before_batch(self): shapes.add(tuple(self.x.shape[-2:]))
    learn.add_cb(Shapes())
    learn.lr_find(num_it=6, show_plot=False)
    learn.validate()
    learn.get_preds()
    learn.remove_cb(Shapes)
    assert shapes=={(48,48)} and snapshot(learn)==before

@pytest.mark.parametrize('workers,persistent', [(0,False), (2,False), (2,True)])
@pytest.mark.parametrize('pipe', pipes)
def test_workers_see_the_changes(few, pipe, workers, persistent):
    learn = make(few, pipe, block, workers=workers, persistent_workers=persistent)
    learn.fit(3, .01, cbs=[ProgressiveResize({0:32, 1:64, 2:48}), DynamicBatchSize({0:20, 1:40, 2:10}), RectValidation(2)])
    for e,(s,b) in enumerate([(32,20), (64,40), (48,10)]):
        rows = [r for r in learn.watch.rows if r[0]==e]
        assert {r[2:5] for r in rows if r[1]}=={(s,s,b)} and sum(r[4] for r in rows if r[1])==80
        assert sum(r[4] for r in rows if not r[1])==60
        shapes = {r[2:4] for r in rows if not r[1]}
        assert {min(o) for o in shapes}=={s} and (shapes!={(s,s)})==(e==2)

def test_validation_stays(few):
    learn = make(few, 'aug')
    learn.fit(2, .01, cbs=[ProgressiveResize({0:32, 1:40}, valid=False), RectValidation(1)])
    assert {r[2:4] for r in learn.watch.rows if r[1]}=={(32,32), (40,40)}
    assert {min(r[2:4]) for r in learn.watch.rows if not r[1]}=={48}

def test_each_split_has_its_own_transforms(few):
    "Where training and validation have different sizes (arxiv.org/abs/1906.06423), the one says nothing about the other"
    item = [RandomResizedCrop(32, split_idx=0), RectCrop(40)]
    pipes['fixres'] = lambda: (item, None)
    try: learn = make(few, 'fixres')
    finally: del pipes['fixres']
    assert [dl_size(dl) for dl in learn.dls.loaders]==[32,40]
    before = snapshot(learn)
    learn.fit(2, .01, cbs=ProgressiveResize({0:16, 1:32}))
    assert snapshot(learn)==before
    assert [{r[2:4] for r in learn.watch.rows if r[:2]==(e,t)} for t in (True,False) for e in (0,1)]==[{(s,s)} for s in (16,32,16,32)]
    rect = rect_dl(learn.dls.train)
    assert {min(b[0].shape[-2:]) for b in rect}=={32} and rect._crop().crop_pct==.875, 'the margin of validation'

def test_size_of_batch_transforms_after_validation(few):
    "fastai's affine transforms note in `split_idx` where they ran last, and run everywhere"
    learn = make(few, 'aug')
    learn.fit(1, .01)
    assert [dl_size(dl) for dl in learn.dls.loaders]==[48,48] and len(sizers(learn.dls.train))==2

def test_min_scale_by_epoch(few):
    learn,seen = make(few, 'rrc'),[]
    class Note(Callback):
        def before_train(self): seen.append(sizers(self.dls.train)[0].min_scale)
    learn.fit(3, .01, cbs=[ProgressiveResize({0:32}, min_scale={0:.9, 2:.2}), Note()])
    assert seen==[.9,.9,.2] and sizers(learn.dls.train)[0].min_scale==.4

def test_resume_at_an_epoch(few):
    learn = make(few)
    learn.fit(3, .01, cbs=[t() for t in tricks.values()], start_epoch=1)
    assert {r[2:5] for r in learn.watch.rows if r[1]}=={(48,48,40)} and {r[0] for r in learn.watch.rows}=={1,2}

def test_freeze_and_discriminative_lrs_keep_their_meaning(few):
    "With the exclusion on a PyTorch optimizer: frozen layers stay, groups keep their own lr, the saved state loads in a plain one"
    learn = make(few, opt_func=torch_sgd)
    learn.freeze()
    body = [p.clone() for p in learn.model[:4].parameters() if p.ndim>1]
    learn.fit(1, .1, wd=.1, cbs=BNWeightDecayExclusion())
    assert all(torch.equal(a,b) for a,b in zip(body, [p for p in learn.model[:4].parameters() if p.ndim>1]))
    learn.unfreeze()
    seen = []
    class Note(Callback):
        def after_step(self): seen.append(tuple(h['lr'] for h in self.opt.hypers))
    learn.fit(1, slice(1e-3,1e-1), cbs=[BNWeightDecayExclusion(), Note()])
    assert {len(s) for s in seen}=={2} and seen[0]==pytest.approx((1e-3,1e-1))
    plain = make(few, opt_func=torch_sgd)
    plain.opt.load_state_dict(learn.opt.state_dict())

def test_weight_decay_measured_on_norms(few):
    "Steps of pure decay shrink just the parameters that should shrink, in a real ResNet with two groups"
    for opt_func in (SGD, Adam, torch_sgd, partial(OptimWrapper, opt=partial(torch.optim.AdamW, fused=True))):
        learn = make(few, opt_func=opt_func)
        learn.loss_func = lambda p,t: 0*p.sum()
        with torch.no_grad(): [nn.init.ones_(p) for p in learn.model.parameters()]
        learn.fit(1, .1, wd=.1, cbs=BNWeightDecayExclusion())
        norm = {n for n,p in learn.model.named_parameters() if float((p-1).abs().max())<1e-6}
        want = {f'{n}.{k}' for n,m in learn.model.named_modules() for k,_ in m.named_parameters(recurse=False)
                if isinstance(m, nn.BatchNorm2d) or k=='bias'}
        assert norm==want, opt_func
