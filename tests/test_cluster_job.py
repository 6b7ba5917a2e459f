"Jobs on this machine, on machines of one's own, and on machines that are taken away"
import json, os, signal, subprocess, sys, threading, time, urllib.request
import psutil, pytest
from hosts import make_hosts
from procs import _env, kill_all, mark, run, start
from fastai_fastimagenet.cli import git_state
from fastai_fastimagenet.phase import Phase
from fastai_fastimagenet.schedule import Schedule
from fastai_fastimagenet.cluster.cloud import CloudError
from fastai_fastimagenet.cluster.task import *
from fastai_fastimagenet.cluster.ssh import *
from fastai_fastimagenet.cluster.local import *
from fastai_fastimagenet.cluster.job import *
from fastai_fastimagenet.cluster.torchrun import *
from fastai_fastimagenet.cluster.run import *
from fastai_fastimagenet.cluster.board import *
from fastai_fastimagenet.cluster.many import *
from fastai_fastimagenet.cluster import run as run_module

one_thread = dict(OMP_NUM_THREADS=1) # Threads of several processes on two cores only wait for each other

def table(*lengths): return Schedule([Phase(lengths[0], size=32, bs=16, lr=(.02,.1), min_scale=.5), Phase(lengths[1], size=48, lr=(.1,0), rect=True)])

def training(data, out, schedule, **kwargs):
    return Job('fastai_fastimagenet.train', schedule=schedule, data=data, arch='resnet_small', workers=0, out=out, name=out.name, env=one_thread, **kwargs)

def running(*marks):
    "Processes of runs in folders that begin with `marks`"
    return [p for p in psutil.process_iter() if _env(p).get('FASTIMAGENET_RUN', '').startswith(tuple(map(str, marks)))]

def until(f, what, timeout=120):
    "Wait until `f()` is true"
    end = time.monotonic()+timeout
    while not (res := f()):
        assert time.monotonic()<end, f'{what} did not happen within {timeout} s'
        time.sleep(.2)
    return res

def test_a_laptop_needs_no_torch():
    code = '''import sys
from fastai_fastimagenet.cluster import job, torchrun, check, prepare, run, board, many
print([m for m in ('torch','fastai','numpy','pandas','boto3') if m in sys.modules])'''
    assert run(sys.executable, '-c', code).stdout.strip()=='[]'

def test_four_trainings_two_at_a_time(small_photos, tmp_path):
    "And a fifth job, that fails, does not stop them"
    (tmp_path/'broken.py').write_text('print("out of paper"); raise SystemExit(3)')
    broken = Job('broken.py', folder=tmp_path, name='broken', out=tmp_path/'runs/broken')
    jobs = [training(small_photos, tmp_path/f'runs/seed{i}', table(1, 1), seed=i) for i in range(4)]
    said = []
    t = run_many([*jobs[:2], broken, *jobs[2:]], lambda i: LocalCluster(folder=tmp_path/f'cluster{i}'), max_parallel=2, report=tmp_path/'report', say=said.append)
    t = t.set_index('job')
    assert list(t.index)==['seed0','seed1','broken','seed2','seed3'] and list(t.status)==['done','done','failed','done','done']
    ok = t.drop('broken')
    assert list(ok.seed)==[0,1,2,3] and (ok.epochs==2).all() and ok.top1.between(0, 1).all() and (ok.minutes>ok.train_minutes).all()
    assert 'ended with exit code 3' in t.error['broken'] and 'out of paper' in t.error['broken'] and not any(ok.error)
    assert 'seed3' in (tmp_path/'report/report.md').read_text() and any('report.html' in s for s in said)
    for j in jobs: assert {'history.csv','model.pth','result.json','job.json','logs','tensorboard'} <= {f.name for f in j.out.iterdir()}
    assert not running(tmp_path)

