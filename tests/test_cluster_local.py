"This machine as a cluster: what a run sees, when it ends, and that nothing stays"
import os, shutil, signal, subprocess, sys, threading, time
from pathlib import Path
import psutil, pytest
from hypothesis import given, settings, strategies as st
from procs import kill_all, start
from fastai_fastimagenet.cluster.local import LocalCluster
from fastai_fastimagenet.cluster.shell import pack, pipe, unpack
from fastai_fastimagenet.cluster.task import *

def processes(): return [p.info for p in psutil.process_iter(['name','cmdline','environ']) if p.info['environ']]

def left(folder):
    "Processes that have `folder` in their environment"
    return [p for p in processes() if any(str(folder) in v for k,v in p['environ'].items() if k.startswith('FASTIMAGENET_'))]

def of_run(p): return [q['name'] for q in processes() if q['environ'].get('FASTIMAGENET_RUN')==p.folder]

def until(f, timeout=10):
    end = time.monotonic()+timeout
    while not (res := f()):
        assert time.monotonic()<end, f'not within {timeout} s'
        time.sleep(.02)
    return res

@pytest.fixture
def cluster(tmp_path):
    with LocalCluster(2, tmp_path/'machines') as c: yield c
    assert not left(tmp_path)

@pytest.fixture
def task(cluster): return cluster.tasks[0]

@pytest.fixture(scope='module')
def one():
    with LocalCluster() as c: yield c.tasks[0]

text = st.text(st.characters(exclude_characters='\0', exclude_categories=['Cs']), max_size=40)

@settings(max_examples=15, deadline=None)
@given(text, text)
def test_any_text_arrives(one, value, secret):
    "In the environment, in secrets and in the command itself, whatever it holds"
    p = one.run(f'printf %s "$A" > out; printf %s "$S" > secret; cat > cmd << "END OF TEXT"\n{value}\nEND OF TEXT', env=dict(A=value), secrets=dict(S=secret))
    read = lambda f: Path(one.folder, f).read_bytes().decode()
    assert (read('out'), read('secret'), read('cmd'))==(value, secret, value+'\n')

def test_what_a_run_sees(task, monkeypatch):
    monkeypatch.setenv('CHANGED', 'first')
    assert task.run('echo $CHANGED; pwd').tail()==['first', task.folder]
    monkeypatch.setenv('CHANGED', 'second') # A tmux server has the environment of whoever started it
    Path(task.folder, 'sub folder').mkdir()
    p = task.run('echo $CHANGED; pwd; [ -t 0 ] || echo no terminal; echo error >&2', 'lr=0.1', cwd='sub folder')
    assert p.tail()==['second', task.folder+'/sub folder', 'no terminal', 'error'] and p.status==0
    with pytest.raises(HostError, match='ended with status 1') as e: task.run('true', cwd='none')
    assert 'none: No such file or directory' in str(e.value)

def test_secrets_stay_secret(task):
    p = task.run('sleep 100', wait=False, env=dict(SEEN='plain'), secrets=dict(TOKEN='hidden-word'))
    until(lambda: not Path(p.folder, 'secrets').exists())
    lines = [' '.join(q['cmdline']) for q in processes()]
    assert not any('hidden-word' in l for l in lines) and any(p.folder in l for l in lines)
    server = [l.split()[2] for l in lines if l.startswith('tmux') and f'{p.folder} ' in l]
    if server: assert 'hidden-word' not in subprocess.run(['tmux','-L',server[0],'show-environment','-g'], capture_output=True, text=True, check=True).stdout
    files = {f.name: f.read_text() for f in Path(p.folder).iterdir()}
    assert set(files)=={'run.sh', 'start', 'log', 'pid'} and 'plain' in files['run.sh'] and not any('hidden-word' in t for t in files.values())

def test_names(task):
    task.run('true', 'a')
    with pytest.raises(HostError, match='There is a run a in .*Take another name'): task.run('true', 'a')
    with pytest.raises(ValueError, match='letters'): task.run('true', '../a')
    with pytest.raises(ValueError, match='environment variable'): task.run('true', env={'A B': 1})
    assert task.run('true').name=='run0' and task.process('a').status==0
    with pytest.raises(HostError, match='there is no run b; there are: a, run0'): task.process('b')

def test_follow(task):
    "Lines come at once, also to a second reader; the last has no end; what is no text does not matter"
    p,seen,second = task.run("for i in 1 2 3; do echo $i; sleep .4; done; printf 'a\\377\\rb\\n\\nlast'; exit 7", wait=False),[],[]
    other = threading.Thread(target=lambda: task.process(p.name).follow(second.append))
    other.start()
    assert p.follow(lambda l: seen.append((l, time.monotonic())))==7
    other.join(10)
    assert [l for l,_ in seen]==second==['1', '2', '3', 'a\ufffd\rb', '', 'last']
    assert all(.2<b-a<.8 for (_,a),(_,b) in zip(seen[:2], seen[1:3]))
    assert p.follow(lambda l: second.append(l))==7 and second[6:]==second[:6]

