"Runs that are interrupted at every kind of place and go on: `resume_cases.py CASE FOLDER`; prints what they did as JSON"
import json, os, random, signal, socket, sys, time, traceback, warnings
from pathlib import Path
warnings.simplefilter('ignore')
sys.argv[2:],folder = ['none', 'none'],Path(sys.argv[2]) # `ddp_cases` reads its arguments when it is imported
from ddp_cases import *
from fastai_fastimagenet.state import checkpoints

n_train,n_epoch = 48,3
sched = Schedule([Phase(1, size=24, bs=4, lr=(.01,.02), min_scale=.5), Phase(2, size=32, bs=8, lr=(.04,0), rect=True)])

class Break(Callback):
    "End the process in training step `step`, in the way `how`"
    order = 80
    def __init__(self, how, step): self.how,self.step = how,step
    def after_batch(self):
        if not self.training or self.train_iter!=self.step: return
        if self.how=='term': os.kill(os.getpid(), signal.SIGTERM)
        if self.how=='usr1': os.kill(os.getpid(), signal.SIGUSR1)
        if self.how=='kill': os.kill(os.getpid(), signal.SIGKILL)
        if self.how=='raise': raise RuntimeError('broken on purpose')

class Steps(Callback):
    "Which images each step saw: a line for each, so that a killed process leaves them"
    order = 90
    def __init__(self, file): self.file = file
    def after_batch(self):
        if not self.training: return
        dl = self.learn.dl
        k = self.iter-round(dl.done/dl.global_bs)
        with open(self.file, 'a') as f: f.write(json.dumps([self.epoch, dl.done+k*dl.global_bs, dl.idxs[k*dl.bs:(k+1)*dl.bs]])+'\n')

def train(out, rank, world, how, step, workers=0, adam=False, acc=0, minutes=1e-6):
    "One process of a run that goes on if it can"
    set_seed(7)
    model = nn.Sequential(resnet_small(4), nn.Dropout(.2)) # Draws random numbers in the process itself
    dls = loaders(folder/'images', n_train, 10, bs=4, workers=workers, tfms=[RandomResizedCrop(24, min_scale=.5, split_idx=0), RectCrop(24)])
    learn = Learner(dls, model, CrossEntropyLossFlat(), metrics=accuracy, path=out,
                    opt_func=Adam if adam else partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9))
    check = Checkpoint(out/'checkpoints', minutes, resume=bool(checkpoints(out/'checkpoints')))
    log = EpochLog(out/'history.csv')
    cbs = [check, log, Break(how, step), Steps(out/f'steps_{rank}')] + ([GradientAccumulation(acc//world)] if acc else [])
    with learn.ddp(timeout=.5), learn.no_bar(), learn.no_logging(): learn.fit_phases(sched, cbs=cbs)
    if not rank:
        (out/'result.json').write_text(json.dumps(dict(losses=[float(o).hex() for o in learn.recorder.losses], lrs=learn.recorder.lrs,
            weights=sha(*learn.model.parameters(), *learn.model.buffers()), values=[list(o)[:3] for o in learn.recorder.values],
            rows=[[r['epoch'],r['size'],r['bs'],r['valid_loss']] for r in log.rows])))

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

def start(f, *args, world=1, **kwargs):
    "`f` in `world` forked processes; their ids"
    port,pids = free_port(),[]
    for rank in range(world):
        pids.append(os.fork())
        if pids[-1]: continue
        code = 1
        try:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
            sys.stdout = sys.stderr
            f(*args, rank=rank, world=world, **kwargs)
            code = 0
        except SystemExit as e: code = e.code
        except BaseException: traceback.print_exc()
        finally: os._exit(code)
    return pids

def wait(pids, limit=60):
    "Exit codes; when one process was killed the others may not end"
    codes,end = {},time.monotonic()+limit
    while len(codes)<len(pids) and time.monotonic()<end:
        for p in pids:
            if p not in codes and (r := os.waitpid(p, os.WNOHANG))[0]: codes[p] = os.waitstatus_to_exitcode(r[1])
        time.sleep(.02)
    for p in set(pids)-set(codes):
        os.kill(p, signal.SIGKILL)
        os.waitpid(p, 0)
    return [codes.get(p) for p in pids]

def run(out, world=1, how=None, step=0, breaker=0, **kwargs):
    "A run on `world` processes, of which `breaker` is broken"
    out.mkdir(exist_ok=True)
    def one(rank, world): train(out, rank, world, how if rank==breaker else None, step, **kwargs)
    return wait(start(one, world=world))

def result(out): return json.loads((out/'result.json').read_text())

def curves(world):
    "Broken by a signal, a kill and an exception at 20 random steps: the resumed run is the undisturbed one"
    run(folder/f'whole_{world}', world)
    whole,res,rng = result(folder/f'whole_{world}'),[],random.Random(world)
    n_steps = len(whole['losses'])
    for i in range(20):
        for how in ('term','kill','raise'):
            out,step = folder/f'{how}_{world}_{i}',rng.randrange(1, n_steps+1)
            codes = run(out, world, how, step, breaker=rng.randrange(world))
            done = (out/'result.json').exists()
            again = run(out, world)
            res.append(dict(how=how, step=step, codes=codes, again=again, done=done, same=result(out)==whole))
    return dict(n_steps=n_steps, runs=res)

def variants():
    "Workers, another optimizer, gradient accumulation"
    res = {}
    for name,kwargs in dict(workers=dict(workers=2), adam=dict(adam=True), accumulate=dict(acc=16)).items():
        run(folder/name, **kwargs)
        for step in (2,5,13):
            out = folder/f'{name}_{step}'
            codes = run(out, how='term', step=step, **kwargs)
            run(out, **kwargs)
            res[f'{name} {step}'] = [codes, result(out)==result(folder/name)]
    return res

def worlds():
    "Another number of processes: which images were seen in each epoch"
    res = {}
    for before,after in ((2,1),(1,2)):
        for step in (2,5,9):
            out = folder/f'{before}to{after}_{step}'
            codes = run(out, before, 'term', step)
            run(out, after)
            seen = [json.loads(l) for f in out.glob('steps_*') for l in f.read_text().splitlines()]
            res[f'{before} to {after} {step}'] = dict(codes=codes, lrs=result(out)['lrs'], rows=result(out)['rows'],
                                                      seen=[sorted(sum((o[2] for o in seen if o[0]==e), [])) for e in range(n_epoch)])
    return res

def killed_writing():
    "Kill -9 while a checkpoint is written, 20 times: what is left can be loaded"
    from fastai_fastimagenet.state import read_checkpoint, write_checkpoint
    out,res,rng = folder/'writing',[],random.Random(0)
    out.mkdir()
    state = dict(weights=torch.randn(4_000_000))
    def write(rank, world):
        for k in range(1000): write_checkpoint({**state, 'k':k}, out/f'0000-{k%3:09}.pt')
    for i in range(20):
        pid, = start(write)
        time.sleep(.3+rng.random()*.2)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        res.append(dict(part=len(list(out.glob('*.part'))), loaded=[len(read_checkpoint(f)['weights']) for f in checkpoints(out)]))
    return res

if __name__=='__main__':
    name,*args = sys.argv[1].split(':')
    print(json.dumps(globals()[name](*map(int, args))))
