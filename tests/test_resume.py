"Training that is interrupted goes on as if nothing had been"
import http.server, json, os, subprocess, sys, threading
from functools import partial
import pandas as pd, pytest, torch
from fastcore.foundation import L
import math, signal, time
import numpy as np
from torch import nn
from torch.nn import functional as F
from fastai.vision.all import Callback, DataLoaders, Learner, OptimWrapper, Path, PILImage, tensor
from fastai_fastimagenet.all import *
from fastai_fastimagenet import checkpoint
from fastai_fastimagenet.state import checkpoints, read_checkpoint, write_checkpoint
from procs import here, kill_all, run, start

@pytest.fixture(scope='session')
def resumed(tmp_path_factory):
    "Case -> what `resume_cases` found"
    folder = tmp_path_factory.mktemp('resume')
    (folder/'images').mkdir()
    for i in range(60):
        im = PILImage.create(np.random.default_rng(i).integers(0, 255, (40+i%30,50,3), np.uint8))
        im.save(folder/'images'/f'{i:04}_{"abcd"[i%4]}.jpg')
    return lambda case: json.loads(run(sys.executable, here/'resume_cases.py', case, folder, timeout=600).stdout)

@pytest.mark.parametrize('world', [1,2])
def test_same_losses(resumed, world):
    res = resumed(f'curves:{world}')
    assert len(res['runs'])==60 and len({r['step'] for r in res['runs']})>=8
    for r in res['runs']: assert r['same'] and r['again']==[0]*world and not r['done'] and any(r['codes']), r
    assert all(r['codes']==[143]*world for r in res['runs'] if r['how']=='term')

def test_variants(resumed):
    for name,(codes,same) in resumed('variants').items(): assert same and codes==[143], name

def test_other_number_of_processes(resumed):
    res = resumed('worlds')
    assert len(res)==6
    for name,r in res.items():
        assert r['codes'] in ([143],[143,143]) and r['seen']==[list(range(48))]*3, name # Each image once in each epoch
        assert r['rows'][0][2]==4 and len(r['lrs'])>=12, name
    for after in (1,2): # The lr of the last step is the table's for this number of processes, wherever the run was interrupted
        last = {r['lrs'][-1] for name,r in res.items() if name.split()[2]==str(after)}
        assert len(last)==1 and abs(min(last)-.04/12*(1 if after==1 else 4))<1e-6

def test_killed_while_writing(resumed):
    res = resumed('killed_writing')
    assert len(res)==20 and sum(r['part'] for r in res)>=5 # It was killed in the middle
    assert all(n==4_000_000 for r in res for n in r['loaded']) and res[-1]['loaded']

def test_what_a_kill_leaves_is_written_over(tmp_path, monkeypatch):
    def killed(*args): raise KeyboardInterrupt
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(os, 'replace', killed)
        write_checkpoint(dict(k=0), tmp_path/'0000-000000004.pt')
    assert len(list(tmp_path.iterdir()))==1
    write_checkpoint(dict(k=1), tmp_path/'0000-000000008.pt')
    assert [f.name for f in tmp_path.iterdir()]==['0000-000000008.pt']

def learner(model=None, n=32):
    dls = DataLoaders.from_dsets([(torch.randn(4), torch.tensor(1.)) for _ in range(n)], [(torch.randn(4), torch.tensor(1.))]*4, bs=4, num_workers=0, drop_last=True)
    return Learner(dls, model or nn.Linear(4, 1), lambda p,t: F.mse_loss(p.squeeze(-1), t))

def fit(learn, *cbs, n=2):
    with learn.no_bar(), learn.no_logging(): learn.fit(n, .01, cbs=cbs)
    return learn

def test_damaged_and_foreign(tmp_path, capsys):
    fit(learner(), Checkpoint(tmp_path, minutes=1e-9, keep=4))
    files = checkpoints(tmp_path)
    assert len(files)==4 and files[-1].name=='0001-000000032.pt'
    with pytest.raises(ValueError, match='holds checkpoints of an earlier fit'): fit(learner(), Checkpoint(tmp_path))
    with pytest.raises(ValueError, match='another model'): fit(learner(nn.Linear(4, 2)), Checkpoint(tmp_path, resume=True))
    with pytest.raises(ValueError, match=r'another number of epochs \(2, this one has 3\)'): fit(learner(), Checkpoint(tmp_path, resume=True), n=3)
    with pytest.raises(ValueError, match='other training images'): fit(learner(n=28), Checkpoint(tmp_path, resume=True))
    with pytest.raises(ValueError, match=r'another optimizer \(Optimizer weight_decay .*, this one has SGD\)'):
        other = learner()
        other.opt_func = partial(OptimWrapper, opt=torch.optim.SGD)
        fit(other, Checkpoint(tmp_path, resume=True))
    with pytest.raises(ValueError, match='to resume from. Give the folder of an earlier fit'): fit(learner(), Checkpoint(tmp_path/'none', resume=True))
    files[-1].write_bytes(files[-1].read_bytes()[:-100])
    files[-2].write_bytes(b'')
    torch.save(dict(model={}), files[-3])
    capsys.readouterr()
    check = Checkpoint(tmp_path, resume=True)
    fit(learner(), check)
    said = capsys.readouterr().out
    assert said.count('Not used')==3 and said.count('it is damaged')==2 and 'no checkpoint of this version' in said
    assert f'Resumed from {files[0]}' in said and check.file.name=='0001-000000032.pt' and read_checkpoint(check.file)['done']==32