def test_follow_a_lot(task):
    p,n = task.run('seq 200000; sleep .5; seq 200000', wait=False),[]
    assert p.follow(n.append)==0 and n==[str(i+1) for i in range(200_000)]*2

def test_a_reader_that_fails_leaves_nothing(task):
    p = task.run('echo first; sleep 100', wait=False)
    def out(line): raise KeyError(line)
    with pytest.raises(KeyError): p.follow(out)
    until(lambda: not [q for q in left(task.folder) if q['name']=='tail' and '-c' in q['cmdline']])
    assert p.status is None

def test_the_end_is_that_of_the_command(task):
    "Not that of something it leaves in the background, which `stop` finds"
    p = task.run('sleep 100 & echo done')
    assert p.status==0 and p.tail()==['done']
    assert 'sleep' in of_run(p)
    p.stop()
    assert 'sleep' not in of_run(p) and p.status==0

def test_stop_finds_all(task):
    "Own sessions, orphans, processes that do not listen"
    p = task.run('(setsid sleep 100 &); setsid bash -c "trap : TERM; while :; do sleep .1; done" & wait; sleep 100', wait=False)
    other = task.run('sleep 100', wait=False)
    until(lambda: len(of_run(p))>=5)
    p.stop(.5)
    assert not of_run(p) and p.status in (137,143)
    assert other.status is None and p.wait(1)==p.status

def test_sigterm_is_heard(task):
    p = task.run('trap "echo saved; exit 5" TERM; echo ready; while :; do sleep .1; done', wait=False)
    until(p.tail)
    p.stop()
    assert (p.status, p.tail()[0], p.tail()[-1])==(5, 'ready', 'saved')

def test_killed_without_a_word(task):
    "While anything of it lives it runs; then its status is 137"
    p = task.run('''setsid bash -c 'echo $$ > worker; exec sleep 100' & until [ -s worker ]; do sleep .05; done
        kill -9 $(cat $FASTIMAGENET_RUN/pid); kill -9 $$''', wait=False)
    until(lambda: of_run(p)==['sleep'])
    assert p.status is None
    os.kill(int(Path(task.folder, 'worker').read_text()), signal.SIGKILL)
    assert until(lambda: p.status)==137 and p.follow(lambda l: None)==137
    with pytest.raises(HostError, match='ended with status 137'): task.run('kill -9 $(cat $FASTIMAGENET_RUN/pid); kill -9 $$')

def test_wait(task):
    p = task.run('sleep 1; exit 3', wait=False)
    with pytest.raises(TimeoutError, match='rank0: run run0 still runs after 0.1 s'): p.wait(.1)
    assert p.wait()==3

def test_without_tmux(cluster, tmp_path, monkeypatch):
    "The same, by nohup"
    (tmp_path/'bin').mkdir()
    for c in 'bash tar grep cut sleep tail cat env nohup mv rm mkdir tr ls setsid id wc'.split(): (tmp_path/'bin'/c).symlink_to(shutil.which(c))
    monkeypatch.setenv('PATH', str(tmp_path/'bin'))
    task = cluster.tasks[1]
    assert task.run('echo "[$TMUX]"; [ -t 1 ] || echo no terminal').tail()==['[]', 'no terminal']
    p = task.run('setsid sleep 100 & sleep 100', wait=False)
    assert p.status is None
    p.stop()
    assert p.status==143 and 'sleep' not in of_run(p)
    task.run('sleep 100', wait=False) # Ends with the cluster

def test_a_broken_copy_leaves_nothing(tmp_path):
    src,dst = tmp_path/'src',tmp_path/'dst'
    src.mkdir()
    for i in range(3): (src/f'{i}').write_bytes(os.urandom(50_000))
    with pytest.raises(HostError, match='copying failed'): pipe('here', ['bash','-c',f'({pack(str(src))}) | head -c 100000'], ['bash','-c',unpack(str(src), str(dst))])
    assert os.listdir(tmp_path)==['src']

def test_a_copy_that_says_a_lot():
    "More than a pipe holds, on both sides"
    loud = 'head -c 300000 /dev/zero | tr "\\0" e >&2; '
    done = threading.Thread(target=pipe, args=('here', ['bash','-c',loud+'echo x'], ['bash','-c',loud+'cat']), daemon=True)
    done.start()
    done.join(20)
    assert not done.is_alive()
    with pytest.raises(HostError, match='copying failed\nwriter\nreader'): pipe('here', ['bash','-c','echo reader >&2; exit 3'], ['bash','-c','cat; echo writer >&2'])

