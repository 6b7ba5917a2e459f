"Loaders of a folder: what a batch is, how epochs follow each other, and everything that fastai does with them"
import copy, gc, itertools, math, os, pickle, re, shlex, shutil, subprocess, sys, time
from collections import Counter
from multiprocessing.util import Finalize
from pathlib import Path
import numpy as np, pytest, torch
from hypothesis import given, strategies as st
from PIL import Image
import matplotlib.pyplot as plt
from fastai.vision.all import (ClassificationInterpretation, ImageDataLoaders, IntToFloatTensor, Learner, MixUp, Pipeline, Resize, SGD, TensorCategory,
    TensorImage, ToTensor, accuracy, aug_transforms, load_learner, set_seed, top_k_accuracy)
from fastai_fastimagenet.all import DynamicBatchSize, Phase, PhaseData, ProgressiveResize, RectValidation, Schedule, imagenet_dls, resnet_small
from fastai_fastimagenet.batch import CentreView, RandomView, make_batch, uniforms
from fastai_fastimagenet.core import FitCallback
from fastai_fastimagenet.image_dl import Images
from fastai_fastimagenet.pool import WorkerPool
from fastai_fastimagenet.rank_dl import RankDL

def batches(dl): return [(x.clone(), y.clone()) for x,y in dl]
def same(a, b): return len(a)==len(b) and all(torch.equal(p, q) for x,y in zip(a, b) for p,q in zip(x, y))

@pytest.fixture
def dls(small_photos):
    dls = imagenet_dls(small_photos, 32, 16, workers=2)
    yield dls
    dls.pool.close()

@given(st.integers(1, 3000), st.integers(1, 3000), st.floats(.01, 1), st.integers(0, 2**64-1))
def test_boxes_lie_in_the_picture(w, h, min_scale, seed):
    n = 50
    ws,hs,rows = np.full(n, w),np.full(n, h),np.arange(n)
    for view in (RandomView((64,64), seed, min_scale), CentreView((64,96)), CentreView((64,64), 1.)):
        (x,y,bw,bh),flips = view.boxes(rows, ws, hs)[0].T,view.boxes(rows, ws, hs)[1]
        assert (x>=0).all() and (y>=0).all() and (bw>=1).all() and (bh>=1).all() and (x+bw<=w).all() and (y+bh<=h).all()

def test_random_boxes_are_those_of_torchvision():
    "Share of the area, aspect ratio and place have the same distribution"
    from torchvision.transforms import RandomResizedCrop as TorchCrop
    torch.manual_seed(0)
    w,h,n,im = 500,333,4000,torch.zeros(3, 333, 500)
    theirs = np.array([TorchCrop.get_params(im, (.08,1.), (3/4,4/3)) for _ in range(n)]) # Upper, left, height, width
    ours = RandomView((64,64), 5).boxes(np.arange(n), np.full(n, w), np.full(n, h))[0]
    for a,b in ((ours[:,2]*ours[:,3], theirs[:,2]*theirs[:,3]), (ours[:,2]/ours[:,3], theirs[:,3]/theirs[:,2]), (ours[:,0], theirs[:,1]), (ours[:,1], theirs[:,0])):
        q = np.linspace(.05, .95, 10)
        assert np.abs(np.quantile(a, q)-np.quantile(b, q)).max() < .05*(np.quantile(b, .95)-np.quantile(b, .05))

def test_random_numbers_do_not_repeat():
    u = uniforms(0, np.arange(1000), 23)
    assert len(np.unique(u))==u.size and abs(u.mean()-.5)<.01
    assert not (uniforms(1, np.arange(1000), 23)==u).any() and not (uniforms(2**63, np.arange(1000), 23)==u).any()

def test_workers_do_not_change_batches(small_photos):
    runs = []
    for workers in (0, 1, 3):
        set_seed(3)
        dls = imagenet_dls(small_photos, 32, 16, workers=workers)
        runs.append([b for _ in range(2) for dl in dls.loaders for b in batches(dl)])
        dls.pool.close()
    assert same(runs[0], runs[1]) and same(runs[0], runs[2])

