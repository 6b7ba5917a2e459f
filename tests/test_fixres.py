"Test resolution: images held out, the search, and averaged weights"
import copy
from collections import Counter
import numpy as np, pytest, torch
from fastai.vision.all import Callback, SaveModelCallback, CrossEntropyLossFlat, ImageDataLoaders, Learner, OptimWrapper, Resize, accuracy, partial, set_seed
from fastai_fastimagenet.all import *
from fastai_fastimagenet.core import FitCallback

pytestmark = pytest.mark.filterwarnings('ignore')

@pytest.fixture
def dls(small_photos): return imagenet_dls(small_photos, 32, 16, min_scale=.35, workers=0)

def learner(dls):
    sgd = partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9)
    return Learner(dls, resnet_small(dls.c, 4), CrossEntropyLossFlat(), opt_func=sgd, metrics=accuracy)

@pytest.mark.parametrize('share', [.01,.2,.5])
def test_held_out_pictures_are_not_trained_on(dls, share):
    before = set(dls.train_ds.items.rows)
    held = hold_out(dls, share, seed=1)
    kept,out = set(dls.train_ds.items.rows),set(held.dataset.items.rows)
    assert kept|out==before and not kept&out and len(kept)==dls.train.n
    assert set(Counter(held.dataset.items.labels).values())=={max(1, round(20*share))} and len(Counter(held.dataset.items.labels))==20
    seen = torch.cat([y for _,y in dls.train])
    assert len(seen)==len(kept)//16*16 and dls.valid.n==100
    x,y = held.one_batch()
    assert x.shape[1:]==(3,32,32) and y[0]==held.dataset[0][1]
    assert [dls.vocab[held.dataset[i][1]] for i in range(5)]==[held.dataset.items[i].parent.name for i in range(5)]

def test_other_seed_other_pictures(small_photos):
    rows = [hold_out(imagenet_dls(small_photos, 32, 16, workers=0), .2, seed=s).dataset.items.rows.tolist() for s in (0,0,1)]
    assert rows[0]==rows[1]!=rows[2]

def test_search(dls):
    held,learn = hold_out(dls, .2),learner(dls)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2, 1e-2)
    table = find_test_size(learn, held, sizes=[32,48], crop_pcts=(.875,))
    assert len(table)==4 and table.top1.is_monotonic_decreasing
    for r in table.itertuples():
        dl = (rect_dl if r.rect else centre_dl)(held, r.size, crop_pct=r.crop_pct)
        with learn.no_bar(), learn.no_logging(): loss,top1 = learn.validate(dl=dl)
        assert (loss,top1)==(pytest.approx(r.loss, abs=1e-5),pytest.approx(r.top1))
        assert r.pixels==(pytest.approx(sum(x.shape[0]*x.shape[2]*x.shape[3] for x,_ in dl)/held.n, abs=1) if r.rect else r.size**2)
    assert list(find_test_size(learn, held)['size'].unique())==[32] # 1.5 times 32 is no multiple of 32
    assert type(held).__name__=='ImageDL' and learn.dls.valid is dls.valid

def test_loaders_of_fastai_can_be_searched(small_photos):
    "The search takes any loader of images"
    dls = ImageDataLoaders.from_folder(small_photos, valid='val', item_tfms=Resize(32), bs=16, num_workers=0)
    table = find_test_size(learner(dls), dls.test_dl(dls.valid_ds.items[:40], with_labels=True), sizes=[32,64], crop_pcts=(1.,))
    assert len(table)==4 and set(table[~table.rect].pixels)=={32**2,64**2}