def test_bound_to_its_table(small_photos, tmp_path):
    "A `Checkpoint`, of the fit or of the learner, goes on with the table that it was made for, and the caller's list stays as it was"
    a,b = (Schedule([Phase(1, size=24, bs=40, lr=lr)]) for lr in (.01,.02))
    for own in (False,True):
        check,model = Checkpoint(tmp_path/f'{own}'),nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 20))
        learn,mine = Learner(imagenet_dls(small_photos, 24, 40, workers=0), model, cbs=check if own else None),[] if own else [check]
        with learn.no_bar(), learn.no_logging():
            learn.fit_phases(a, cbs=mine)
            check.resume = True
            with pytest.raises(ValueError, match='another table'): learn.fit_phases(b, cbs=mine)
            learn.fit_phases(a, cbs=mine, resume=None)
            assert check.meta=={} and mine==([] if own else [check])
            learn = Learner(learn.dls, model)
            with learn.no_bar(): learn.fit_phases(a, cbs=(mine := L()), resume=tmp_path/f'{own}')
            assert mine==[]

def test_a_copy_under_another_name_is_left_alone(tmp_path):
    fit(learner(), Checkpoint(tmp_path, minutes=1e-9))
    kept = tmp_path/'0001-000000032-keep.pt'
    kept.write_bytes(checkpoints(tmp_path)[-1].read_bytes())
    fit(learner(), Checkpoint(tmp_path, minutes=1e-9, resume=True), n=2)
    assert len(checkpoints(tmp_path))==3 and kept.exists()

def test_only_plain_values(tmp_path):
    "A pickle that runs code is refused, not run"
    class Evil:
        def __reduce__(self): return os.mkdir, (str(tmp_path/'evil'),)
    torch.save(dict(format='fastai_fastimagenet checkpoint 1', x=Evil()), tmp_path/'0000-000000000.pt')
    with pytest.raises(ValueError, match='damaged, or no checkpoint'): read_checkpoint(tmp_path/'0000-000000000.pt')
    assert not (tmp_path/'evil').exists()

def test_usr1_saves_and_goes_on(tmp_path):
    class Usr1(Callback):
        def after_batch(self):
            if self.training and self.train_iter==3: os.kill(os.getpid(), signal.SIGUSR1)
    before = signal.getsignal(signal.SIGUSR1)
    learn = fit(learner(), Checkpoint(tmp_path), Usr1())
    assert [f.name for f in checkpoints(tmp_path)]==['0000-000000012.pt','0000-000000032.pt','0001-000000032.pt'] and len(learn.recorder.losses)==16
    assert signal.getsignal(signal.SIGUSR1)==before

def test_spot_notice(tmp_path, monkeypatch):
    "A metadata service on this machine, with version 2's token, that says nothing at first"
    asked = []
    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_PUT(self): self.answer(200, 'secret')
        def do_GET(self):
            ok = self.headers.get('X-aws-ec2-metadata-token')=='secret' and self.path.endswith('/meta-data/spot/instance-action')
            asked.append(ok)
            self.answer(200 if ok and len(asked)>2 else 404, '{"action": "terminate"}')
        def answer(self, code, text):
            self.send_response(code)
            self.end_headers()
            self.wfile.write(text.encode())
        def log_message(self, *args): pass
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv('AWS_EC2_METADATA_SERVICE_ENDPOINT', f'http://127.0.0.1:{server.server_port}')
    monkeypatch.setattr(checkpoint, '_spot_every', .05)
    class Slow(Callback):
        def after_batch(self):
            if self.training: time.sleep(.1)
    fit(learner(), check := Checkpoint(tmp_path, keep=9), Slow())
    server.shutdown()
    assert all(asked) and len(asked)==3 and len(checkpoints(tmp_path))==3 # Both ends of epochs, and one more

def test_a_loader_of_pytorch_is_refused(tmp_path):
    dl = torch.utils.data.DataLoader([(torch.zeros(4), torch.tensor(1.))]*8, batch_size=4)
    with pytest.raises(ValueError, match='`Checkpoint` need a fastai `DataLoader` or `TfmdDL`, got torch.utils.data.dataloader.DataLoader'):
        fit(Learner(DataLoaders(dl, dl), nn.Linear(4, 1), F.mse_loss), Checkpoint(tmp_path))

def test_full_disk_is_said(tmp_path):
    class Full(Callback):
        order = 5
        def before_train(self): (tmp_path/'checkpoint.part').mkdir(exist_ok=True)
    with pytest.raises(OSError, match='A checkpoint could not be written'): fit(learner(), Checkpoint(tmp_path), Full())