def test_copies(cluster, tmp_path):
    src = tmp_path/"it's a folder"
    (src/'sub').mkdir(parents=True)
    (src/'sub/f').write_text('1')
    (src/'run').write_text('2')
    (src/'run').chmod(0o755)
    (src/'link').symlink_to('sub/f')
    cluster.upload(src)
    cluster.upload(src/'run', 'deep/er/file')
    cluster.download(src.name, tmp_path/'got')
    assert sorted(os.listdir(tmp_path/'got'))==['rank0', 'rank1']
    assert (tmp_path/'got/rank1/link').read_text()=='1' and os.readlink(tmp_path/'got/rank1/link')=='sub/f' and os.access(tmp_path/'got/rank1/run', os.X_OK)
    cluster.tasks[0].download('deep/er/file', tmp_path/'got')
    assert (tmp_path/'got/file').read_text()=='2'
    with pytest.raises(ClusterError, match='(?s)rank0: .*no file or folder.*none.*rank1: '): cluster.download('none', tmp_path/'got')
    with pytest.raises(ClusterError, match='There is no file or folder'): cluster.upload(tmp_path/'none')

def test_each(cluster):
    began = time.monotonic()
    assert cluster.each(lambda t: t.sh(f'sleep .6; echo {t.rank}'))==['0', '1'] and time.monotonic()-began<1.1
    def fail(t): raise KeyError('x') if t.rank else HostError('rank0', 'broke', ['last line'])
    with pytest.raises(ClusterError) as e: cluster.each(fail)
    assert str(e.value)=="rank0: broke\nlast line\nrank1: KeyError: 'x'" and [o.host for o in e.value.errors]==['rank0', 'rank1']
    assert cluster.each(lambda t: t.rank, tasks=cluster.tasks[1:])==[1]

def test_bar_on_a_terminal(tmp_path):
    "A bar for several machines; nothing where nobody looks"
    bar = 'from fastai_fastimagenet.cluster.local import LocalCluster\nwith LocalCluster(3) as c: c.sh("true")'
    cmd = [sys.executable, '-c', bar]
    assert subprocess.run(cmd, capture_output=True, text=True, check=True).stdout==''
    if not shutil.which('script') or sys.platform=='darwin': pytest.skip('needs `script` of Linux')
    (tmp_path/'p.py').write_text(bar)
    assert '100.00% [3/3' in subprocess.run(['script', '-qec', f'{sys.executable} {tmp_path}/p.py', '/dev/null'], capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL).stdout

prog = '''
import sys
from fastai_fastimagenet.cluster.local import LocalCluster
def main():
    c = LocalCluster(2, sys.argv[1])
    c.sh('setsid sleep 100 > /dev/null 2>&1 &')
    c.tasks[1].run('setsid sleep 100 & sleep 100', wait=False)
    p = c.tasks[0].run('for i in $(seq 1000); do echo $i; sleep .1; done', 'count', wait=False)
    p.follow(lambda l: print(l, flush=True))
main()
'''

def test_ctrl_c_leaves_no_process(tmp_path):
    p = start(sys.executable, '-c', prog, tmp_path/'machines')
    try:
        assert p.stdout.readline()=='1\n' and len(left(tmp_path))>5
        p.send_signal(signal.SIGINT)
        out,err = p.communicate(timeout=30)
        assert 'KeyboardInterrupt' in err and p.returncode and not left(tmp_path)
    finally: kill_all(p)

def test_a_run_survives_its_launcher(tmp_path):
    p = start(sys.executable, '-c', prog, tmp_path/'machines')
    try:
        assert p.stdout.readline()=='1\n'
        p.kill()
        p.wait()
        with LocalCluster(2, tmp_path/'machines') as c:
            r,seen = c.tasks[0].process('count'),[]
            until(lambda: len(r.tail(1000))>8)
            threading.Timer(.5, r.stop).start()
            assert r.follow(seen.append)==143 and seen==[str(i+1) for i in range(len(seen))] and len(seen)>8
        assert not left(tmp_path)
    finally: kill_all(p)

def test_light():
    "No heavy library, and quick"
    heavy = "('torch','fastai','numpy','pandas','boto3','matplotlib','fastprogress','IPython')"
    names = f'import sys, fastai_fastimagenet.cluster.local, fastai_fastimagenet.cluster.ssh; print([m for m in {heavy} if m in sys.modules])'
    assert subprocess.run([sys.executable, '-c', names], capture_output=True, text=True, check=True).stdout=='[]\n'
