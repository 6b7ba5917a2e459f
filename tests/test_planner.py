"Plans: what they add up to, what they refuse, that they start without torch, and a run planned from its own history"
import json, math, subprocess, sys
from pathlib import Path
import pytest
from hypothesis import given, settings, strategies as st
from fastai_fastimagenet.machines import profiles
from fastai_fastimagenet.measured import Measured, Point, actual, beside, measured_run, plan_measured
from fastai_fastimagenet.phase import Phase
from fastai_fastimagenet.plan_cli import main
from fastai_fastimagenet.planner import allreduce_bytes, plan, plan_parts
from fastai_fastimagenet.recipes import recipes
from fastai_fastimagenet.schedule import Schedule
from fastai_fastimagenet.whatif import epochs_to_93, first_epochs, options, scaling

bin = Path(sys.executable).parent
names = st.sampled_from([n for n in recipes if n.startswith('imagenet18')])

def test_starts_without_torch():
    heavy = "('torch','fastai','numpy','pandas','matplotlib','boto3')"
    code = f"import sys; from fastai_fastimagenet.plan_cli import main; main(sys.argv[1:]); assert not [m for m in {heavy} if m in sys.modules]"
    for args in (['--schedule','imagenet18_16','--machine','p5.48xlarge','--nodes','2'], ['--budget','20']):
        r = subprocess.run([sys.executable,'-c',code,*args], capture_output=True, text=True)
        assert r.returncode==0 and r.stdout.startswith('Predicted'), r.stderr

def test_command():
    r = subprocess.run([bin/'fastimagenet-plan','--schedule','imagenet18_8','--machine','p4d.24xlarge','--json'], capture_output=True, text=True, check=True)
    d = json.loads(r.stdout)
    assert d['predicted'] is True and d['minutes']==pytest.approx(sum(p['seconds'] for p in d['phases'])/60)
    assert Schedule.from_json(json.dumps(d['schedule'])).world==8
    assert subprocess.run([bin/'fastimagenet-plan','--help'], capture_output=True, text=True, check=True).stdout.count('fastimagenet-plan --')>=3

@pytest.mark.parametrize('args,says', [
    (['--schedule','imagenet18_1','--machine','p5.48large'], 'Nearest: p5.48xlarge'),
    (['--schedule','imagenet18-1','--machine','p5.48xlarge'], 'Nearest: imagenet18_1'),
    (['--schedule','imagenet18_1','--machine','p5.48xlarge','--nodes','0'], '`nodes` must be a number of machines'),
    (['--schedule','imagenet18_1','--machine','p5.48xlarge','--nodes','two'], '`--nodes` must be'),
    (['--schedule','imagenet18_1','--machine','p5.48xlarge','--price','cheap'], '`--price` must be dollars'),
    (['--schedule','imagenet18_1','--machine','p5.48xlarge','--images','-5'], 'There must be training images'),
    (['--schedule','imagenet18_1'], 'Give a machine'), (['--machine','p5.48xlarge'], 'Give a table'),
    (['--schedule','imagenet18_1','--from','no/such/run'], 'holds no run'),
    (['--from','x','--schedule','imagenet18_1','--nodes','2'], 'Leave out `--nodes`'), (['--from','x','--schedule','imagenet18_1','--machine','p5.48xlarge'], 'Leave out `--machine`'),
    (['--deadline','30','--schedule','imagenet18_1'], 'Leave out `--schedule`'), (['--deadline','30','--from','x'], 'Leave out `--from`'), (['--deadline','30','--nodes','0'], '`nodes` must be'),
    (['--deadline','30','--nodes','200'], 'No table of 2018 fits'), (['--schedule','imagenet18_1','--machine','a100'], 'With that GPU: p4d.24xlarge, p4de.24xlarge.'),
    (['--schedule','imagenet18_1','--machine','p5.48xlarge','--images','0'], 'There must be training images'),
    (['--schedule','imagenet18_16','--machine','p5.48xlarge','--images','500'], 'is larger than the training set of 500'),
    (['--from','x','--measure','photos'], 'Leave out `--measure`'), (['--measure','photos','--machine','p5.48xlarge'], 'Leave out `--machine`'), (['--deadline','9','--measure','x'], 'Leave out `--measure`'),
    (['--schedule','imagenet18_1','--machine','p5.48xlarge','--arch','resnet18'], 'Leave out `--arch`'), (['--actual','x','--schedule','photos'], 'Leave out `--schedule`'), (['--actual','no/such/run'], 'holds no run'),
    (['--schedule','photos','--measure','no/such/folder'], 'no/such/folder'),
    (['--deadline','30','--price','2'], 'Leave out `--price`'), (['--from','x','--schedule','imagenet18_1','--price','now'], 'Leave out `--price`'),
    (['--schedule','imagenet18_1','--machine','g5.xlarge','--region','us-east-1'], 'Leave out `--region`'), (['--deadline','.01'], 'in 0.01 minutes or less'),
    (['--budget','-1'], '`budget` must be more than 0'), (['--deadline','.01'], 'The fastest: '),
])
def test_bad_input(args, says):
    with pytest.raises(SystemExit) as e: main(args)
    assert str(e.value.code).startswith('fastimagenet-plan: ') and says in e.value.code

