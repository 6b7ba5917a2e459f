"The launcher as a user runs it: what is printed, what errors look like, and that other launchers start the same script"
import json, re, signal, socket, sys
from pathlib import Path
import psutil, pytest, torch
from procs import kill_all, launcher, run, start
from fastai_fastimagenet.phase import Phase
from fastai_fastimagenet.schedule import Schedule

bin = Path(sys.executable).parent
hello = '''
import os, sys
print('out', os.environ['RANK'], os.environ['WORLD_SIZE'], os.environ['OMP_NUM_THREADS'], sys.argv[1:])
print('err', os.environ['RANK'], file=sys.stderr)
'''

def script(path, text):
    path.write_text(text)
    return path

def one_line(*args):
    "The only line of a launch that is refused"
    r = run(*launcher, *args, ok=False)
    assert len(r.stderr.splitlines())==1 and not r.stdout, r.stderr
    return r.stderr.strip()

def test_only_rank_0_prints(tmp_path):
    r = run(*launcher, '--nproc', 3, '--log_dir', tmp_path/'logs', script(tmp_path/'s.py', hello), '--nproc', 'a b', '-m', env=dict(OMP_NUM_THREADS='1'))
    assert r.stdout.splitlines()==["out 0 3 1 ['--nproc', 'a b', '-m']"] and r.stderr.splitlines()==['err 0']
    for rank in (1,2):
        assert list((tmp_path/'logs').glob(f'*/*/*/{rank}/stdout.log'))[0].read_text().startswith(f'out {rank} 3')
        assert list((tmp_path/'logs').glob(f'*/*/*/{rank}/stderr.log'))[0].read_text()==f'err {rank}\n'

def test_module_and_gpus(tmp_path):
    (tmp_path/'pkg').mkdir()
    script(tmp_path/'pkg/__init__.py', '')
    script(tmp_path/'pkg/mod.py', hello+"print(os.environ.get('CUDA_VISIBLE_DEVICES'))")
    r = run(*launcher, '--gpus', '2,5', '-m', 'pkg.mod', 'x', env=dict(PYTHONPATH=str(tmp_path)))
    assert r.stdout.splitlines()[0].startswith('out 0 2 ') and r.stdout.splitlines()[1]=='2,5'

def test_refused_before_anything_starts(tmp_path):
    s = script(tmp_path/'s.py', 'raise SystemExit("started")')
    assert re.fullmatch(r'launch: There is no file .*none.py in .*', one_line(tmp_path/'none.py'))
    assert one_line('-m', 'no.such.module')=='launch: There is no module no.such.module'
    assert '`nproc` must be 1 or more, got 0' in one_line('--nproc', 0, s)
    assert '`node_rank` must be from 0 to 1' in one_line('--nnodes', 2, '--node_rank', 2, '--rdzv_endpoint', 'localhost:2', s)
    assert 'Several machines need the address' in one_line('--nnodes', 2, s)
    assert 'must be HOST:PORT' in one_line('--rdzv_endpoint', 'localhost', s)
    with socket.socket() as busy:
        busy.bind(('127.0.0.1', 0))
        busy.listen()
        port = busy.getsockname()[1]
        assert f'Cannot listen at 127.0.0.1:{port}: Address already in use. Take another port' in one_line('--rdzv_endpoint', f'127.0.0.1:{port}', s)
    r = run(*launcher, '--nproc', 'two', s, ok=False)
    assert "invalid int value: 'two'" in r.stderr