@pytest.mark.parametrize('workers', (0, 2))
def test_processes_share_the_epoch_of_one(small_photos, workers):
    set_seed(0)
    dls = imagenet_dls(small_photos, 32, 16, workers=workers)
    one = batches(RankDL(dls.train, 0, 1, train=True, seed=7))
    dls.train.bs = 8
    parts = [batches(RankDL(dls.train, r, 2, train=True, seed=7)) for r in range(2)]
    assert len(one)==len(parts[0])==len(parts[1])==25
    for (x,y),a,b in zip(one, *parts): assert torch.equal(x, torch.cat([a[0],b[0]])) and torch.equal(y, torch.cat([a[1],b[1]]))
    again = batches(RankDL(dls.train, 1, 2, train=True, seed=7, cuts=[(2,16*20,10)]))
    assert same(again, parts[1][20:])
    dls.pool.close()

def test_next_epoch_waits_in_the_pool(dls):
    "After training and validation have been seen once, the first batches of each are made while the other one runs"
    pool,handed = dls.pool,[]
    def both(): return batches(dls.train),batches(dls.valid)
    both()
    assert pool.guess is not None # Training, again
    guess = pool.guess[1]
    train = [b for b in dls.train.raw_batches()]
    assert [j for j in pool.guess[1]] and pool.guess[1]!=guess
    y = torch.cat([y for _,y in train])
    want = np.concatenate([np.frombuffer(j[2], np.int64) for j in guess])
    assert y.tolist()==want.tolist() # What was foreseen is what was run

def test_wrong_guesses_are_dropped(dls):
    a = batches(dls.train)
    batches(dls.valid)
    dls.train.bs = 8 # Not announced
    assert [len(y) for _,y in dls.train]==[8]*50
    assert [len(y) for _,y in dls.valid]==[16]*6+[4]

def test_an_epoch_that_breaks_off_leaves_nothing(dls):
    it = iter(dls.train)
    next(it)
    del it
    for _ in range(2): # All classes as often as there are images of them: each was seen once
        ys = [y for _,y in dls.train]
        assert [len(y) for y in ys]==[16]*25 and Counter(torch.cat(ys).tolist())==Counter(dls.train_ds.items.labels.tolist())

def test_same_processes_for_all_epochs(small_photos):
    dls = imagenet_dls(small_photos, 32, 16, workers=2)
    learn = Learner(dls, resnet_small(dls.c, 4), metrics=accuracy)
    pids = []
    class Pids(FitCallback):
        def after_batch(self): pids.append(frozenset(w.pid for w in dls.pool.results._workers))
    with learn.no_bar(), learn.no_logging(): learn.fit(3, cbs=[Pids(), ProgressiveResize({0:32, 1:64}), DynamicBatchSize({0:16, 2:8}), RectValidation(1)])
    assert len(set(pids))==1 and len(pids[0])==2
    pids = pids[0]
    del learn, dls
    gc.collect()
    deadline = time.monotonic()+20
    while any(Path(f'/proc/{p}').exists() for p in pids) and time.monotonic()<deadline: time.sleep(.05)
    assert not any(Path(f'/proc/{p}').exists() for p in pids), 'processes outlive their loaders'

def test_callbacks_and_guesses_agree(small_photos):
    "In a fit whose sizes, batches and crops change, every epoch of training but the first is foreseen"
    dls = imagenet_dls(small_photos, 32, 16, workers=2)
    learn = Learner(dls, resnet_small(dls.c, 4), metrics=accuracy)
    kept,run = [],dls.pool.run
    def spy(jobs, kind, again):
        kept.append((kind, dls.pool.guess is not None and dls.pool.guess[1]==jobs))
        return run(jobs, kind, again)
    dls.pool.run = spy
    cbs = [ProgressiveResize({0:32, 1:48, 3:64}, {0:.2, 2:.5}), DynamicBatchSize({0:16, 2:8})]
    with learn.no_bar(), learn.no_logging(): learn.fit(4, cbs=cbs)
    assert [k for t,k in kept if t]==[False,True,True,True]
    assert [k for t,k in kept if not t]==[True]*4
    assert dls.train.announced=={} and dls.train.bs==16
    dls.pool.close()