@pytest.mark.parametrize('num', [signal.SIGINT, signal.SIGTERM], ids=['ctrl-c','sigterm'])
def test_ctrl_c_leaves_no_process(tmp_path, num):
    "A script whose child has a session of its own and ignores SIGTERM; two run, one waits, the signal comes"
    (tmp_path/'stay.py').write_text('''import os, subprocess, time
subprocess.Popen(['bash','-c','trap "" TERM INT HUP; while :; do sleep 1; done'], start_new_session=True)
open(os.environ['OUT_DIR']+'/here', 'w').close()
print('begun', flush=True)
time.sleep(1000)''')
    (tmp_path/'many.py').write_text(f'''from fastai_fastimagenet.cluster.local import *
from fastai_fastimagenet.cluster.job import *
from fastai_fastimagenet.cluster.many import *
jobs = [Job('stay.py', folder={str(tmp_path)!r}, name=f'j{{i}}', out={str(tmp_path)!r}+f'/runs/j{{i}}') for i in range(3)]
run_many(jobs, lambda i: LocalCluster(folder={str(tmp_path)!r}+f'/cluster{{i}}'), max_parallel=2)''')
    p = start(sys.executable, tmp_path/'many.py')
    try:
        until(lambda: len(list(tmp_path.glob('cluster*/rank0/out/*/here')))==2, 'start of two jobs', 60)
        assert len(running(tmp_path))>=4
        began = time.monotonic()
        p.send_signal(num)
        out,err = p.communicate(timeout=60)
        assert time.monotonic()-began<40 and p.returncode and ('KeyboardInterrupt' in err)==(num==signal.SIGINT) and 'giving the clusters back' in out
        assert not running(tmp_path)
        assert sorted(f.name for f in (tmp_path/'runs').iterdir())==['j0','j1'] and (tmp_path/'runs/j0/here').exists()
        until(lambda: not [o for o in psutil.process_iter() if _env(o).get(mark)==p.mark], 'the end of the shells in tmux', 10)
    finally: kill_all(p)

class Stubborn(LocalCluster):
    "Cannot be given back at the first try"
    tries = 0
    def down(self):
        self.tries += 1
        if self.tries==1: raise CloudError('AWS is away')
        super().down()

def test_a_cluster_that_cannot_be_given_back_at_once(tmp_path):
    "Ctrl-C waits for the threads all the same"
    (tmp_path/'a.py').write_text('')
    made,said = [],[]
    def factory(i):
        made.append(Stubborn(folder=tmp_path/f'cluster{i}'))
        return made[-1]
    def interrupt():
        until(lambda: list(tmp_path.glob('cluster0/rank0/runs/a-setup')), 'the setup')
        signal.raise_signal(signal.SIGINT)
    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt): run_many([Job('a.py', folder=tmp_path, name='a', out=tmp_path/'a', setup='sleep 4')], factory, say=said.append)
    assert any('Cluster 0: AWS is away' in s for s in said) and made[0].tries==2 and not running(tmp_path)

class Lost(LocalCluster):
    "Has no machines any more after its first job, and cannot be removed"
    def alive(self): raise CloudError('there are no machines')
    def down(self):
        super().down()
        raise CloudError('AWS is away')

def test_a_cluster_without_machines_is_replaced(tmp_path):
    (tmp_path/'a.py').write_text('')
    said = []
    t = run_many([Job('a.py', folder=tmp_path, name=f'j{i}', out=tmp_path/f'j{i}') for i in range(2)], lambda i: Lost(), say=said.append)
    assert list(t.status)==['done','done'] and 'Cluster 0: AWS is away' in said

def test_a_follower_that_fails(tmp_path):
    "Too many open files: it is said, and the program is ended"
    class Full(LocalTask):
        def _popen(self, cmd, timeout=None, **kwargs):
            if kwargs.get('stderr')==subprocess.DEVNULL: raise OSError(24, 'Too many open files')
            return super()._popen(cmd, timeout, **kwargs)
    (tmp_path/'a.py').write_text('import time; time.sleep(100)')
    t = Torchrun([Full('rank0', 0, str(tmp_path))], 'a', [['a.py']], sys.executable).start()
    began = time.monotonic()
    with pytest.raises(JobError, match='rank0 failed first: OSError.*Too many open files'): t.wait(timeout=30)
    assert time.monotonic()-began<20 and not running(tmp_path)

def test_ctrl_c_while_tensorboard_starts(tmp_path):
    with LocalCluster(folder=tmp_path/'c') as c:
        (tmp_path/'python').write_text('#!/bin/bash\nexec sleep 100\n')
        (tmp_path/'python').chmod(0o755)
        c.python = str(tmp_path/'python')
        def interrupt():
            until(lambda: running(tmp_path), 'the start')
            signal.raise_signal(signal.SIGINT)
        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(KeyboardInterrupt): c.tensorboard(port=0)
        assert not running(tmp_path)

class SpotCluster(LocalCluster):
    "This machine as machines that can be taken and rented again"
    on_spot = True
    def __init__(self, folder):
        self.home,self.launched = folder,0
        super().__init__(folder=folder/'launch0')

    def relaunch(self):
        self.down()
        self.launched += 1
        super().__init__(folder=self.home/f'launch{self.launched}')

