"The watchdog in all its cases: a real bash process, a work folder, a harmless power-off command, and a clock that the test moves"
import http.server, json, os, shlex, shutil, subprocess, sys, threading, time, uuid
from email import message_from_string
from pathlib import Path
import pytest, yaml
from fastai_fastimagenet.cluster.local import LocalTask
from fastai_fastimagenet.cluster.watch import user_data, watchdog

pytestmark = pytest.mark.skipif(not sys.platform.startswith('linux'), reason='machines are Linux')
minute,hour = 60,3600
patience = 60 # Seconds for what takes one

def until(f, what):
    end = time.monotonic()+patience
    while not (res := f()):
        assert time.monotonic()<end, f'waited {patience} s for {what}'
        time.sleep(.02)
    return res

class Machine:
    "A work folder and a watchdog that has looked at it once"
    def __init__(self, path, imds='http://127.0.0.1:9'):
        self.path,self.folder,self.imds = path,path/'fastimagenet',imds
        self.clock,self.off_file,self.procs,self.now,self.lived = path/'clock',path/'off',[],1000,0
        (self.folder/'watch').mkdir(parents=True)
        (path/'console').touch()

    def start(self, **kwargs):
        kwargs = {**dict(max_minutes=24*60, tick=.05, clock=str(self.clock), off=f'echo off >> {self.off_file}'), **kwargs}
        self.set_clock()
        before = self.age()
        with open(self.path/'console', 'a') as out:
            self.dog = self.popen(['bash', '-c', watchdog(self.folder, **kwargs)], stdout=out, stderr=out)
        until(lambda: self.age()!=before, 'the first look')

    def age(self):
        "What the watchdog has written at the end of a tick, and when"
        file = self.folder/'watch/age'
        try: return file.read_text(),file.stat().st_mtime_ns
        except FileNotFoundError: return '',0

    def popen(self, cmd, env=None, **kwargs):
        p = subprocess.Popen(cmd, env={**os.environ, 'AWS_EC2_METADATA_SERVICE_ENDPOINT':self.imds, **(env or {})}, **kwargs)
        self.procs.append(p)
        return p

    def set_clock(self):
        (self.path/'clock.tmp').write_text(f'{self.now}.17 99.99\n')
        (self.path/'clock.tmp').replace(self.clock)

    def looked(self):
        "Wait until a tick that has read this time is over"
        until(lambda: self.age()[0]==f'{self.lived}\n', f'second {self.lived}')

    def wait(self, seconds=1):
        "Let time go by; what was changed in the folder before has been seen afterwards, and decided on"
        self.now,self.lived = self.now+seconds,self.lived+seconds
        self.set_clock()
        self.looked()
        return self.off

    @property
    def off(self): return self.off_file.exists()
    @property
    def why(self):
        [line] = [o for o in self.console.splitlines() if 'power off' in o][:1]
        assert line.partition('power off')[2] in (self.folder/'watch/log').read_text()
        return line
    @property
    def console(self): return (self.path/'console').read_text()

    def run(self, name, **files):
        folder = self.folder/'runs'/name
        folder.mkdir(parents=True, exist_ok=True)
        for k,v in {'run_sh':'train', **files}.items(): (folder/k.replace('_sh', '.sh')).write_text(str(v))
        return folder

    def touch(self, name): (self.folder/'watch'/name).write_text(str(uuid.uuid4()))
    def lease_for(self, seconds, step=4*minute):
        "A launcher is alive for so long"
        for _ in range(seconds//step):
            self.touch('lease')
            if self.wait(step): return True

    def close(self):
        for p in self.procs:
            p.kill()
            p.wait()

@pytest.fixture
def machine(tmp_path):
    m = Machine(tmp_path)
    yield m
    m.close()

def test_real_clock(tmp_path, machine):
    "Nothing of the test but the command that ends the machine"
    off = tmp_path/'off'
    machine.popen(['bash', '-c', watchdog(machine.folder, max_minutes=2/60, tick=.2, off=f'touch {off}')], stdout=subprocess.DEVNULL)
    until(off.exists, 'the end of the time')
    assert 'power off: the time is used up, 2 s' in (machine.folder/'watch/log').read_text()

def test_time_is_used_up(machine):
    "Whatever else speaks for the machine: a run, a launcher and a person"
    run = machine.run('a', log='epoch 1')
    machine.start(max_minutes=60, hung=600)
    machine.touch('lease')
    machine.touch('hold')
    assert not machine.wait(hour-1)
    machine.touch('lease')
    (run/'log').write_text('epoch 2')
    assert machine.wait(1)
    assert machine.why.endswith('the time is used up, 3600 s')

def test_time_goes_on_after_a_restart_and_a_reboot(machine):
    machine.start(max_minutes=60, boot=600)
    assert not machine.wait(hour//2)
    machine.dog.kill()
    machine.start(max_minutes=60, boot=600)
    assert not machine.wait(hour//4)
    machine.dog.kill()
    machine.now = 10
    machine.start(max_minutes=60, boot=600)
    assert not machine.wait(hour//4-1)
    assert machine.wait(1)

def test_run_is_done_and_nobody_came(machine):
    run = machine.run('a', log='epoch 1')
    machine.touch('lease')
    machine.start(done=5, failed=20)
    assert not machine.wait(10*minute)
    (run/'status').write_text('0\n')
    machine.wait()
    assert not machine.wait(5*minute-2)
    assert machine.wait(2)
    assert 'run a is done and nobody came for' in machine.why

def test_run_is_done_but_somebody_is_there(machine):
    machine.run('a', log='', status=0)
    machine.start(done=5)
    assert not machine.lease_for(10*minute)
    assert not machine.wait(4*minute)
    assert machine.wait(minute)

def test_run_failed_and_nobody_came(machine):
    machine.run('a', log='', status=137)
    machine.start(done=5, failed=20)
    assert not machine.wait(20*minute-1)
    assert machine.wait(1)
    assert 'run a failed with exit code 137 and nobody came for 1200 s' in machine.why

def test_newest_run_decides(machine):
    "The older one failed, which would give 20 minutes, and was written to later"
    machine.run('z', status=1)
    new = machine.run('b', status=0)
    os.utime(machine.folder/'runs/z/run.sh', (1,1))
    machine.start(done=5, failed=20)
    assert machine.wait(5*minute)
    assert 'run b is done' in machine.why and new.exists()

def test_tensorboard_keeps_no_machine(machine):
    machine.run('a', status=0)
    machine.run('tensorboard-1a2b3c', log='it serves')
    machine.start(done=5, hung=30)
    assert machine.wait(5*minute)
    assert 'run a is done' in machine.why

def test_any_active_run_counts(machine):
    "The newest is done; one whose `run.sh` has an older date, since the clock was corrected, begins and ends after it"
    machine.run('new', status=0)
    machine.start(done=5, hung=30)
    assert not machine.wait(2*minute)
    machine.run('old', log='')
    os.utime(machine.folder/'runs/old/run.sh', (1,1))
    assert not machine.wait(29*minute)
    (machine.folder/'runs/old/status').write_text('0')
    machine.wait()
    assert not machine.wait(4*minute) # Counted from the end of the last one
    assert machine.wait(minute)

def test_run_begins_and_ends_between_two_looks(machine):
    run = machine.run('a', status=0)
    machine.start(done=5)
    assert not machine.wait(4*minute)
    (run/'status').unlink()
    (run/'status').write_text('0')
    machine.wait()
    assert not machine.wait(4*minute)
    assert machine.wait(minute)

def test_run_without_exit_code_goes_on(machine):
    "Its status is empty, since the disk was full when it was written, or something else has that name"
    machine.run('a', log='', status='')
    (machine.run('b', log='')/'status').mkdir()
    machine.start(done=5, failed=20, hung=60)
    assert not machine.wait(59*minute)
    assert machine.wait(minute)
    assert 'hung: no progress for 3600 s in a b' in machine.why

def test_hung(machine):
    "A launcher that is alive does not help"
    run = machine.run('a', log='epoch 1')
    machine.start(hung=30)
    for i in range(3):
        assert not machine.wait(29*minute)
        (run/'log').write_text(f'epoch {i}')
        machine.wait()
    assert not machine.lease_for(28*minute)
    machine.touch('lease')
    assert machine.wait(2*minute)
    assert 'hung: no progress for' in machine.why and machine.why.endswith('in a')

def test_one_of_two_runs_makes_progress(machine):
    runs = [machine.run(o, log='') for o in 'ab']
    machine.start(hung=30)
    for i in (0,1,0,0,1,1):
        assert not machine.wait(20*minute)
        (runs[i]/'log').write_text(str(uuid.uuid4()))
        machine.wait()
    assert machine.wait(30*minute)

writer = '''import os, sys
for _ in sys.stdin:
    with open(sys.argv[1], 'wb') as f:
        f.write(os.urandom(4<<20))
        os.fsync(f.fileno())
    print([o.split()[1] for o in open('/proc/self/io') if o.startswith('write_bytes')][0], flush=True)'''

def test_silent_download(machine):
    "A run without a log whose process writes to disk is not hung; when it stops writing, it is"
    run = machine.run('a')
    p = machine.popen([sys.executable, '-c', writer, run/'data'], env={'FASTIMAGENET_RUN':str(run)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    machine.start(hung=30)
    for _ in range(3):
        assert not machine.wait(20*minute)
        p.stdin.write('more\n')
        p.stdin.flush()
        if p.stdout.readline()=='0\n': pytest.skip('the folder of the test is in memory: nothing is written to disk')
        machine.wait()
    assert machine.wait(30*minute)

reader = '''
import sys
for line in sys.stdin:
    print(len(open(sys.argv[1], 'rb').read()), flush=True)
'''

def test_silent_training(machine):
    "A run that prints nothing and reads images which are in memory already is not hung; when it stops reading, it is"
    run = machine.run('a', log='')
    (machine.path/'images').write_bytes(bytes(4<<20))
    p = machine.popen([sys.executable, '-c', reader, machine.path/'images'], env={'FASTIMAGENET_RUN':str(run)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    machine.start(hung=30)
    for _ in range(3):
        assert not machine.wait(20*minute)
        p.stdin.write('more\n')
        p.stdin.flush()
        assert p.stdout.readline()==f'{4<<20}\n'
        machine.wait()
    assert machine.wait(30*minute)

def test_no_launcher_and_no_run_since_boot(machine):
    machine.start(boot=30, lease=10)
    assert not machine.wait(30*minute-1)
    assert machine.wait(1)
    assert 'no launcher and no run for 1800 s since boot' in machine.why

def test_launcher_is_gone_and_nothing_runs(machine):
    machine.start(boot=30, lease=10)
    assert not machine.lease_for(60*minute)
    assert not machine.wait(8*minute)
    assert machine.wait(2*minute)
    assert 'the launcher is gone for' in machine.why

def test_hold(machine):
    "Keeps the machine for an hour after the last touch"
    machine.run('a', status=1)
    machine.touch('hold')
    machine.start(failed=20)
    assert not machine.wait(hour-1)
    machine.touch('hold')
    machine.wait()
    assert not machine.wait(hour-2)
    assert machine.wait(2)

def test_dates_do_not_count(machine):
    "Files from yesterday and tomorrow: what counts is when they were seen to change"
    run = machine.run('a', log='epoch 1')
    machine.touch('lease')
    for f,age in ((run/'log',-10*hour), (machine.folder/'watch/lease',-10*hour)): os.utime(f, (time.time()+age,)*2)
    machine.start(hung=30, done=5)
    assert not machine.wait(29*minute)
    os.utime(run/'log', (time.time()+10*hour,)*2)
    machine.wait()
    assert not machine.wait(29*minute)
    (run/'status').write_text('0')
    os.utime(run/'status', (1,1))
    machine.wait()
    assert not machine.wait(5*minute-2)
    assert machine.wait(2)

def test_power_off_is_tried_again(machine):
    machine.start(boot=1, off=f'echo off >> {machine.off_file}; false')
    machine.wait(minute)
    until(lambda: machine.off_file.read_text().count('off')>=3, 'the third try')

def test_strange_files_do_not_stop_it(machine):
    "A folder in place of a file, no number in place of a number"
    (machine.folder/'watch/age').write_text('089x')
    (machine.folder/'watch/log').mkdir()
    for name in ('lease','hold'): (machine.folder/'watch'/name).mkdir()
    for name in ('a b','-rf','$(touch x)','[1]'): machine.run(name, log='')
    (machine.folder/'runs/a b/status').mkdir()
    (machine.folder/'runs/[1]/status').write_bytes(bytes(range(256)))
    (machine.folder/'runs/-rf/status').write_text('')
    (machine.folder/'runs/file').write_text('')
    machine.start(max_minutes=180, hung=600)
    for clock in ('', 'x', '01000', '-5'):
        machine.clock.write_text(clock)
        time.sleep(.2)
    assert not machine.wait(2*hour)
    assert machine.dog.poll() is None and machine.wait(hour) and not Path('x').exists()

def test_folder_is_removed(machine):
    machine.start(boot=30)
    shutil.rmtree(machine.folder)
    assert not machine.wait(29*minute)
    assert machine.wait(minute)

def test_disk_is_full(machine):
    "Nothing can be written: it decides, tells the console, and ends the machine all the same"
    for name in ('log','age.tmp'): (machine.folder/'watch'/name).symlink_to('/dev/full')
    machine.age = lambda: machine.console
    machine.start(boot=1)
    def later():
        machine.now += minute
        machine.set_clock()
        return machine.off
    until(later, 'power off')
    assert 'power off: no launcher and no run for' in machine.console
    assert not os.path.lexists(machine.folder/'watch/age') # Not half written

class Metadata(http.server.BaseHTTPRequestHandler):
    "EC2's metadata service, version 2: a token first"
    def answer(self, code, text=''):
        self.send_response(code)
        self.send_header('Content-Length', str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())
    def do_PUT(self):
        ok = self.path=='/latest/api/token' and self.headers['X-aws-ec2-metadata-token-ttl-seconds']
        self.answer(200 if ok else 400, 'a-token' if ok else '')
    def do_GET(self):
        self.server.asked += 1
        if self.headers['X-aws-ec2-metadata-token']!='a-token': self.answer(401)
        elif self.path=='/latest/meta-data/spot/instance-action' and self.server.note: self.answer(200, self.server.note)
        else: self.answer(404, '<html>404 - Not Found</html>')
    def log_message(self, *args): pass

@pytest.fixture
def metadata():
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Metadata)
    server.note,server.asked = None,0
    thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=.05))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()

handler = '''import signal, sys, time
signal.signal(signal.SIGUSR1, lambda *args: print('checkpoint', flush=True))
print('ready', flush=True)
while True: time.sleep(1000)'''

def test_spot_notice(machine, metadata):
    "Tells the launcher by a file, and processes of active runs that handle SIGUSR1, each once; it does not end the machine"
    machine.imds = f'http://127.0.0.1:{metadata.server_port}/'
    run,over = machine.run('a', log=''),machine.run('over', status=0)
    def start(code, folder):
        p = machine.popen([sys.executable, '-uc', code], env={'FASTIMAGENET_RUN':str(folder)}, stdout=subprocess.PIPE, text=True)
        assert p.stdout.readline()=='ready\n'
        return p
    train,plain,ended = start(handler, run),start('import time\nprint("ready")\ntime.sleep(1000)', run),start(handler, over)
    machine.start()
    file = machine.folder/'watch/interrupted'
    asked = metadata.asked
    machine.wait()
    assert metadata.asked>asked and not file.exists()
    metadata.note = json.dumps(dict(action='terminate', time='2026-11-24T20:00:00Z'))
    assert train.stdout.readline()=='checkpoint\n'
    assert json.loads(file.read_text())['action']=='terminate'
    late = start(handler, run)
    assert late.stdout.readline()=='checkpoint\n'
    machine.wait()
    assert plain.poll() is None and not machine.off
    log = (machine.folder/'watch/log').read_text()
    assert log.count('EC2 takes this machine back')==1
    assert [log.count(f'process {p.pid} ') for p in (train,late,plain,ended)]==[1,1,0,0]

def test_what_a_task_runs(machine, metadata):
    "From the start of a run to the end of the machine, with the files and marks that `Task.run` makes"
    machine.imds = f'http://127.0.0.1:{metadata.server_port}'
    task = LocalTask('rank0', 0, str(machine.folder))
    code = 'import signal\nsignal.signal(signal.SIGUSR1, lambda *args: print("checkpoint"))\nprint("ready")\nsignal.pause()'
    try:
        run = task.run(f'{sys.executable} -uc {shlex.quote(code)}', name='train', wait=False)
        until(lambda: 'ready' in run.tail(), 'the run')
        machine.start(done=5, hung=30)
        assert not machine.wait(29*minute)
        metadata.note = '{"action": "terminate"}'
        assert run.wait(patience)==0 and run.tail()==['ready','checkpoint']
        machine.wait()
        assert not machine.wait(4*minute)
        assert machine.wait(minute)
        assert 'run train is done' in machine.why
    finally: task.end(0)

# From the first boot on

@pytest.fixture(scope='module')
def keys(tmp_path_factory):
    f = tmp_path_factory.mktemp('keys')/'key'
    subprocess.run(['ssh-keygen', '-q', '-t', 'ed25519', '-N', '', '-C', 'host: a # "cluster"', '-f', f], check=True)
    return f.read_text(),f.with_suffix('.pub').read_text()

def parts(text):
    msg = message_from_string(text)
    assert msg.get_content_type()=='multipart/mixed' and not msg.defects
    return [p.get_payload() for p in msg.get_payload()]

def test_user_data_is_well_formed(keys):
    text = user_data(*keys, max_minutes=90.9, user='ec2-user', volume='/data', efs='fs-1.efs.us-east-1.amazonaws.com')
    config,script = parts(text)
    found = yaml.safe_load(config)
    assert config.startswith('#cloud-config\n') and found['ssh_deletekeys'] is True
    assert (found['ssh_keys']['ed25519_private'],found['ssh_keys']['ed25519_public'])==(keys[0],keys[1].strip())
    assert script.startswith('#!/bin/bash\nshutdown -P +90\n') and 'MAX=5370' in script
    assert len(text)<12000 and text.isascii()
    for o in (script, watchdog('~ubuntu/fastimagenet', 60)):
        r = subprocess.run(['bash', '-n'], input=o, capture_output=True, text=True)
        assert not r.returncode and not r.stderr

def test_user_data_of_a_long_command_is_refused(keys):
    with pytest.raises(ValueError, match='16384'): user_data(*keys, max_minutes=60, off='x'*9000)

stubs = dict(
    lsblk='''case "$*" in
"-dno NAME,MODEL") printf '%s\\n' 'nvme0n1 Amazon EC2 NVMe Instance Storage' 'nvme1n1 Amazon Elastic Block Store' 'nvme2n1 Amazon Elastic Block Store';;
"-nro MOUNTPOINT /dev/nvme1n1") printf '\\n/\\n/boot\\n';;
"-nro MOUNTPOINT /dev/nvme2n1") printf '\\n\\n';;
"-nrpo NAME,FSTYPE /dev/nvme2n1") printf '%s\\n' /dev/nvme2n1 '/dev/nvme2n1p1 ext4';;
*) exit 1;; esac''',
    mount='[ "$1" != -t ] || [ -n "$EFS_WORKS" ]', mountpoint='[ -n "$EFS_WORKS" ]', systemctl='[ -z "$NO_SYSTEMD" ]',
    shutdown='', **{'systemd-run':''}, sysctl='', poweroff='', sleep='exec /bin/sleep .05')
stubs['mount.nfs4'] = ''

def boot(tmp_path, keys, env=None, **kwargs):
    "Run the shell part as root would on the first boot, with folders of its own in place of those it writes to; what it called and said"
    if os.geteuid(): pytest.skip('only root may mount')
    (tmp_path/'bin').mkdir()
    for name,code in stubs.items():
        (tmp_path/'bin'/name).write_text(f'#!/bin/bash\necho {name} "$@" >> {tmp_path}/calls\n{code}\n')
        (tmp_path/'bin'/name).chmod(0o755)
    own = {o: tmp_path/str(i) for i,o in enumerate(('/opt', '/etc/systemd/system', os.path.expanduser('~')))}
    for o in own.values(): o.mkdir()
    script = parts(user_data(*keys, user='root', max_minutes=60, off=f'touch {tmp_path}/off', **kwargs))[1]
    (tmp_path/'script').write_text(script)
    binds = ' && '.join(f'mount --bind {b} {a}' for a,b in own.items())
    cmd = ['unshare', '--mount', 'bash', '-c', f'{binds} || exit 77; PATH={tmp_path}/bin:$PATH exec bash {tmp_path}/script']
    r = subprocess.run(cmd, capture_output=True, text=True, timeout=patience, env={**os.environ, **(env or {})}, cwd=tmp_path)
    if r.returncode==77 or 'unshare failed' in r.stderr: pytest.skip(f'mount namespaces are not allowed here: {r.stderr.strip()}')
    assert not r.returncode, r.stderr
    return (tmp_path/'calls').read_text().splitlines(),own,r.stdout

def test_first_boot(tmp_path, keys):
    calls,own,_ = boot(tmp_path, keys, {'EFS_WORKS':'1'}, volume=f'{tmp_path}/data', efs='fs-1', efs_folder=f'{tmp_path}/efs')
    assert calls[0]=='shutdown -P +60'
    assert calls[1].startswith('systemd-run ') and calls[1].endswith(' --on-active=60min shutdown -P now')
    assert 'systemctl enable --now fastimagenet-watchdog' in calls
    assert any(o.startswith('systemctl disable --now') and 'unattended-upgrades' in o for o in calls)
    assert any('net.core.rmem_max=16777216' in o for o in calls)
    assert f'mount -o noatime /dev/nvme2n1p1 {tmp_path}/data' in calls
    [efs] = [o for o in calls if o.startswith('mount -t nfs4')]
    assert 'nfsvers=4.1' in efs and efs.endswith(f'fs-1:/ {tmp_path}/efs')
    home = own[os.path.expanduser('~')]
    assert (home/'fastimagenet/watch/ready').read_text()==''
    assert (own['/opt']/'fastimagenet/watchdog').read_text().strip()==watchdog('~root/fastimagenet', 59.5, off=f'touch {tmp_path}/off').strip()
    unit = (own['/etc/systemd/system']/'fastimagenet-watchdog.service').read_text()
    assert 'ExecStart=/bin/bash /opt/fastimagenet/watchdog\nRestart=always\n' in unit

def test_first_boot_without_efs(tmp_path, keys):
    "It gives up, goes on, and says so"
    calls,own,out = boot(tmp_path, keys, efs='fs-1', efs_folder=f'{tmp_path}/efs')
    assert sum(o.startswith('mount -t nfs4') for o in calls)==10
    assert (own[os.path.expanduser('~')]/'fastimagenet/watch/ready').read_text()==f'EFS fs-1 could not be mounted at {tmp_path}/efs\n'
    assert 'problems: 1' in out

def test_first_boot_without_systemd(tmp_path, keys):
    "A loop starts the watchdog, and starts it again"
    mark = {'NO_SYSTEMD':'1', 'STARTED_BY_TEST':uuid.uuid4().hex}
    def ours():
        for d in Path('/proc').glob('[0-9]*'):
            try:
                if f'STARTED_BY_TEST={mark["STARTED_BY_TEST"]}'.encode() in (d/'environ').read_bytes(): yield d
            except OSError: pass
    def kill(*d):
        for o in d:
            try: os.kill(int(o.name), 9)
            except ProcessLookupError: pass
    def dog(): return [d for d in ours() if (d/'cmdline').read_bytes()==b'/bin/bash\0/opt/fastimagenet/watchdog\0']
    try:
        _,own,_ = boot(tmp_path, keys, mark, boot=100)
        assert 'systemd did not start the watchdog' in (own[os.path.expanduser('~')]/'fastimagenet/watch/ready').read_text()
        [first] = until(dog, 'the watchdog')[:1]
        kill(first)
        until(lambda: [d for d in dog() if d!=first], 'the next watchdog')
    finally:
        while left := list(ours()): kill(*left)