def test_shapes_and_sizes_in_training(dls):
    for x,y in dls.train: assert x.shape==(16,3,32,32) and x.is_contiguous(memory_format=torch.channels_last) and x.dtype==torch.float32
    assert type(x)==TensorImage and type(y)==TensorCategory
    half = imagenet_dls(dls.path, 32, 16, workers=0, dtype=torch.bfloat16)
    assert half.one_batch()[0].dtype==torch.bfloat16

def test_what_fastai_does_with_loaders(dls, tmp_path):
    learn = Learner(dls, resnet_small(dls.c, 8), metrics=accuracy, path=tmp_path)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, .01)
        preds,targs = learn.get_preds()
        loss,acc = learn.validate()
        assert float(accuracy(preds, targs))==pytest.approx(acc) and targs.tolist()==dls.valid_ds.items.labels.tolist()
        tta = learn.tta(n=2)[0]
        assert tta.shape==preds.shape and not torch.equal(tta, preds)
        f = dls.valid_ds.items[3]
        test = learn.dls.test_dl([f, dls.valid_ds.items[5]])
        assert torch.allclose(learn.get_preds(dl=test)[0], preds[[3,5]], atol=.05)
        assert learn.predict(f)[0] in dls.vocab
        train_preds = learn.get_preds(ds_idx=0)
        assert train_preds[1].tolist()==dls.train_ds.items.labels.tolist()
        learn.show_results(max_n=2)
        interp = ClassificationInterpretation.from_learner(learn)
        assert interp.confusion_matrix().sum()==100
        assert 1e-7<learn.lr_find(num_it=12, show_plot=False).valley<10
        learn.export('m.pkl')
        assert load_learner(tmp_path/'m.pkl').predict(f)[1]==learn.predict(f)[1]
    dls.show_batch(max_n=4)
    dls.train.show_batch(max_n=4, unique=True)
    dls.valid.show_batch(max_n=2)
    assert 'star_a' in dls.vocab and dls.c==20 and str(dls.train_ds.items)=='400 images in '+str(dls.path)
    plt.close('all')

def test_unique_shows_crops_that_differ(dls):
    dl = dls.train
    dl.get_idxs = lambda: itertools.repeat(3)
    x,y = dl.one_batch()
    assert len(set(y.tolist()))==1 and not torch.equal(x[0], x[1])

def test_batch_transforms_of_fastai(small_photos):
    dls = imagenet_dls(small_photos, 32, 16, workers=0, batch_tfms=aug_transforms(size=24))
    x = dls.one_batch()[0]
    assert x.shape==(16,3,24,24) and x.dtype==torch.float32 and -3<x.min() and x.max()<3
    learn = Learner(dls, resnet_small(dls.c, 4), metrics=accuracy)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=MixUp())

def test_other_item_transforms_take_fastais_way(dls):
    dls.train.after_item = Pipeline([Resize(32), ToTensor()])
    dls.train.after_batch = Pipeline([IntToFloatTensor()])
    assert not dls.train.made_by_pool()
    dl = dls.train.new(num_workers=0)
    assert dl.one_batch()[0].shape==(16,3,32,32)

def test_phases_read_their_copies(tmp_path, small_photos):
    path = tmp_path/'d'
    shutil.copytree(small_photos, path, ignore=shutil.ignore_patterns('.*'))
    for f in (path).rglob('*.jpg'): # Copies that can be told apart: 40 pixels, one of them missing
        g = tmp_path/'d-sz/40'/f.relative_to(path)
        g.parent.mkdir(parents=True, exist_ok=True)
        Image.open(f).resize((40,40)).save(g)
    next((tmp_path/'d-sz/40/train').rglob('*.jpg')).unlink()
    dls = imagenet_dls(path, 32, 20, workers=2)
    learn = Learner(dls, resnet_small(dls.c, 4), opt_func=SGD, metrics=[accuracy, top_k_accuracy])
    seen = []
    class Look(FitCallback):
        def before_batch(self):
            ds = dls.loaders[0 if self.learn.training else 1].dataset
            seen.append((self.epoch, self.learn.training, len(ds), ds.items.source.root[len(str(tmp_path)):]))
    sched = Schedule([Phase(2, size=32, bs=20, lr=.01, data='-sz/40'), Phase(1, data='', rect=True)])
    with learn.no_bar(), learn.no_logging(): learn.fit_phases(sched, cbs=Look())
    want = [(e, t, n, root) for e in range(3) for t,n,steps in ((True,399 if e<2 else 400,19 if e<2 else 20), (False,100,5)) for root in ['/d-sz/40' if e<2 else '/d'] for _ in range(steps)]
    assert seen==want
    assert dls.train.n==400 and dls.train_ds.items.source.root==str(path)