def test_a_taken_machine_is_replaced(small_photos, tmp_path, monkeypatch):
    "The notice of the cloud: training saves its state, comes home, and goes on elsewhere where it was"
    monkeypatch.setattr(run_module, '_beat', 1)
    with SpotCluster(tmp_path) as c:
        said = []
        r = c.run(training(small_photos, tmp_path/'runs/spot', table(7, 1)), say=said.append)
        until(lambda: any(l.startswith('         1 ') for l in r.lines), 'the second epoch')
        (tmp_path/'launch0/rank0/watch/interrupted').write_text('{"action": "terminate"}\n')
        r.wait(120)
    log = '\n'.join(r.lines)
    assert r.status=='done' and c.launched==1 and any('is taken back: {"action": "terminate"}' in s for s in said)
    assert 'Stopped by SIGTERM. Saved: ' in log and 'Resumed from' in log and r.result['epochs']==8
    assert len((tmp_path/'runs/spot/history.csv').read_text().splitlines())==9
    assert {f.name for f in (tmp_path/'runs/spot/logs').iterdir()}=={'rank0.log','rank0-2.log'}
    assert (tmp_path/'launch1/rank0/watch/lease').exists() and len(json.loads((tmp_path/'runs/spot/job.json').read_text())['starts'])==2

def test_a_machine_on_demand_is_not_replaced(tmp_path, monkeypatch):
    "It has failed, or a person has ended it"
    monkeypatch.setattr(run_module, '_beat', .2)
    (tmp_path/'wait.py').write_text('import time; print("begun", flush=True); time.sleep(100)')
    with SpotCluster(tmp_path) as c:
        c.on_spot,c.spot = False,'auto'
        r = c.run(Job('wait.py', folder=tmp_path, name='wait', out=tmp_path/'wait'), say=print)
        until(lambda: (tmp_path/'launch0/rank0/watch').exists(), 'the first sign of life')
        (tmp_path/'launch0/rank0/watch/interrupted').write_text('stop\n')
        with pytest.raises(JobError, match='it was taken back'): r.wait(60)
    assert c.launched==0

def test_names_of_jobs(tmp_path):
    "Found for a long script, refused with their own length"
    for n in (28, 40, 100):
        (tmp_path/f'{"x"*n}.py').write_text('')
        assert len(Job(f'{"x"*n}.py', folder=tmp_path).name)<=50
    for n in (51, 70):
        with pytest.raises(ValueError, match=f'may have 50 characters, got {n}'): Job('fastai_fastimagenet.train', name='x'*n)

def test_a_list_of_phases_of_2018(tmp_path):
    "It does not say for how many GPUs it is"
    (tmp_path/'old.json').write_text('[{"ep":0,"sz":128,"bs":128,"trndir":"-sz/160"},{"ep":[0,6],"lr":[0.25,0.5]}]')
    with pytest.raises(ValueError, match='does not say for how many GPUs'): Job('fastai_fastimagenet.train', schedule=tmp_path/'old.json')
    with pytest.raises(ValueError, match='No recipe is called'): Job('fastai_fastimagenet.train', schedule='nonsense')
    table(1, 1).save(tmp_path/'new.json')
    assert Schedule.from_json(Job('fastai_fastimagenet.train', schedule=tmp_path/'new.json').args['schedule'])==table(1, 1)

def test_scripts_outside(tmp_path):
    (tmp_path/'code/runs').mkdir(parents=True)
    for f in ('t.py','code/runs/t.py'): (tmp_path/f).write_text('')
    with pytest.raises(ValueError, match="No file ../t.py .*below `folder`"): Job('../t.py', folder=tmp_path/'code')
    with LocalCluster(folder=tmp_path/'c') as c, pytest.raises(ValueError, match='runs/t.py would not be copied: git ignores it, or it lies in one of .*node_modules.*. Move it, or give another `folder`'):
        c.run(Job('runs/t.py', folder=tmp_path/'code', out=tmp_path/'out'))

def test_slurm_folders_and_machines(tmp_path):
    def out(job):
        line = next(l for l in job.slurm(gpus=0).splitlines() if l.startswith('export OUT_DIR='))
        return run('bash', '-c', f'cd {tmp_path}; {line}; printf %s "$OUT_DIR"').stdout
    train = 'fastai_fastimagenet.train'
    assert out(Job(train, out='/scratch/a $HOME'))=='/scratch/a $HOME' and out(Job(train, out="it's/$b"))==f"{tmp_path}/it's/$b"
    nodes = lambda *args, **kw: int(Job(train, **kw).slurm(*args).split('--nodes=')[1].split()[0])
    assert (nodes(), nodes(4), nodes(nodes=2), nodes(4, nodes=2))==(1, 4, 2, 4)
    with pytest.raises(ValueError, match='`nodes` must be 1 or more'): Job(train).slurm(0)