def test_price_now_without_credentials(monkeypatch, tmp_path):
    for k in ('AWS_ACCESS_KEY_ID','AWS_SECRET_ACCESS_KEY','AWS_PROFILE'): monkeypatch.delenv(k, raising=False)
    for k,v in dict(HOME=str(tmp_path), AWS_EC2_METADATA_DISABLED='true').items(): monkeypatch.setenv(k, v)
    with pytest.raises(SystemExit, match='AWS did not say its price: .*Set up credentials'): main('--schedule imagenet18_1 --machine g5.xlarge --price now --region us-east-1'.split())

def test_wrong_kinds_of_arguments():
    with pytest.raises(ValueError, match="must be a list of names, e.g. \\['p5.48xlarge'\\]"): options(machines='p5.48xlarge')
    with pytest.raises(ValueError, match='`nodes` must be numbers'): options(nodes=True)
    assert {o.plan.nodes for o in options(nodes=2)}=={2} and not any(o.plan.machine.startswith('p3') for o in options())

def test_too_large_for_memory(tmp_path):
    file = tmp_path/'big.json'
    Schedule([Phase(1, 224, 1024, .1)], 8).save(file)
    with pytest.raises(SystemExit, match='needs about 57 GB, a V100 of p3.16xlarge has 16 GiB. Use at most 2[0-9][0-9] images'): main(['--schedule',str(file),'--machine','p3.16xlarge'])

@settings(max_examples=60, deadline=None)
@given(name=names, machine=st.sampled_from(list(profiles)), nodes=st.integers(1, 16), n=st.integers(100_000, 2_000_000))
def test_sums(name, machine, nodes, n):
    try: p = plan(recipes[name], machine, nodes, n_train=n)
    except ValueError as e: assert 'Use at most' in str(e); return
    assert p.dollars==pytest.approx(nodes*p.price*p.minutes/60) and sum(p.share(k) for k in plan_parts)==pytest.approx(1)
    assert all(getattr(o, k)>=0 for o in p.phases for k in plan_parts) and p.schedule.world==nodes*profiles[machine].gpus
    for o,ph in zip(p.phases, p.schedule.phases): # Without the last images of an epoch, which make no whole batch
        assert (n-o.bs*p.schedule.world)*ph.n_epoch<=o.images<=n*ph.n_epoch+1
    if nodes==1: assert p.share('network')==0

@settings(max_examples=30, deadline=None)
@given(name=names, n=st.integers(1, 50))
def test_first_epochs(name, n):
    whole = recipes[name]
    s = first_epochs(whole, n)
    assert s.n_epoch==min(n, whole.n_epoch)
    for k in range(4*s.n_epoch):
        a,b = s.at(k/4),whole.at(k/4)
        assert (a.size,a.bs,a.data,a.rect)==(b.size,b.bs,b.data,b.rect) and a.lr==pytest.approx(b.lr)

def test_loading_bounds():
    "A machine with few CPUs for its GPU waits for images, and the plan says what to do"
    p = plan(Schedule([Phase(1, 128, 256, .1, '')]), 'g6e.xlarge')
    small = plan(Schedule([Phase(1, 128, 256, .1, '-sz/160')]), 'g6e.xlarge')
    assert p.share('data')>.2 and 'presize' in repr(p) and small.minutes<p.minutes and small.share('data')==0

def test_numbers_of_machines(capsys):
    "Without `--nodes` several are tried for a goal; `--nodes 1` is one"
    main(['--deadline','60','--json'])
    assert {o['nodes'] for o in json.loads(capsys.readouterr().out)}>{1}
    main(['--deadline','60','--nodes','1','--json'])
    assert {o['nodes'] for o in json.loads(capsys.readouterr().out)}=={1}

def test_options_keep_to_the_limit():
    assert all(o.plan.dollars<=12 for o in options(budget=12)) and all(o.plan.minutes<=20 for o in options(deadline=20))
    assert options(deadline=20)[0].plan.dollars==min(o.plan.dollars for o in options(deadline=20))
    assert options(budget=40)[0].plan.minutes==min(o.plan.minutes for o in options(budget=40))
    cheap = options(prices={'g6e.48xlarge':1e-3})[0].plan
    assert cheap.machine=='g6e.48xlarge' and cheap.price==1e-3
    assert all(recipes[o.recipe].world>=o.plan.schedule.world and o.plan.schedule.n_epoch==epochs_to_93[o.recipe] for o in options())

def test_scaling_efficiency():
    s = scaling(recipes['imagenet18_1'], 'p4d.24xlarge', (1,2,4,8))
    assert s.efficiency()[0]==1 and s.efficiency()==sorted(s.efficiency(), reverse=True)