def test_missing_copies_are_said(small_photos, capsys):
    dls = imagenet_dls(small_photos, 32, 16, workers=0)
    learn = Learner(dls, resnet_small(dls.c, 4), metrics=accuracy)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=PhaseData({0:'-sz/160'}))
    assert f'fastimagenet-presize {small_photos}' in capsys.readouterr().out
    with pytest.raises(ValueError, match='needs the loaders of `imagenet_dls`'):
        plain = ImageDataLoaders.from_folder(small_photos, valid='val', item_tfms=Resize(32), bs=16, num_workers=0)
        Learner(plain, resnet_small(20, 4)).fit(1, cbs=PhaseData({0:'-sz/160'}))
    with pytest.raises(ValueError, match='suffix of a folder'): PhaseData({0:160})

def test_the_command_for_copies_can_be_pasted(small_photos, tmp_path, capsys):
    path = tmp_path/'my photos'
    path.symlink_to(small_photos)
    dls = imagenet_dls(path, 32, 16, workers=0)
    dls.path = path
    learn = Learner(dls, resnet_small(dls.c, 4))
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=PhaseData({0:'-sz/160'}))
    command = re.search('Make it by `(.+)`', capsys.readouterr().out)[1]
    assert shlex.split(command)==['fastimagenet-presize',str(path),'--short','160']

def test_copies_of_other_classes_are_refused(small_photos, tmp_path):
    path = tmp_path/'d'
    shutil.copytree(small_photos, path)
    shutil.copytree(small_photos, tmp_path/'d-sz/64')
    shutil.rmtree(tmp_path/'d-sz/64/train/bus_a'); shutil.rmtree(tmp_path/'d-sz/64/val/bus_a')
    learn = Learner(imagenet_dls(path, 32, 16, workers=0), resnet_small(20, 4))
    with pytest.raises(ValueError, match='has 19 classes'), learn.no_bar(): learn.fit(1, cbs=PhaseData({0:'-sz/64'}))

def test_a_changed_file_is_named(small_photos, tmp_path):
    path = tmp_path/'d'
    shutil.copytree(small_photos, path)
    for workers in (0, 1):
        dls = imagenet_dls(path, 32, 16, workers=workers)
        f = dls.train_ds.items[5]
        old = f.read_bytes()
        f.write_bytes(b'no image')
        with pytest.raises(OSError, match=f.name): batches(dls.train)
        f.write_bytes(old)
        dls.pool.close()

