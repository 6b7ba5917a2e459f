"Training and evaluation on several processes: real ones, over gloo, compared with one"
import ctypes, itertools, json, math, re, sys, threading
import pytest, torch
from torch import nn
from fastai_fastimagenet import group
from procs import here, launcher, run

cases = 'evaluate,evaluate_workers,equal,matrix,options,starts_equal,phases,corners,rectangles'
worlds = pytest.mark.parametrize('world', [2,3])

@pytest.fixture(scope='session')
def folder(tmp_path_factory):
    "Images and a model whose batch norms have seen something"
    sys.argv[1:],args = ['', str(tmp_path_factory.mktemp('ddp'))],sys.argv[1:]
    import ddp_cases
    sys.argv[1:] = args
    from fastai_fastimagenet.models import resnet_small
    ddp_cases.images(ddp_cases.out/'images', 998)
    torch.manual_seed(0)
    model = resnet_small(4)
    for b in model.buffers():
        if b.dtype.is_floating_point: b.add_(.2*torch.rand_like(b))
    for p in model.parameters(): p.data.add_(.1*torch.randn_like(p))
    torch.save(model.state_dict(), ddp_cases.out/'weights.pth')
    return ddp_cases.out

@pytest.fixture(scope='session')
def results(folder):
    "Case -> processes -> what `ddp_cases` found"
    for world in (1,2,3):
        start = [sys.executable] if world==1 else [*launcher, '--nproc', world]
        run(*start, here/'ddp_cases.py', cases+(',refused' if world==2 else ''), folder, timeout=400)
    return lambda case, world: json.loads((folder/f'{case}_{world}.json').read_text())

@worlds
@pytest.mark.parametrize('kind', ['plain','rect'])
@pytest.mark.parametrize('n', [1,2,53,997])
def test_evaluation_is_exact(results, n, kind, world):
    "Loss, metrics, predictions to the last bit; every image once; shares differ by one batch at most"
    one,many = results('evaluate', 1)[f'{n} {kind}'],results('evaluate', world)[f'{n} {kind}']
    for k in ('loss','top1','top2','own','auc','preds','targs','losses','right'): assert one[k]==many[k], k
    assert sum(many['shares'])==n and len(many['shares'])==world
    batches = [math.ceil(s/16) for s in many['shares']]
    assert max(batches)-min(batches)<=1
    assert many['accum']==[n, many['both']], '`AccumMetric` gets all predictions in the order of the data set'

def test_evaluation_counts_something(results):
    for kind in ('plain','rect'):
        o = results('evaluate', 1)[f'997 {kind}']
        assert 0<o['right']<997 and float.fromhex(o['top1'])==pytest.approx(o['right']/997) and o['own'][-1]==16
    a,b = (results('evaluate', 1)[f'997 {kind}'] for kind in ('plain','rect'))
    assert a['preds']!=b['preds'] and a['targs']==b['targs']

@worlds
def test_evaluation_with_workers(results, world):
    assert results('evaluate_workers', 1)==results('evaluate_workers', world)
    assert results('evaluate_workers', world)['one batch']==16
    assert results('evaluate_workers', 1)['batches']==results('evaluate_workers', 1)['plain']

@worlds
@pytest.mark.parametrize('how', ['step','accumulate'])
def test_gradients_equal_one_process(results, folder, world, how):
    "float64, every trick, through a change of size and batch: gradients of every step and the weights, to 1e-13"
    results('equal', world)
    one,many = (torch.load(folder/f'equal_{w}.pth')[how] for w in (1,world))
    assert one['shapes']==many['shapes'] and {s for _,s in one['shapes']}=={24,32} and {b for b,_ in one['shapes']}=={12,24}
    assert one['grads'].abs().max()>.01 and len(one['grads'])==(7 if how=='step' else 4)
    torch.testing.assert_close(many['grads'], one['grads'], rtol=0, atol=1e-13)
    torch.testing.assert_close(many['weights'], one['weights'], rtol=0, atol=1e-13)

matrix = list(itertools.product(('fit','fit_one_cycle','fine_tune'), ((0,False),(2,False),(2,True)), ('size','batch'), (1,2)))

@pytest.mark.parametrize('method,workers,change,world', matrix)
def test_matrix(results, method, workers, change, world):
    "Shapes and steps are those of the table on every process, nobody sees an image twice, the Learner is left as it was"
    res = results('matrix', world)[f'{method} {workers[0]} {workers[1]} {change}']
    expect = {'size':[(8,24),(8,32)], 'batch':[(4,32),(8,32)]}[change]
    if method=='fine_tune': expect = expect[:1]+expect
    assert len(res['rows'])==len(expect)
    for row,(bs,size) in zip(res['rows'], expect):
        assert row['steps']==40//(bs*world) and row['shapes']==[[bs,3,size,size]]*row['steps']
    assert res['left']==[2,'TfmdDL',8,[[32,32],32],'Sequential',4] and 0<=res['acc']<=1
    assert res['unique']==([] if world==1 else [True]*len(expect))