def test_git_that_is_slow(tmp_path, monkeypatch):
    "Training does not wait for it, and does not end"
    (tmp_path/'git').write_text('#!/bin/bash\nexec sleep 5\n')
    (tmp_path/'git').chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path}:{os.environ["PATH"]}')
    assert git_state(tmp_path, timeout=.2)==(None, None)

slurm_commands = dict(
    srun='while [[ $1 == --* ]]; do shift; done\nSLURM_NODEID=0 SLURM_NNODES=1 "$@" & echo $! > step; wait $!',
    scontrol='case $1 in show) echo localhost;; *) echo "scontrol $*" >> calls;; esac',
    scancel='echo "scancel $*" >> calls; pkill -TERM -P $(cat step) -f train_it.py; kill -TERM $(cat step)')

def test_slurm_stops_in_time_and_goes_on(tmp_path):
    "The script as bash runs it, with commands of Slurm's names that do here what Slurm does on its machines"
    (tmp_path/'bin').mkdir()
    for name,text in {**slurm_commands, 'python':f'exec {sys.executable} "$@"'}.items():
        (tmp_path/'bin'/name).write_text(f'#!/bin/bash\n{text}\n')
        (tmp_path/'bin'/name).chmod(0o755)
    (tmp_path/'train_it.py').write_text('''import os, signal, sys, time
if sys.argv[1:2]==['--resume']: sys.exit(print('goes on from', open(sys.argv[2]+'/state').read()))
def save(*args):
    open(os.environ['OUT_DIR']+'/state', 'w').write('step 5')
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
print('begun', flush=True)
time.sleep(100)''')
    text = Job('train_it.py', folder=tmp_path, name='s', note="it's $HOME", resume=['--resume','{out}']).slurm(gpus=0)
    (tmp_path/'s.sh').write_text(text)
    env = dict(PATH=f'{tmp_path}/bin:{os.environ["PATH"]}', SLURM_SUBMIT_DIR=str(tmp_path), SLURM_JOB_ID='7', SLURM_JOB_NODELIST='n', PYTHONPATH='')
    p = start('bash', tmp_path/'s.sh', env=env)
    try:
        assert p.stdout.readline()=='begun\n'
        p.send_signal(signal.SIGUSR1) # As Slurm does two minutes before the end
        out,err = p.communicate(timeout=60)
    finally: left = kill_all(p)
    assert not left and p.returncode and (tmp_path/'calls').read_text()=='scancel --signal=TERM 7.0\nscontrol requeue 7\n', err
    assert run('bash', tmp_path/'s.sh', env=env).stdout=='goes on from step 5\n'

@pytest.fixture(scope='module')
def machines(tmp_path_factory):
    "Three machines with an sshd"
    with make_hosts(3) as hosts, pytest.MonkeyPatch.context() as mp:
        mp.setenv('FASTIMAGENET_HOME', str(tmp_path_factory.mktemp('home')))
        yield hosts

@pytest.fixture(scope='module')
def cluster(machines):
    c = machines.cluster()
    yield c
    try: c.down()
    except ClusterError: pass # A test has left a machine dead

def test_a_machine_that_is_shut_out_is_named(machines, cluster, tmp_path):
    "The last cannot reach the first, which would wait for it; the check does not"
    (tmp_path/'empty.py').write_text('')
    def route(what): machines[2].inside('ip', 'route', what, 'blackhole', f'{machines[0].address}/32')
    route('add')
    try:
        with pytest.raises(JobError) as e: cluster.run(Job('empty.py', folder=tmp_path, out=tmp_path/'shut', name='shut'), say=print)
    finally: route('del')
    assert e.value.node==machines[2].address and f'cannot reach {machines[0].address}' in str(e.value)

