"Tables made for a learner: never one that does not fit, the same in all processes, and nothing is left of the trials"
import json, random
import pytest, torch
from fastai.vision.all import set_seed
from fastai_fastimagenet.all import *
from fastai_fastimagenet.phase import ends
from autotune_cases import learner
from procs import here, launcher, run

def silently(learn, *args):
    with learn.no_bar(), learn.no_logging(): return learn.fit_phases(*args)

@pytest.mark.parametrize('seed', range(2))
def test_fits_into_memory(small_photos, seed):
    "Whatever the limit, each batch of the table fits, and is the largest that does unless the loader's own is smaller"
    limit = random.Random(seed).randrange(2*48*48, 20*48*48)
    learn = learner(small_photos, limit=limit)
    sched = auto_schedule(learn, .3)
    peak = max(o for p in sched.phases for o in ends(p.lr))/sched.phases[0].bs # For one image
    for p in sched.phases: assert p.bs==min(16, limit//p.size**2) and max(ends(p.lr))<=peak*p.bs*1.001
    silently(learn, sched.scale_epochs(3))
    assert learn.recorder.losses
    learn.model.limit = 100
    with pytest.raises(ValueError, match='Not even one image'): auto_schedule(learn, .3)

def test_larger_batches_where_they_are_faster(small_photos):
    "Steps of a fixed length: doubled as long as a hundred are left in an epoch, with the learning rate"
    sched = auto_schedule(learner(small_photos, bs=1, seconds=.02), 2)
    assert {p.bs for p in sched.phases}=={4} and sched.phases[0].size==32 and sched.phases[-1].size==48 # 400 images
    assert {p.bs for p in auto_schedule(learner(small_photos, bs=3, seconds=.02), 2).phases}=={3} # 66 would be left

def test_few_pictures(small_photos, tmp_path):
    "Batches are halved until an epoch has ten steps; where even batches of 8 leave fewer, there is nothing to try"
    assert {p.bs for p in auto_schedule(learner(small_photos, bs=64), .3).phases}=={32} # 400 images
    for split in ('train','val'):
        for f in sorted((small_photos/split).glob('*/*.jpg'))[::6]:
            to = tmp_path/f.relative_to(small_photos)
            to.parent.mkdir(parents=True, exist_ok=True)
            to.symlink_to(f)
    with pytest.raises(ValueError, match='67 training images are too few to try tables with, 80 are needed'): auto_schedule(learner(tmp_path), .3)

def test_nothing_is_left(small_photos):
    "A fit after it is the fit that would have been without it"
    runs = []
    for auto in (False,True):
        learn = learner(small_photos)
        silently(learn, Schedule([Phase(1, 32, 16, .01)]))
        if auto: auto_schedule(learn, .3)
        assert learn.opt is not None and len(learn.cbs)==len(learner(small_photos).cbs) and learn.dls.train.bs==16
        set_seed(1)
        silently(learn, Schedule([Phase(1, 32, 16, .01)]))
        runs.append((learn.recorder.losses,[t.clone() for t in learn.model.state_dict().values()]))
    assert torch.stack(runs[0][0]).equal(torch.stack(runs[1][0])) and all(a.equal(b) for a,b in zip(runs[0][1], runs[1][1]))

def test_processes_agree(small_photos, tmp_path):
    run(*launcher, '--nproc', 2, here/'autotune_cases.py', small_photos, tmp_path/'out.json')
    a,b = json.loads((tmp_path/'out.json').read_text())
    assert a==b and a['same']
    sched = Schedule.from_json(a['table'])
    assert sched.world==2 and sched.phases[-1].bs==10 and sched.phases[0].bs==16 # The smaller memory has room for 10 at 48 px