@worlds
def test_options(results, world):
    one,many = results('options', 1),results('options', world)
    plain = many['plain']['loss']
    assert all(math.isfinite(o['loss']) for o in many.values())
    assert many['unused']['loss']==pytest.approx(plain, rel=1e-3) and many['static']['change']<1e-3
    for k in ('fp16','bf16'): assert 0<many[k]['change'] and many[k]['loss']==pytest.approx(plain, rel=.02)
    assert many['fp16']['change']<many['bf16']['change'], 'bfloat16 has fewer digits'
    assert many['precision']['loss']!=plain and many['precision']['loss']==pytest.approx(plain, rel=.02)
    assert one['fp16']['change']==0, 'one process sends nothing'

@worlds
def test_starts_equal(results, world):
    "Weights, batch norm and momentum of rank 0 are everybody's; random numbers are not"
    res = results('starts_equal', world)
    assert len(set(res['before']))==world
    for i,same in enumerate((True,True,False,True)):
        assert len({row[i] for row in res['at_start']})==(1 if same else world)
    assert res['at_start'][0][0]==res['before'][0] and res['at_start'][0][1::2]==[7,1]

@worlds
def test_fit_phases(results, folder, world):
    plain,inside = results('phases', world)
    assert plain['weights']==inside['weights'] and len(set(plain['weights']))==1 and len(plain['weights'])==world
    assert plain['rows']==[[24,4],[32,8]]
    assert len((folder/f'log_{world}_False.csv').read_text().splitlines())==3

@pytest.mark.parametrize('world', [1,2,3])
def test_rectangles(results, world):
    "All processes have the same shape in each step, and evaluate the same average of the weights"
    res = results('rectangles', world)
    assert len(res['steps'])==world and all(s==res['steps'][0] for s in res['steps'])
    assert len({tuple(s[1:3]) for s in res['steps'][0] if s[0]==1})>=3 and {tuple(s[1:3]) for s in res['steps'][0] if s[0]==2}=={(64,64)}
    assert all(s[1]%32==s[2]%32==0 and min(s[1:3])==(32,64,64)[s[0]] for s in res['steps'][0])
    assert len(res['averages'][0])==3 and len(set(map(str, res['averages'])))==1
    assert len(set(res['weights']))==1 and res['weights'][0]==res['averages'][0][-1] and len(set(res['value']))==1

def test_refusals_are_said_by_all(results):
    res = results('refused', 2)
    a,b = res['said']
    assert len(a)==len(b)==8 and a[:-2]+a[-1:]==b[:-2]+b[-1:] and res['same'] and res['cbs']==4
    for text,o in zip(('`lr_find`', 'A batch of 80, 40 for each of 2 processes', 'outer `learn.ddp()`', 'number the files in each process anew',
                       'Rank 1 differs: the extra is 1 there, None elsewhere', 'Rank 1 differs in evaluation: the checksum of 0.0.weight is', 'Rank 1 is in evaluation, the others are at the start of a fit',
                       'each would train a model of its own. Write `with learn.ddp():`'), a): assert text in o

@worlds
def test_corners(results, folder, world):
    one,many = results('corners', 1),results('corners', world)
    assert many['adam']==[1]*world, 'optimizer state is that of rank 0'
    assert set(many['models'])=={'Sequential'}, 'evaluation does not go through DistributedDataParallel'
    assert all(math.isfinite(many[f'Cancel{o}Exception']) for o in ('Train','Epoch','Fit'))
    assert len(set(many['test_dl']))==1 and len(many['test_dl'])==world and many['test_dl rows']==one['test_dl rows']==7
    assert many['alone'][0]==pytest.approx(many['CancelFitException'], rel=1e-6) and many['alone'][1]==10

def test_exported_learner_predicts(results, folder):
    from fastai.vision.all import load_learner, PILImage
    results('corners', 2)
    learn = load_learner(folder/'exported.pkl')
    with learn.no_bar(): assert learn.predict(PILImage.create(next((folder/'images').glob('*.jpg'))))[0] in 'abcd'

def test_items_are_told_apart():
    "Same files in another order, also of folders; rows of tables; numbers"
    import pandas as pd
    from fastai_fastimagenet.rank_dl import items_digest
    class Data(list):
        def __init__(self, items): self.items = items
        def __len__(self): return len(self.items)
    for a,b in ((['x/a/0.jpg','x/b/0.jpg'], ['x/b/0.jpg','x/a/0.jpg']), (pd.DataFrame(dict(a=[1,2])), pd.DataFrame(dict(a=[2,1]))), ([1,2], [2,1]), ([None]*3, [None]*2)):
        assert items_digest(Data(a))==items_digest(Data(a))!=items_digest(Data(b))
    assert items_digest(Data(['/mnt/1/a/0.jpg']))==items_digest(Data(['/data/2/a/0.jpg'])), 'machines may keep them elsewhere'

