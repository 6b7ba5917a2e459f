"Two machines: network namespaces with addresses, names and an interface of their own"
import json, os, subprocess, sys, time
from pathlib import Path
import psutil, pytest
from procs import here, kill_all, start
from fastai_fastimagenet.phase import Phase
from fastai_fastimagenet.schedule import Schedule

torchrun = Path(sys.executable).parent/'torchrun'
hosts = [(f'ffi{os.getpid()}a','10.213.7.1'), (f'ffi{os.getpid()}b','10.213.7.2')]
etc = Path('/etc/netns')

def ip(*args): return subprocess.run(['ip', *args], capture_output=True, text=True)

@pytest.fixture(scope='module')
def machines():
    "Two namespaces joined by a cable; skipped where they may not be made"
    if os.geteuid(): pytest.skip('network namespaces need root')
    try:
        for name,addr in hosts:
            try: r = ip('netns', 'add', name)
            except FileNotFoundError: pytest.skip('the command `ip` is not installed')
            if r.returncode: pytest.skip(f'network namespaces are not allowed here: {r.stderr.strip()}')
            (etc/name).mkdir(parents=True)
            (etc/name/'resolv.conf').write_text('')
            (etc/name/'hosts').write_text('127.0.0.1 localhost\n' + ''.join(f'{a} {n}\n::ffff:{a} {n}\n' for n,a in hosts))
        (a,addr_a),(b,addr_b) = hosts
        made = [ip('link', 'add', 'eth0', 'netns', a, 'type', 'veth', 'peer', 'name', 'eth0', 'netns', b)]
        made += [ip('-n', n, *cmd) for n,addr in hosts for cmd in (('addr','add',f'{addr}/24','dev','eth0'), ('link','set','eth0','up'), ('link','set','lo','up'))]
        wrong = [r.stderr.strip() for r in made if r.returncode]
        if wrong: pytest.skip(f'network interfaces cannot be made here: {wrong[0]}')
        yield hosts
    finally:
        for name,_ in hosts:
            ip('netns', 'del', name)
            if (etc/name).is_dir():
                for f in (etc/name).iterdir(): f.unlink()
                (etc/name).rmdir()

def start_both(port, *args):
    "`torchrun --nnodes 2 ARGS` on both machines"
    return [start('ip', 'netns', 'exec', name, torchrun, '--nnodes', 2, '--nproc-per-node', 1, '--node-rank', i, '--master-addr', hosts[0][1],
                  '--master-port', port, *args) for i,(name,_) in enumerate(hosts)]

def finish(procs, timeout):
    "Output of both machines; killed after `timeout` seconds"
    end = time.monotonic()+timeout
    try: return [p.communicate(timeout=max(1, end-time.monotonic())) for p in procs]
    finally: kill_all(*procs)

def table(path, n_epoch):
    Schedule([Phase(n_epoch, size=32, bs=16, lr=(.02,.1), min_scale=.5), Phase(1, size=48, lr=(.1,0), rect=True)], world=2).save(path)
    return path

def test_the_demo_trains(machines, small_photos, tmp_path):
    procs = start_both(29611, '-m', 'fastai_fastimagenet.train', '--data', small_photos, '--schedule', table(tmp_path/'s.json', 2),
                  '--arch', 'resnet_small', '--workers', '0', '--out', tmp_path/'run')
    (out,err),(out_b,err_b) = finish(procs, 200)
    assert procs[0].returncode==procs[1].returncode==0, err[-3000:]+err_b[-3000:]
    assert 'Schedule: 3 epochs, 2 processes' in out and 'final top-1' in out and not out_b
    assert json.loads((tmp_path/'run/result.json').read_text())['epochs']==3

def test_a_dead_worker_ends_the_other_machine(machines, small_photos, tmp_path):
    "SIGKILL to the worker of machine 1: both launchers end with an error, and machine 0 says what happened"
    procs = start_both(29612, '-m', 'fastai_fastimagenet.train', '--data', small_photos, '--schedule', table(tmp_path/'s.json', 10_000),
                  '--arch', 'resnet_small', '--workers', '0', '--out', tmp_path/'run')
    try:
        end = time.monotonic()+150
        while not (tmp_path/'run/history.csv').exists():
            assert time.monotonic()<end and procs[0].poll() is None, 'training did not begin'
            time.sleep(.2)
        [worker] = [p for p in psutil.Process(procs[1].pid).children(recursive=True) if 'fastai_fastimagenet.train' in p.cmdline() and '--nnodes' not in p.cmdline()]
        worker.kill()
        began = time.monotonic()
        (_,err),(_,err_b) = finish(procs, 60)
        assert time.monotonic()-began<60 and procs[0].returncode and procs[1].returncode
        assert 'Rank 0 lost the other processes' in err and 'Signal 9 (SIGKILL)' in err_b
    finally: kill_all(*procs)

def test_bytes_on_the_wire(machines, tmp_path):
    "Counters of the interface: fp16 and bf16 send half of fp32, and all are 2*params*bytes*(n-1)/n per step within 5 %"
    (out,err),_ = finish(start_both(29613, here/'ddp_bytes.py', tmp_path/'bytes.json'), 200)
    found = json.loads((tmp_path/'bytes.json').read_text())
    for name,size in (('fp32',4), ('fp16',2), ('bf16',2)):
        assert found[name]/(2*found['params']*size*(2-1)/2)==pytest.approx(1, abs=.05), found
    assert found['fp16']/found['fp32']==pytest.approx(.5, abs=.025) and found['bf16']/found['fp32']==pytest.approx(.5, abs=.025)

def test_meter_agrees_with_a_known_transfer(machines):
    procs = [start('ip', 'netns', 'exec', name, sys.executable, here/'net_meter.py', what, hosts[0][1]) for (name,_),what in zip(hosts, ('send','receive'))]
    outs = finish(procs, 120)
    sender,receiver = [json.loads(o.strip().splitlines()[-1]) for o,_ in outs]
    assert sender['interface']==receiver['interface']=='eth0'
    for seen,rate,seconds in ((sender['sent'],sender['rates'][1],sender['seconds']), (receiver['received'],receiver['rates'][0],receiver['seconds'])):
        assert .95<seen/40e6<1.05 and .95<rate*seconds*1e9/8/40e6<1.05