def test_network_bytes():
    "Logged in 2018 for 64 GPUs, MB per step and machine (cybertronai/imagenet18_old, dawn/logs)"
    for mb in (99.7,100.1,101.4,103.5,101.8): assert allreduce_bytes(64)==pytest.approx(1e6*mb, rel=.05)

def test_plan_from_history(small_photos, tmp_path, capsys):
    "The plan for the table that a run had is what the run took, and it follows the images for another one"
    sched = Schedule([Phase(2, 32, 16, .01), Phase(2, 48, 16, .01), Phase(1, 48, 32, .02, rect=True)])
    sched.save(tmp_path/'s.json')
    out = tmp_path/'run'
    subprocess.run([bin/'fastimagenet-train','--data',small_photos,'--schedule',tmp_path/'s.json','--arch','resnet_small','--workers','0','--out',out], check=True, capture_output=True)
    m = measured_run(out)
    p = plan_measured(sched, m)
    import pandas as pd
    rows = pd.read_csv(out/'history.csv')
    assert [o.steps for o in p.phases]==[2*(m.n_train//16)]*2+[m.n_train//32]
    assert sum(o.compute for o in p.phases)==pytest.approx(rows.compute_s.sum(), rel=.5) # Medians of two
    assert plan_measured(sched, m, n_train=10*m.n_train).phases[0].compute==pytest.approx(10*p.phases[0].compute)
    with pytest.raises(SystemExit): main(['--schedule',str(tmp_path/'s.json'),'--from',str(tmp_path)])
    was = actual(out, price=2.)
    assert [(o.steps,o.images) for o in was.phases]==[(50,800),(50,800),(12,384)] and was.dollars==pytest.approx(2*was.minutes/60) # Training leaves out the last 16 of 400
    assert was.minutes==pytest.approx(rows.minutes.iloc[-1], rel=.02) and was.phases[0].eval==pytest.approx(rows.eval_s[:2].sum())
    text = beside(p, was)
    assert text.splitlines()[-1].split()[:3]==['all',f'{p.minutes:.2f}',f'{was.minutes:.2f}'] and len(text.splitlines())==5
    with pytest.raises(ValueError, match='another table'): beside(plan_measured(Schedule(sched.phases[:2]), m), was)
    capsys.readouterr()
    main(['--actual',str(out),'--from',str(out),'--json'])
    d = json.loads(capsys.readouterr().out)
    assert d['predicted']['predicted'] is True and d['actual']['predicted'] is False and d['actual']['minutes']==pytest.approx(was.minutes)
    main(['--actual',str(out)])
    assert capsys.readouterr().out.startswith('Actual: ')

def test_measured_from_the_shell(small_photos, tmp_path, capsys):
    "A plan for this machine; sizes of the table only"
    Schedule([Phase(2, 32, 16, .01), Phase(1, 48, 16, .01)]).save(tmp_path/'s.json')
    main(['--schedule',str(tmp_path/'s.json'),'--measure',str(small_photos),'--arch','resnet_small','--json'])
    d = json.loads(capsys.readouterr().out)
    assert [(p['size'],p['steps']) for p in d['phases']]==[(32,50),(48,25)] and d['minutes']>0 and not d['notes']

@pytest.mark.parametrize('price,usd', [('now',21.96),('spot',2.47)])
def test_price_of_today(aws, capsys, price, usd):
    aws.set(spot_prices={'p4d.24xlarge/us-east-1b': 2.47})
    main(['--schedule','imagenet18_1','--machine','p4d.24xlarge','--price',price,'--region','us-east-1','--json'])
    out,err = capsys.readouterr()
    d = json.loads(out)
    assert d['price']==usd and d['dollars']==pytest.approx(usd*d['minutes']/60) and err.startswith('Price: ')

def test_what_was_not_measured():
    "A fixed part and one that grows with the pixels, found from other sizes"
    step = lambda s, b: .01+1e-6*b*s*s
    m = Measured(tuple(Point(s, b, step(s, b), .001*b, 1e-4*s*s, .1) for s,b in ((64,32),(96,32),(128,16))), 1, 3200, 'here')
    assert m.step(160, 8)==pytest.approx((step(160, 8),.008)) and m.eval(160)==pytest.approx(1e-4*160**2)
    p = plan_measured(Schedule([Phase(3, 160, 8, .1)]), m, price=2.)
    assert 'Not measured but reckoned from other sizes and batches: 160 px in batches of 8' in repr(p) and not plan_measured(Schedule([Phase(3, 64, 32, .1)]), m).notes
    with pytest.raises(ValueError, match='larger than the training set of 3200'): plan_measured(Schedule([Phase(3, 64, 3201, .1)]), m)
    for f in (lambda: plan_measured('photos', m), lambda: plan('photos', 'p4d.24xlarge')):
        with pytest.raises(ValueError, match='must be a `Schedule`'): f()
    assert p.phases[0].compute==pytest.approx(3*400*step(160, 8)) and p.dollars==pytest.approx(2*p.minutes/60)