def test_a_script_that_raises(tmp_path):
    "All raise the same: it is said once. Only one raises: it is said last, with its traceback"
    r = run(*launcher, '--nproc', 2, script(tmp_path/'all.py', 'raise ValueError("all of us")'), ok=False)
    assert r.stderr.count('ValueError: all of us')==1 and r.stderr.splitlines()[-1].startswith('launch: rank 0 ended with exit code 1')
    r = run(*launcher, '--nproc', 3, script(tmp_path/'one.py', 'import os, time\nif os.environ["RANK"]=="2": raise ValueError("only me")\ntime.sleep(60)'), ok=False)
    *_,err,last = r.stderr.splitlines()
    assert err=='ValueError: only me' and last.startswith('launch: rank 2 ended with exit code 1') and 'one.py' in r.stderr
    for text in ('first','second'): # The output of an earlier run in the same folder is not this run's
        r = run(*launcher, '--nproc', 2, '--log_dir', tmp_path/'logs', script(tmp_path/f'{text}.py', f'from fastai_fastimagenet.group import *\ninit_group(1)\n'
                f'import os\nif os.environ["RANK"]=="1": raise ValueError("{text}")\ngather(1)'), ok=False)
        assert r.stderr.splitlines()[-2:-1]==[f'ValueError: {text}']
    r = run(*launcher, '--nproc', 2, script(tmp_path/'code.py', 'raise SystemExit(7)'), ok=False)
    assert r.returncode==7
    r = run(*launcher, '--nproc', 2, script(tmp_path/'syntax.py', 'if'), ok=False)
    assert r.stderr.count('SyntaxError')==1

def test_interrupt_ends_all(tmp_path):
    p = start(*launcher, '--nproc', 2, script(tmp_path/'s.py', 'import time\nprint("here")\ntime.sleep(600)'))
    try:
        assert p.stdout.readline()=='here\n'
        workers = psutil.Process(p.pid).children(recursive=True)
        p.send_signal(signal.SIGINT)
        err = p.communicate(timeout=60)[1]
    finally: kill_all(p)
    assert p.returncode==130 and err.splitlines()[-1].startswith('launch: stopped by SIGINT, all processes ended')
    assert len(workers)>=2 and not psutil.wait_procs(workers, 10)[1]

@pytest.mark.skipif(sys.platform!='linux', reason='What the kernel does there')
def test_processes_end_with_a_launcher_that_is_killed(tmp_path):
    "Also where nothing can catch it; they get SIGTERM, so training saves its state"
    p = start(*launcher, '--nproc', 2, script(tmp_path/'s.py', 'import time\nfrom fastai_fastimagenet.group import init_group\ninit_group()\nprint("here", flush=True)\ntime.sleep(600)'))
    try:
        assert p.stdout.readline()=='here\n'
        workers = psutil.Process(p.pid).children(recursive=True)
        p.kill()
        left = psutil.wait_procs(workers, 20)[1]
    finally: kill_all(p)
    assert len(workers)>=2 and not left

def test_two_machines_on_one(tmp_path):
    "Two launchers meet at a port; only machine 0 prints"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    s = script(tmp_path/'s.py', 'from fastai_fastimagenet.group import *\ninit_group(1)\nprint(gather(local_rank()))')
    cmd = [*launcher, '--nnodes', '2', '--nproc', '2', '--rdzv_endpoint', f'127.0.0.1:{port}']
    other = start(*cmd, '--node_rank', '1', s)
    try:
        assert run(*cmd, '--node_rank', 0, s).stdout.splitlines()==['[0, 1, 0, 1]']
        assert other.communicate(timeout=60)[0]=='' and other.returncode==0
    finally: kill_all(other)

@pytest.fixture(scope='module')
def demo(small_photos, tmp_path_factory):
    "The arguments of a short run of the training script, and where it ends up under each launcher"
    out = tmp_path_factory.mktemp('demo')
    Schedule([Phase(2, size=32, bs=16, lr=(.02,.1), min_scale=.5), Phase(1, size=48, bs=8, lr=(.05,0), rect=True)], world=2).save(out/'s.json')
    args = '-m','fastai_fastimagenet.train','--data',small_photos,'--schedule',out/'s.json','--arch','resnet_small','--workers',1,'--out'
    starts = dict(ours=[*launcher, '--nproc', 2], torchrun=[bin/'torchrun', '--nproc-per-node', 2],
                  accelerate=[bin/'accelerate', 'launch', '--multi_gpu', '--num_processes', 2, '--num_machines', 1, '--mixed_precision', 'no', '--dynamo_backend', 'no'])
    printed = {k: run(*v, *args, out/k, timeout=300).stdout for k,v in starts.items()}
    return out,printed