def test_training_on_three_machines(machines, cluster, small_photos, tmp_path):
    "One torchrun on each; the connection drops; all comes home; the curves are seen through a tunnel"
    cluster.upload(small_photos, '/mnt/photos')
    said = []
    r = cluster.run(training('/mnt/photos', tmp_path/'three', table(5, 1)), say=said.append)
    assert any(s=='All-reduce over 3 processes on 3 machines: right' for s in said)
    until(lambda: any(l.startswith('         0 ') for l in r.lines), 'the first epoch')
    cluster.tasks[0].close()
    lines = []
    r.follow(lines.append)
    assert r.status=='done' and r.result['processes']==3 and r.result['epochs']==6 and 'Schedule: 6 epochs, 3 processes' in lines
    for epoch in range(6): assert sum(l.startswith(f'         {epoch} ') for l in lines)==1 # None lost, none doubled
    home = {f.relative_to(tmp_path/'three').as_posix() for f in (tmp_path/'three').rglob('*')}
    assert {'history.csv','model.pth','job.json',*(f'logs/{h.address}.log' for h in machines)} <= home
    assert len([f for f in home if f.startswith('checkpoints/')])==3
    board = cluster.tensorboard(port=0)
    assert urllib.request.urlopen(board.url+'data/runs').read()==b'["three/tensorboard"]'
    board.process.stop() # As `down` does; the tunnel ends by itself
    until(lambda: board.tunnel.poll() is not None, 'the end of the tunnel', 20)
    assert not board.answers()

loop = """import os, time, torch, torch.distributed as dist
dist.init_process_group('gloo')
while True:
    dist.all_reduce(torch.ones(9))
    if os.environ['RANK']=='0': print('step', flush=True)
    time.sleep(.1)"""

def broken(cluster, tmp_path, name, how, within):
    "The `JobError` of a program on all machines when `how()` has happened to it, `within` seconds"
    (tmp_path/'loop.py').write_text(loop)
    r = cluster.run(Job('loop.py', folder=tmp_path, out=tmp_path/name, name=name, env=one_thread), say=print)
    until(lambda: r.lines.count('step')>3, 'the first steps')
    began = time.monotonic()
    how()
    with pytest.raises(JobError) as e: r.wait(90)
    took = time.monotonic()-began
    print(f'{name}: {took:.1f} s\n{e.value}')
    assert took<within, took
    assert r.status=='failed' and e.value.look and str(tmp_path/name/'logs') in str(e.value)
    return e.value

def test_a_killed_worker_is_named(machines, cluster, tmp_path):
    e = broken(cluster, tmp_path, 'worker', lambda: machines[1].inside('pkill', '-KILL', '-f', 'python3? -u loop.py'), 30)
    assert e.node==machines[1].address and e.how.startswith('rank 1 was killed by SIGKILL') and not e.dead

def test_a_cut_machine_is_named(machines, cluster, tmp_path):
    "No packet comes through any more, and nobody says so"
    try: e = broken(cluster, tmp_path, 'cut', machines[2].cut, 40)
    finally: machines[2].mend()
    assert e.node==machines[2].address and e.dead and 'cannot be reached' in e.how
    assert 'step' in (tmp_path/f'cut/logs/{machines[0].address}.log').read_text()

class Spare(SSHCluster):
    "One of `machines`; when it is lost, the next is taken"
    on_spot = True
    def __init__(self, machines):
        self.machines = machines
        super().__init__([machines[0].address], user='root', key=machines.key, known_hosts=machines.known_hosts, python=sys.executable)

    def relaunch(self):
        self.close()
        lost,self.machines[:] = self.machines[0],self.machines[1:]
        self.__init__(self.machines)

counter = """import os, sys, time
from pathlib import Path
file = Path(os.environ['OUT_DIR'])/'count'
first = int(file.read_text()) if sys.argv[1:]==['--go-on'] else 0
print('from', first, flush=True)
for i in range(first, first+40 if first else 10**6):
    Path('new').write_text(str(i))
    os.replace('new', file) # It may be copied at any moment
    time.sleep(.05)"""

def test_a_lost_machine_is_replaced(machines, tmp_path):
    "Its last words were brought home a moment before, and the next machine goes on from there"
    (tmp_path/'counter.py').write_text(counter)
    spares = type(machines)(machines[:2])
    spares.key,spares.known_hosts = machines.key,machines.known_hosts
    with Spare(spares) as c:
        r = c.run(Job('counter.py', folder=tmp_path, out=tmp_path/'count', name='count', resume=['--go-on'], sync_minutes=1/60), say=print)
        until(lambda: (tmp_path/'count/count').exists(), 'the first copy')
        machines[0].cut()
        try: r.wait(90)
        finally: machines[0].mend()
    assert r.status=='done' and r.replaced==1 and r.lines[0]=='from 0' and int(r.lines[1].split()[1])>0
    assert int((tmp_path/'count/count').read_text())==int(r.lines[1].split()[1])+39

def test_a_crashed_machine_is_named(machines, cluster, tmp_path):
    "Not its neighbours, which complain first that they have lost it"
    e = broken(cluster, tmp_path, 'crash', machines[2].crash, 40)
    assert e.node==machines[2].address and e.dead