def test_exif_is_applied_when_asked(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    im = Image.fromarray(np.dstack([np.tile(np.linspace(0, 255, 80, dtype=np.uint8), (40,1))]*3)) # Dark left, light right
    for s in ('train','val'):
        for c in 'ab':
            (tmp_path/s/c).mkdir(parents=True)
            for i in range(2): im.save(tmp_path/s/c/f'{i}.jpg', exif=exif, quality=95)
    plain,turned = (imagenet_dls(tmp_path, 32, 2, workers=0, exif=e).valid for e in (False,True))
    (x,_),(y,_) = next(plain.raw_batches()),next(turned.raw_batches())
    assert (x[0,0,16,28]-x[0,0,16,3].float())>80 and abs(y[0,0,16,28].float()-y[0,0,16,3].float())<20 # Turned right: the dark side is up
    assert (y[0,0,28,16]-y[0,0,3,16].float())>80
    assert plain.dataset.items.aspects()[0]==2 and turned.dataset.items.aspects()[0]==.5

def test_a_pool_in_a_copy_starts_its_own_processes():
    pool = WorkerPool(math.sqrt, 1)
    assert list(pool.run([(4.,)]))==[2.]
    assert copy.deepcopy(pool) is pool
    other = pickle.loads(pickle.dumps(pool))
    assert other.results is None and list(other.run([(9.,)]))==[3.]
    pool.close(); other.close()

def test_a_killed_worker_is_noticed():
    pool = WorkerPool(os._exit, 1)
    with pytest.raises(RuntimeError, match='DataLoader worker'): list(pool.run([(9,)]))
    pool.close()

@pytest.mark.parametrize('sig', ('SIGINT','SIGTERM','SIGUSR1'))
def test_a_signal_to_the_group_while_workers_start(sig):
    code = f"""
import os, signal, time
from fastai_fastimagenet.pool import WorkerPool
caught = []
signal.signal(signal.{sig}, lambda *args: caught.append(1))
def in_worker():
    signal.signal(signal.{sig}, signal.SIG_DFL)
    time.sleep(.5)
os.register_at_fork(after_in_parent=lambda: os.killpg(0, signal.{sig}), after_in_child=in_worker)
pool = WorkerPool(abs, 2)
assert list(pool.run([(-1,), (-2,)]))==[1, 2] and caught
pool.close()"""
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, start_new_session=True, timeout=120)
    assert r.returncode==0, r.stderr

def fails_at_its_end(x):
    Finalize(None, os._exit, args=(1,), exitpriority=0)
    return x

def test_closing_does_not_mind_a_worker_that_dies():
    pool = WorkerPool(fails_at_its_end, 2)
    for k in range(2):
        assert list(pool.run([(k,)]))==[k]
        pids = [w.pid for w in pool.results._workers]
        pool.close()
        assert not any(Path(f'/proc/{p}').exists() for p in pids)

def test_runs_inside_runs(dls):
    "Two loaders that take turns, and an evaluation in the middle of an epoch, give the batches that they give alone"
    state = dls.train.rng.getstate()
    alone = batches(dls.train),batches(dls.valid)
    dls.train.rng.setstate(state)
    turns = list(zip(dls.valid, dls.train))
    assert same([v for v,_ in turns], alone[1]) and same([t for _,t in turns], alone[0][:len(turns)])
    seen = []
    class Inside(FitCallback):
        def after_batch(self):
            seen.append(self.learn.training)
            if self.learn.training and self.iter==3: dl = dls.valid.new(); [y for _,y in dl]
    learn = Learner(dls, resnet_small(dls.c, 4), metrics=accuracy)
    with learn.no_bar(), learn.no_logging(): learn.fit(2, cbs=Inside())
    assert seen==([True]*25+[False]*7)*2

def test_after_an_interrupt_training_goes_on(dls):
    learn = Learner(dls, resnet_small(dls.c, 4), metrics=accuracy)
    class Stop(FitCallback):
        def after_batch(self):
            if self.learn.training and self.iter==5: raise KeyboardInterrupt
    with learn.no_bar(), learn.no_logging():
        with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=Stop())
        learn.fit(1)
    assert len(learn.recorder.losses)==25
    it = iter(dls.train.raw_batches())
    next(it)
    results,get = dls.pool.results,dls.pool.results._try_get_data
    def interrupted(*args, **kwargs):
        get(*args, **kwargs)
        raise KeyboardInterrupt # A result has left the queue and is lost
    results._try_get_data = interrupted
    with pytest.raises(KeyboardInterrupt): list(it)
    assert len(batches(dls.train))==25

def test_an_error_leaves_no_processes(dls, tmp_path):
    "Also while its traceback is kept"
    batches(dls.train)
    pids = [w.pid for w in dls.pool.results._workers]
    with pytest.raises(AttributeError) as kept: list(dls.pool.run([(None, b'', b'', None)]))
    assert kept.tb is not None and dls.pool.results is None and not any(Path(f'/proc/{p}').exists() for p in pids)
    assert len(batches(dls.train))==25

def test_batch_functions_of_fastai_are_called(dls):
    called = []
    dl = dls.valid.new(before_batch=lambda b: called.append(len(b)) or b, num_workers=0)
    assert not dl.made_by_pool() and len(list(dl))==7 and called[:2]==[16,16]