def test_no_checkpoint_of_broken_weights(tmp_path):
    class Break(Callback):
        def after_batch(self):
            if self.train_iter==3: self.learn.model.weight.data.fill_(math.nan)
    with pytest.raises(FloatingPointError, match=r'epoch 0, batch 3, with learning rate 0.01. Last checkpoint: .*0000-000000008.pt'):
        fit(learner(), Checkpoint(tmp_path, minutes=1e-9), Break(), FiniteLoss())

def test_wrong_arguments(tmp_path):
    with pytest.raises(ValueError, match='`minutes` must be above 0'): Checkpoint(tmp_path, minutes=0)
    with pytest.raises(ValueError, match='`keep` must be 1 or more'): Checkpoint(tmp_path, keep=0)
    with pytest.raises(ValueError, match='holds no checkpoint to resume from. Give'): fit(learner(), Checkpoint(tmp_path/'new', resume=True))

train = [Path(sys.executable).parent/'fastimagenet-train']

@pytest.mark.parametrize('world', [1,2])
def test_script_restarted_by_torchrun(small_photos, tmp_path, world):
    "A process that dies is started again by torchrun, and the run ends as it would have"
    sched = Schedule([Phase(1, size=24, bs=20, lr=(.02,.1), min_scale=.5), Phase(1, size=32, lr=(.1,0))])
    sched.save(tmp_path/'s.json')
    args = ['--data', small_photos, '--schedule', tmp_path/'s.json', '--arch', 'resnet_small', '--workers', '1', '--checkpoint-minutes', '1e-6']
    for name in ('whole','broken'):
        env = dict(BREAK_AT='13') if name=='broken' else {}
        r = run(sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', world, '--max-restarts', 1,
                here/'resume_train.py', *args, '--out', tmp_path/name, env=env, timeout=300)
        assert ('Resumed from' in r.stdout)==(name=='broken')
    a,b = [pd.read_csv(tmp_path/n/'history.csv')[['epoch','size','bs','lr','train_loss','valid_loss','top1']] for n in ('whole','broken')]
    assert a.equals(b) and len(a)==2
    r = run(*train, '--resume', tmp_path/'broken', '--seed', '3', ok=False)
    assert r.stderr.strip()=='fastimagenet-train: `--resume` takes the settings of the run: leave out seed'
    r = run(*train, '--resume', tmp_path, ok=False)
    assert 'holds no run to resume: it has no settings.json' in r.stderr
    r = run(*train, *args, '--out', tmp_path/'whole', ok=False)
    assert 'holds an earlier run' in r.stderr

def test_a_folder_is_for_one_run_at_a_time(small_photos, tmp_path):
    "A second process is refused and changes nothing; one that was killed is in nobody's way"
    sched = Schedule([Phase(10_000, size=24, bs=20, lr=.01)])
    sched.save(tmp_path/'s.json')
    p = start(*train, '--data', small_photos, '--schedule', tmp_path/'s.json', '--arch', 'resnet_small', '--workers', '1', '--checkpoint-minutes', '1e-6', '--out', tmp_path/'o')
    try:
        while not p.stdout.readline().startswith('         0 '): assert p.poll() is None
        settings = (tmp_path/'o/settings.json').stat().st_mtime_ns
        assert f'Another process trains into {tmp_path}/o: wait for its end' in run(*train, '--resume', tmp_path/'o', ok=False).stderr
        assert (tmp_path/'o/settings.json').stat().st_mtime_ns==settings and p.poll() is None
        p.kill()
    finally:
        p.kill()
        p.communicate()
    q = start(*train, '--resume', tmp_path/'o')
    try:
        lines = [q.stdout.readline()]
        while lines[-1] and not lines[-1].startswith('Resumed from'): lines.append(q.stdout.readline())
    finally: kill_all(p, q)
    assert lines[-1], q.stderr.read()

def test_script_stopped_and_resumed(small_photos, tmp_path):
    "SIGTERM from outside, then --resume, which needs no other option"
    sched = Schedule([Phase(3, size=24, bs=20, lr=(.1,0))])
    sched.save(tmp_path/'s.json')
    p = subprocess.Popen([*map(str, train), '--data', small_photos, '--schedule', tmp_path/'s.json', '--arch', 'resnet_small', '--workers', '0', '--out', tmp_path/'o'],
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while not p.stdout.readline().startswith('         0 '): assert p.poll() is None
        p.terminate()
        out,err = p.communicate(timeout=60)
    finally: p.kill()
    assert p.returncode==143 and 'Stopped by SIGTERM. Saved:' in out and f'--resume {tmp_path}/o' in out and not err, (out, err)
    (tmp_path/'s.json').unlink()
    r = run(*train, '--resume', tmp_path/'o')
    assert 'Resumed from' in r.stdout and 'after 3 epochs' in r.stdout
    assert list(pd.read_csv(tmp_path/'o/history.csv').epoch)==[0,1,2] and json.loads((tmp_path/'o/result.json').read_text())['epochs']==3