def test_bad_input(dls, small_photos):
    plain = ImageDataLoaders.from_folder(small_photos, valid='val', item_tfms=Resize(32), bs=16, num_workers=0)
    with pytest.raises(ValueError, match='`hold_out` needs the loaders of `imagenet_dls`'): hold_out(plain)
    for share in (0,1,-.1):
        with pytest.raises(ValueError, match='`share` must be between 0 and 1'): hold_out(dls, share)
    with pytest.raises(ValueError, match='20 training images would be left, fewer than a batch of 32'): hold_out(imagenet_dls(small_photos, 32, 32, workers=0), .99) # One of each class
    for dl in (dls, dls.train, dls.valid, rect_dl(dls), dls.valid.new()):
        with pytest.raises(ValueError, match='not the training or validation set'): find_test_size(learner(dls), dl)
    assert rect_dl(dls, np.int64(64)).n==rect_dl(dls, 64).n
    with pytest.raises(ValueError, match='`decay` must be between 0 and 1'): WeightEMA(1.)

class Steps(FitCallback):
    "The weights after each step, and what was evaluated"
    order,run_valid = 80,True
    def before_fit(self): self.after,self.evaluated = [],[]
    def after_step(self): self.after.append(copy.deepcopy(self.learn.model.state_dict()))
    def before_validate(self): self.evaluated.append(copy.deepcopy(self.learn.model.state_dict()))

def same(a, b, tol=0): return all(torch.allclose(a[k].float(), b[k].float(), rtol=tol, atol=tol) for k in a)

def test_average_of_weights(dls):
    set_seed(0)
    learn,steps = learner(dls),Steps()
    model,avg = learn.model,None
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2, cbs=[WeightEMA(.9), steps])
    for n,w in enumerate(steps.after):
        d = min(.9, (1+n)/(10+n))
        avg = {k: v.double() for k,v in w.items()} if n==0 else {k: d*avg[k]+(1-d)*w[k].double() for k in w}
        if n in (24,49): assert all((avg[k]-v.double()).abs().max()<1e-5 for k,v in steps.evaluated[n//25].items() if 'num_batches' not in k)
    assert len(steps.after)==50 and not same(steps.after[-1], steps.evaluated[-1], 1e-5)
    assert learn.model is model and same(learn.model.state_dict(), steps.evaluated[-1])

def test_the_model_that_is_saved_is_the_one_that_was_evaluated(dls, tmp_path):
    learn,steps = learner(dls),Steps()
    learn.path = tmp_path
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2, cbs=[WeightEMA(.9), SaveModelCallback(monitor='valid_loss', every_epoch=True), steps])
    for k in range(2): assert same(torch.load(tmp_path/f'models/model_{k}.pth'), steps.evaluated[k])

def test_a_stopped_fit_keeps_its_weights(dls):
    "Also one that is stopped while the average is evaluated"
    for event in ('after_batch','before_validate','after_pred'):
        learn = learner(dls)
        model,n,before = learn.model,[0],copy.deepcopy(learn.model.state_dict())
        def stop(self, event=event):
            n[0] += 1
            if n[0]>(3 if event!='after_pred' else 26): raise KeyboardInterrupt
            if event=='before_validate': raise KeyboardInterrupt
        with learn.no_bar(), learn.no_logging(), pytest.raises(KeyboardInterrupt): learn.fit(1, 1e-2, cbs=[WeightEMA(), Callback(**{event: stop})])
        assert learn.model is model and not same(before, model.state_dict(), 1e-5)

def test_going_on_with_averages(dls, tmp_path):
    class StopAt(FitCallback):
        run_valid,order = False,90
        def after_batch(self):
            if self.learn.train_iter==30: raise KeyboardInterrupt
    def fit(folder, stop=False, resume=False):
        set_seed(3)
        learn = learner(dls)
        with learn.no_bar(), learn.no_logging():
            try: learn.fit(2, 1e-2, cbs=[WeightEMA(.95), Checkpoint(folder, minutes=1e-9, resume=resume), *([StopAt()] if stop else [])])
            except KeyboardInterrupt: pass
        return learn.model.state_dict()
    whole,_,resumed = fit(tmp_path/'a'),fit(tmp_path/'b', stop=True),fit(tmp_path/'b', resume=True)
    assert same(whole, resumed)