def test_interpretation_and_file_names(dls, tmp_path):
    learn = Learner(dls, resnet_small(dls.c, 4), metrics=accuracy)
    with learn.no_bar(), learn.no_logging():
        interp = ClassificationInterpretation.from_learner(learn)
        interp.plot_top_losses(4)
        f = str(dls.valid_ds.items[3])
        assert learn.predict(f)[1]==learn.predict(Path(f))[1]==learn.predict(Path(f).read_bytes())[1]
        (tmp_path/'bus_a').mkdir()
        shutil.copy(f, tmp_path/'bus_a/x.jpg')
        _,y = learn.get_preds(dl=dls.test_dl([tmp_path/'bus_a/x.jpg'], with_labels=True))
        assert dls.vocab[int(y[0])]=='bus_a'
    plt.close('all')

def test_copies_must_be_complete_and_alike(small_photos, tmp_path, capsys):
    from fastai_fastimagenet.presize import presize
    path = tmp_path/'d'
    shutil.copytree(small_photos, path, ignore=shutil.ignore_patterns('.*'))
    presize(path, short=(40,), workers=0)
    def fit(exif=False):
        learn = Learner(imagenet_dls(path, 32, 16, workers=0, exif=exif), resnet_small(20, 4), metrics=accuracy)
        with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=PhaseData({0:'-sz/40'}))
    with pytest.raises(ValueError, match='made without `--exif`'): fit(exif=True)
    next((tmp_path/'d-sz/40/train').rglob('*.jpg')).unlink()
    fit()
    assert 'has 399 training images' in capsys.readouterr().out
    next((tmp_path/'d-sz/40/val').rglob('*.jpg')).unlink()
    with pytest.raises(ValueError, match='99 validation images.*--short 40'): fit()

def test_an_index_of_other_pictures_is_refused(small_photos, tmp_path):
    path = tmp_path/'d'
    shutil.copytree(small_photos, path)
    dls = imagenet_dls(path, 32, 16, workers=0)
    shutil.copy(dls.train_ds.items[0], path/'train/ball_a/0 new.jpg')
    other = imagenet_dls(path, 32, 16, workers=0) # Writes the index anew
    with pytest.raises(RuntimeError, match='written anew'): batches(dls.train)
    assert len(batches(other.train))==25

def test_a_folder_of_another_layout_stays_as_it_is(tmp_path):
    (tmp_path/'pics').mkdir()
    with pytest.raises(ValueError, match='has no folder train.*it holds pics$'): imagenet_dls(tmp_path, 32, 16)
    assert [f.name for f in tmp_path.iterdir()]==['pics']

def test_bad_arguments(small_photos):
    for kwargs in (dict(size='64'), dict(bs=0), dict(bs=True), dict(workers=True), dict(min_scale=2), dict(workers=-1)):
        with pytest.raises(ValueError, match=f'`{next(iter(kwargs))}` must be'): imagenet_dls(small_photos, **{**dict(size=32, bs=16), **kwargs})
    with pytest.raises(ValueError, match='fewer than one batch of 512. Use batches of 400 or less'): imagenet_dls(small_photos, 32, 512)

@pytest.mark.parametrize('format', ('jpeg','raw'))
def test_copies_of_presize_are_loaded(small_photos, tmp_path, format):
    "Images of copies are those of the originals, in less detail; raw ones are the pixels that JPEG copies would have"
    from fastai_fastimagenet.presize import presize
    presize(small_photos, tmp_path/'c', short=(48,), format=format, workers=0, quality=95)
    dls,small = (imagenet_dls(p, 32, 20, workers=0) for p in (small_photos, tmp_path/'c/48'))
    assert list(small.vocab)==list(dls.vocab) and small.skipped==[] and len(small.train_ds)==400 and len(small.valid_ds)==100
    for (x,y),(u,v) in zip(dls.valid.raw_batches(), small.valid.raw_batches()):
        assert torch.equal(y, v) and (x.float()-u.float()).abs().mean()<9
    x,y = next(small.train.raw_batches())
    assert x.shape==(20,3,32,32) and x.float().std()>20
    if format=='jpeg': small.show_batch(max_n=1)
    plt.close('all')