failures = {'raise':'KeyError: .*rank one is broken', 'exit':'rank one leaves', 'kill':'rank 1 was killed by SIGKILL', 'hang':'lost the other processes',
            'diverge':'lost the other processes', 'drift':'Rank 1 differs after epoch 0: the checksum of 0.0.weight is',
            'other files':'Rank 1 differs at the start of a fit: the fingerprint of the training files', 'fewer':'Rank 1 differs in evaluation: the number of items is 9 there, 10 elsewhere',
            'caught, then raise':'KeyError: .*rank one is broken'}

@pytest.mark.parametrize('what', failures)
def test_nobody_waits_for_ever(folder, what):
    "Whatever rank 1 does, all end, with an error that says what it was last"
    r = run(*launcher, '--nproc', 2, here/'ddp_failures.py', what, folder, timeout=100, ok=False)
    assert re.search(failures[what], r.stderr, re.S), r.stderr[-3000:]
    if what not in ('hang','diverge'): assert re.search(failures[what], r.stderr[-1500:], re.S), r.stderr[-3000:]
    assert 'came through' not in r.stdout

def test_wrong_options():
    from fastai.vision.all import DataLoaders, Learner, TfmdDL
    from fastai_fastimagenet.distributed import DDPTrainer
    with pytest.raises(ValueError, match='must be None, "fp16" or "bf16", got \'int8\''): DDPTrainer('int8')
    with pytest.raises(ValueError, match='takes find_unused'): DDPTrainer(find_unused=True)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match='needs GPUs'): DDPTrainer(sync_bn=True)
    inner = Learner(DataLoaders(TfmdDL([1.], num_workers=0)), nn.Linear(1,1), nn.MSELoss(), cbs=DDPTrainer())
    for kwargs in (dict(timeout=5), dict(compress='fp16')):
        with pytest.raises(ValueError, match=f'{[*kwargs][0]}: .*give it to the outer `learn.ddp\\(\\)`'): inner.ddp(**kwargs).__enter__()
    with pytest.raises(ValueError, match='`timeout` must be a number of minutes'): Learner(DataLoaders(TfmdDL([1.], num_workers=0)), nn.Linear(1,1), nn.MSELoss()).ddp(timeout='5').__enter__()
    learn = Learner(DataLoaders(TfmdDL([1.], num_workers=0)), nn.Linear(1,1), nn.MSELoss())
    learn.add_cb(type('DistributedTrainer', (DDPTrainer,), {})())
    with pytest.raises(ValueError, match='Use `with learn.ddp\\(\\):` instead'): learn.ddp().__enter__()

def test_sync_bn_comes_and_goes():
    "Layers are exchanged for the fit and put back with what they learned; the forward pass needs a GPU"
    from contextlib import ExitStack
    from fastai_fastimagenet.distributed import _sync_bns
    model = nn.Sequential(nn.Conv2d(3,4,1), nn.Sequential(nn.BatchNorm2d(4)))
    bn = model[1][0]
    with ExitStack() as undo:
        _sync_bns(model, undo.callback)
        assert type(model[1][0]) is nn.SyncBatchNorm and model[1][0].weight is bn.weight
        model[1][0].running_mean.fill_(3)
        model.eval()
    assert model[1][0] is bn and bn.running_mean[0]==3 and not bn.training

@pytest.mark.skipif(sys.platform!='linux', reason='Threads are read from /proc')
def test_forks_wait_for_running_threads():
    libc,lock,thread,stop = ctypes.CDLL(None),ctypes.c_int(),ctypes.c_ulong(),threading.Event()
    python = threading.Thread(target=lambda: [None for _ in iter(stop.is_set, True)]) # Runs, and forks need not wait for it
    libc.pthread_spin_init(ctypes.byref(lock), 0)
    libc.pthread_spin_lock(ctypes.byref(lock))
    libc.pthread_create(ctypes.byref(thread), None, libc.pthread_spin_lock, ctypes.byref(lock)) # Runs, and Python does not know it
    try:
        python.start()
        group._settle(.01) # Not for ever
        assert group._thread_runs()
        libc.pthread_spin_unlock(ctypes.byref(lock))
        group._settle(60)
        assert not group._thread_runs()
    finally:
        libc.pthread_spin_unlock(ctypes.byref(lock))
        libc.pthread_join(thread, None)
        stop.set()
        python.join()
