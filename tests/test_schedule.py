"The phase table: golden rows of the 2018 runs, and properties of any table"
import csv, itertools, json, subprocess, sys, warnings
from pathlib import Path
import pytest
from hypothesis import given, strategies as st
from fastai_fastimagenet.phase import Phase, ends
from fastai_fastimagenet.recipes import recipes
from fastai_fastimagenet.schedule import Schedule

data = Path(__file__).parent/'data'
n_imagenet = 1_281_167
golden = list(csv.DictReader((data/'imagenet18_schedules.csv').open()))
originals = json.loads((data/'imagenet18_phases.json').read_text())

def same(printed, value):
    "`value` agrees with `printed` to all of its digits"
    digits = len(printed.split('.')[1]) if '.' in printed else 0
    return abs(float(printed)-value) <= .5*10**-digits + 1e-12

@pytest.mark.parametrize('name', sorted({(r['repo'], r['machines']) for r in golden}), ids='_'.join)
def test_golden_rows(name):
    rows = [r for r in golden if (r['repo'],r['machines'])==name]
    sched = recipes['_'.join(name)]
    assert sched.n_epoch==len(rows)
    for r in rows:
        e = int(r['epoch'])
        at = sched.at(e)
        got = at.size, at.bs, at.global_bs, at.data or '(full)', at.rect, sched.batches(e, n_imagenet, drop_last=False)
        assert got==(int(r['size']), int(r['bs_per_gpu']), int(r['global_bs']), r['train_dir'], r['rect_val']=='1', int(r['batches'])), r
        assert same(r['min_scale'], at.min_scale), r
        assert same(r['lr_epoch_start'], at.lr), r
        last = sched.at(e+1-1e-9).phase
        assert same(r['lr_epoch_end'], sched.lr_in(last, e+1)), r
        assert same(r['lr_end_per_256'], sched.lr_in(last, e+1)*256/at.global_bs), r
        left = -(-n_imagenet//sched.world) - at.bs*(sched.batches(e, n_imagenet, drop_last=False)-1)
        assert int(r['last_batch_per_gpu'])==left, r

@pytest.mark.parametrize('key', originals)
def test_original_lists_are_the_recipes(key):
    sched = recipes[key.replace('/','_')]
    read = Schedule.from_original(originals[key], sched.world)
    assert read.n_epoch==sched.n_epoch
    for i in range(sched.n_epoch*8):
        a,b = read.at(i/8),sched.at(i/8)
        assert (a.size,a.bs,a.data,a.min_scale,a.rect)==(b.size,b.bs,b.data,b.min_scale,b.rect)
        assert a.lr==pytest.approx(b.lr, rel=1e-12)

def test_all_nine_tables(): assert len([k for k in recipes if k.startswith('imagenet18_')])==len(originals)==9

lrs = st.floats(1e-4, 10)

@st.composite
def schedules(draw):
    "Any right table of whole epochs"
    phases = []
    for i in range(draw(st.integers(1,6))):
        new_bs = draw(st.integers(1,512) if i==0 else st.one_of(st.none(), st.integers(1,512)))
        need = i==0 or new_bs is not None
        lr = draw(lrs | st.tuples(lrs, lrs)) if need else draw(st.none() | st.tuples(lrs, lrs))
        opt = lambda s: draw(s if i==0 else st.none() | s)
        phases.append(Phase(draw(st.integers(1,9)), opt(st.integers(8,512)), new_bs, lr, opt(st.sampled_from(['','-sz/160'])),
                            opt(st.floats(.01,1)), opt(st.booleans())))
    return Schedule(phases, world=draw(st.integers(1,128)))

pytestmark = pytest.mark.filterwarnings('ignore:.*lr jumps up')

@given(schedules())
def test_epochs_and_no_gaps(s):
    assert s.n_epoch==sum(p.n_epoch for p in s.phases)
    assert s.starts[0]==0 and all(a+p.n_epoch==b for a,p,b in zip(s.starts, s.phases, s.starts[1:]))
    for e in range(s.n_epoch):
        row = s.at(e)
        assert row.global_bs==row.bs*s.world and None not in vars(row).values()

@given(schedules(), st.integers(1,10**6))
def test_steps(s, n):
    assert s.steps(n)==sum(s.batches(e, n) for e in range(s.n_epoch))
    for e in range(s.n_epoch):
        all_,whole = s.batches(e, n, drop_last=False),s.batches(e, n)
        assert (all_-1)*s.at(e).global_bs < n <= all_*s.at(e).global_bs
        assert whole*s.at(e).global_bs <= n < (whole+1)*s.at(e).global_bs

@given(schedules(), st.floats(0,1))
def test_lr_is_continuous_inside_a_phase(s, t):
    for i,p in enumerate(s.phases):
        a,b = ends(p.lr)
        e = s.starts[i]+t*p.n_epoch
        assert min(a,b)*(1-1e-9) <= s.lr_in(i, e) <= max(a,b)*(1+1e-9)
        assert abs(s.lr_in(i, e)-s.lr_in(i, e+1e-6)) <= abs(b-a)*1e-5 + 1e-12
        assert s.at(s.starts[i]).lr==a and s.lr_in(i, s.starts[i]+p.n_epoch)==b

@given(schedules(), st.integers(1,64), st.integers(1,64))
def test_scaling_keeps_lr_per_image(s, k, world):
    new = s.scale_to(s.phases[0].bs*k*world, world)
    assert new.notes and new.n_epoch==s.n_epoch
    for e in range(s.n_epoch):
        a,b = s.at(e),new.at(e)
        assert b.lr/b.global_bs==pytest.approx(a.lr/a.global_bs, rel=1e-9)
    assert new.at(0).global_bs==s.phases[0].bs*k*world

@given(schedules())
def test_scaling_back_and_forth(s):
    back = s.scale_to(s.phases[0].bs*s.world*7).scale_to(s.phases[0].bs*s.world)
    for e in range(s.n_epoch):
        a,b = s.at(e),back.at(e)
        assert (a.size,a.bs)==(b.size,b.bs) and a.lr==pytest.approx(b.lr, rel=1e-9)

def settings_of(s):
    "The settings of size, batch and data that `s` goes through"
    rows = [s.at(e) for e in range(s.n_epoch)]
    return [k for k,_ in itertools.groupby((r.size,r.bs,r.data,r.min_scale,r.rect) for r in rows)]

@given(schedules(), st.integers(1,100))
def test_scale_epochs(s, n):
    stages = settings_of(s)
    if n<len(stages):
        with pytest.raises(ValueError, match='needs an epoch'): s.scale_epochs(n)
        return
    new = s.scale_epochs(n)
    assert new.n_epoch==n and settings_of(new)==stages

@given(schedules())
def test_round_trips(s):
    assert Schedule.from_json(s.to_json())==s
    assert Schedule.from_original(s.to_original(), s.world)==s

@given(st.sampled_from(['size','bs','lr','n_epoch','min_scale','data','rect']),
       st.sampled_from([-1, 0, -.5, float('nan'), float('inf'), '3', True, [], (1,2,3), 1.5]))
def test_wrong_values_are_refused_or_right(name, v):
    "Whatever is put in, the answer is a table or a ValueError that names the phase"
    try: s = Schedule([Phase(**{**dict(n_epoch=1, size=64, bs=8, lr=.1), name:v})])
    except ValueError as e: assert 'phase' in str(e) and (name in str(e) or 'whole number' in str(e))
    else: assert s.n_epoch>=1 and s.at(0).lr>=0 and s.at(0).bs>=1 and s.at(0).size>=8

@pytest.mark.parametrize('dicts,words', [
    ([dict(ep=0, sz=64, bs=8), dict(ep=(0,5), lr=.1), dict(ep=6, sz=96, bs=8)], 'starts when the run ends'),
    ([dict(ep=0, sz=64, bs=8), dict(ep=(0,5), lr=.1), dict(ep=5, lr=.01)], 'give the last lr phase an end'),
    ([dict(ep=0, sz=64, bs=8, rectval=True), dict(ep=(0,5), lr=.1)], "Unknown keys ..rectval"),
    ([dict(ep=0, sz=64, bs=8), dict(ep=2, rect_val=True), dict(ep=(0,5), lr=.1)], "neither 'lr' nor"),
    ([dict(ep=0, sz=64, bs=8), dict(ep=(0,8), lr=(3,4)), dict(ep=(5,10), lr=1)], 'overlap'),
    ([3], 'list of dicts'), ([dict(sz=64, bs=8)], "needs 'ep'"), ([dict(ep=0, sz=64, bs=8), dict(ep=0, lr=(1,2))], 'last lr phase an end')])
def test_wrong_original_lists_are_refused(dicts, words):
    with pytest.raises(ValueError, match=words): Schedule.from_original(dicts)

def test_lr_jumps():
    first = Phase(1, size=64, bs=8, lr=.1)
    for p,jump in ((Phase(1, bs=16, lr=.2),False), (Phase(1, bs=16, lr=.3),True), (Phase(1, lr=.2),True), (Phase(1, size=96, lr=.2),False),
                   (Phase(1, bs=4, lr=.2),True), (Phase(1, lr=.01),False)):
        with warnings.catch_warnings(record=True) as ws:
            warnings.simplefilter('always')
            Schedule([first, p])
        assert bool(ws)==jump, p

def test_files(tmp_path):
    s = recipes['imagenet18_8']
    assert Schedule.load(s.save(tmp_path/'s.json'))==s
    (tmp_path/'o.json').write_text(json.dumps(originals['imagenet18/8']))
    assert Schedule.load(tmp_path/'o.json', world=64).n_epoch==35
    for bad in ('{', '3', '{"phases":[{"n_epoch":1,"sz":3}]}', '{"phases":[{"size":64,"bs":8,"lr":1}]}', '[{"lr":1}]', '[3]', '{"phases":[3]}'):
        (tmp_path/'b.json').write_text(bad)
        with pytest.raises(ValueError, match='b.json'): Schedule.load(tmp_path/'b.json')

def test_no_torch_no_fastai():
    code = 'import sys, fastai_fastimagenet.schedule, fastai_fastimagenet.recipes; print({"torch","fastai"} & sys.modules.keys())'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip()=='set()'

def test_plot_shows_where_rectangles_are():
    s = Schedule([Phase(2, 64, 32, .1), Phase(1, rect=True, lr=.1), Phase(3, rect=False, lr=.1)])
    spans = [p.get_extents().transformed(p.axes.transData.inverted()) for p in s.plot(1000).axes[0].patches]
    assert [(round(o.x0, 6),round(o.x1, 6)) for o in spans]==[(2,3)]

def test_files_and_what_is_wrong_in_them(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    s = recipes['photos']
    assert s.save('~/s.json')==tmp_path/'s.json' and Schedule.load('~/s.json')==s
    d = json.loads(s.to_json())
    with pytest.raises(ValueError, match=r"Unknown keys \['wrold'\]"): Schedule.from_json(json.dumps({**d, 'wrold': 8}))
    with pytest.raises(ValueError, match="'notes' must be a list"): Schedule.from_json(json.dumps({**d, 'notes': 'abc'}))
    with pytest.raises(ValueError, match='`world` must be a number of processes'): s.for_world(0)