def test_every_launcher_trains_the_same(demo):
    out,printed = demo
    res = {k: json.loads((out/k/'result.json').read_text()) for k in printed}
    assert all(r['processes']==2 and r['epochs']==3 for r in res.values())
    rows = {k: [l.split(',')[:8] for l in (out/k/'history.csv').read_text().splitlines()] for k in printed} # Without speed and time
    assert rows['ours']==rows['torchrun']==rows['accelerate'] and len(rows['ours'])==4
    weights = [torch.load(out/k/'model.pth')['model'] for k in printed]
    assert all(torch.equal(w[n], weights[0][n]) for w in weights for n in w)
    for text in printed.values():
        assert text.count('final top-1')==1 and text.count('Schedule: 3 epochs, 2 processes')==1
        assert len([l for l in text.splitlines() if re.match(r' +\d ', l)])==3

def test_counts_are_those_of_one_process(demo, small_photos):
    "The saved weights, evaluated here, have as many right answers as the two processes said: to the last image"
    from fastai.vision.all import CrossEntropyLossFlat, Learner, accuracy, top_k_accuracy
    from fastai_fastimagenet.models import resnet_small
    from fastai_fastimagenet.rectval import rect_dl
    from fastai_fastimagenet.loader import imagenet_dls
    out,_ = demo
    said = json.loads((out/'ours/result.json').read_text())
    dls = imagenet_dls(small_photos, 48, 16, workers=0) # The batch size decides which images share a rectangle
    model = resnet_small(dls.c).to(memory_format=torch.channels_last)
    model.load_state_dict(torch.load(out/'ours/model.pth')['model'])
    learn = Learner(dls, model, CrossEntropyLossFlat(), metrics=[accuracy, top_k_accuracy])
    with learn.no_bar(), learn.no_logging(): rect,centre = learn.validate(dl=rect_dl(dls, 48)),learn.validate()
    n = len(dls.valid_ds)
    assert [round(o*n) for o in (rect[1], rect[2], centre[1])]==[round(said[k]*n) for k in ('rect_top1','top5','centre_top1')]
    assert said['rect_top1']==said['top1'] and 0<said['top5']<1

def test_compressed_gradients_and_bf16(demo, small_photos):
    out,_ = demo
    r = run(*launcher, '--nproc', 2, '-m', 'fastai_fastimagenet.train', '--data', small_photos, '--schedule', out/'s.json', '--arch', 'resnet_small',
            '--workers', 1, '--compress', 'fp16', '--precision', 'bf16', '--out', out/'bf16')
    assert json.loads((out/'bf16/result.json').read_text())['epochs']==3 and 'final top-1' in r.stdout
    losses = [[float(l.split(',')[5]) for l in (out/k/'history.csv').read_text().splitlines()[1:]] for k in ('bf16','ours')]
    assert losses[0]!=losses[1] and losses[0]==pytest.approx(losses[1], rel=.2)

def test_bad_input_on_two_processes(demo, small_photos, tmp_path):
    out,_ = demo
    train = *launcher,'--nproc',2,'-m','fastai_fastimagenet.train'
    for args,text in ((('--data', tmp_path/'none'), 'is no folder'), (('--data', small_photos, '--schedule', out/'s.json', '--out', out/'ours'), 'earlier run'),
                      (('--data', small_photos, '--schedule', 'imagenet18_1'), 'fewer than one batch of'), (('--compress', 'int8'), '`compress` must be')):
        r = run(*train, *args, ok=False)
        said = [l for l in r.stderr.splitlines() if l.startswith('fastimagenet-train: ')]
        assert len(said)==1 and text in said[0] and r.stderr.splitlines()[-1].startswith('launch: rank 0 ended with exit code 1'), r.stderr
