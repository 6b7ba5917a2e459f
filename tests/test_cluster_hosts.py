"Three machines with an sshd of their own: what happens when connections, workers and machines are lost"
import fcntl, os, pty, re, select, shlex, signal, subprocess, sys, tempfile, termios, threading, time
from contextlib import contextmanager
from hashlib import sha1
from pathlib import Path
import pytest
from hosts import make_hosts
from procs import kill_all, start
from fastai_fastimagenet.cluster.gate import open_gate
from fastai_fastimagenet.cluster.ssh import SSHCluster
from fastai_fastimagenet.cluster.task import *

@pytest.fixture(scope='module')
def hosts():
    with make_hosts(3) as hs: yield hs

@pytest.fixture
def cluster(hosts):
    with hosts.cluster() as c: yield c
    assert not list(Path(tempfile.gettempdir()).glob(f'fi-*-{sha1(str(c.tasks[0].config).encode()).hexdigest()[:8]}'))
    assert not [h for h in hosts if h.inside('pgrep', '-f', 'tmux|FASTIMAGENET', check=False)]

def masters(c):
    "Process numbers of the shared connections"
    out = [subprocess.run(['ssh', '-F', t.config, '-O', 'check', t.host], capture_output=True, text=True).stderr for t in c.tasks]
    return [int(m[1]) if (m := re.search(r'pid=(\d+)', o)) else None for o in out]

def until(f, timeout=10):
    end = time.monotonic()+timeout
    while not (res := f()):
        assert time.monotonic()<end, f'not within {timeout} s'
        time.sleep(.05)
    return res

@contextmanager
def later(seconds, f):
    "Do `f` in `seconds` from now; gives a list with the time when it was done"
    at = []
    def work(): at.append(time.monotonic()); f()
    timer = threading.Timer(seconds, work)
    timer.start()
    try: yield at
    finally: timer.join()

def terminal(cmd, *keys):
    "Run `cmd` in a terminal; write each of `keys`, pairs of keys and what is to be seen then"
    main,other = pty.openpty()
    with subprocess.Popen(['bash', '-c', cmd], stdin=other, stdout=other, stderr=other, start_new_session=True, env={**os.environ, 'TERM': 'xterm'},
                          preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0)) as p:
        os.close(other)
        seen,end = '',time.monotonic()+20
        try:
            for key,sign in keys:
                os.write(main, key)
                while sign not in seen:
                    assert time.monotonic()<end and select.select([main], [], [], 10)[0], seen
                    seen += os.read(main, 10000).decode(errors='replace')
        finally:
            p.kill()
            os.close(main)

count = 'n=0; while :; do n=$((n+1)); echo $n; sleep .02; done'

def test_run_follow_and_copy(cluster, hosts, tmp_path):
    names = [h.name for h in hosts]
    assert cluster.sh('hostname')==names and cluster.alive()=={h.address: True for h in hosts}
    runs = cluster.each(lambda t: t.run('for i in 1 2 3; do echo "$(hostname) $i"; sleep .1; done; echo "$SECRET" > out; exit $N', 'train', wait=False, env=dict(N=t.rank), secrets=dict(SECRET="a'b\nc")))
    assert [r.status for r in runs]==[None]*3 or max(r.status or 0 for r in runs)<=2
    seen = [[] for _ in runs]
    assert cluster.each(lambda t: runs[t.rank].follow(seen[t.rank].append))==[0, 1, 2]
    assert seen==[[f'{n} {i}' for i in (1,2,3)] for n in names]
    with pytest.raises(HostError, match=f'(?s){hosts[1].address}: run next ended with status 3.*last words'): cluster.tasks[1].run('echo last words; exit 3', 'next')
    (tmp_path/'code/sub').mkdir(parents=True)
    (tmp_path/'code/sub/a.py').write_text('1')
    for dst in ('code', 'with space/code'): # By rsync, and by tar
        cluster.upload(tmp_path/'code', dst)
        (tmp_path/'code/sub/a.py').write_text('2')
        cluster.upload(tmp_path/'code', dst)
        cluster.download(dst, tmp_path/'back')
        assert [(tmp_path/'back'/t.name/'sub/a.py').read_text() for t in cluster.tasks]==['2']*3
    cluster.download('out', tmp_path/'outs')
    assert [(tmp_path/'outs'/t.name).read_text() for t in cluster.tasks]==["a'b\nc\n"]*3
    with pytest.raises(HostError, match='none'): cluster.tasks[0].download('none', tmp_path)

def test_what_ssh_could_confuse(cluster):
    "Its own exit status, time limits, input, and what a shell would take for its own"
    t = cluster.tasks[0]
    with pytest.raises(HostError, match='failed with exit code 255\nout\nerr') as e: t.sh('echo out; echo err >&2; exit 255')
    assert type(e.value) is HostError
    with pytest.raises(HostError, match='took longer than 0.5 s'): t.sh('sleep 20', timeout=.5)
    assert t.sh('pgrep -fx "sleep 20" || echo none')=='none'
    assert t.sh("cat; echo '$HOME' \"*\" 'it'\\''s'", input='in & "put"\n')=='in & "put"\n$HOME * it\'s'
    data = os.urandom(300_000)
    assert t._bytes('cat', data)==data

def test_a_person_attaches(cluster):
    "With the printed command, in a terminal; Ctrl-C there interrupts the command, and a shell stays"
    p = cluster.tasks[0].run('echo here I am; sleep 100', wait=False)
    for cmd in (p.attach, cluster.tasks[0].attach): terminal(cmd, (b'', 'here I am'))
    terminal(p.attach, (b'', 'here I am'), (b'\x03', 'ended with status 130'), (b'echo $((6*7))\n', '42'))
    assert p.status==130
    p.stop()
    terminal(cluster.tasks[0].attach, (b'', '#'), (b'echo $((6*7))\n', '42'))

def test_a_dropped_connection(cluster):
    "Twice, while a run is followed: nothing is lost or doubled, and nothing stays behind on the machine"
    t = cluster.tasks[0]
    p,seen = t.run('for i in $(seq 150); do echo $i; sleep .02; done; exit 3', wait=False),[]
    def out(line):
        seen.append(line)
        if len(seen) in (20, 70): os.kill(masters(cluster)[0], signal.SIGKILL)
    assert p.follow(out)==3 and seen==[str(i+1) for i in range(150)]
    until(lambda: t.sh('pgrep -f "[t]ail -c" || true')=='')
    os.kill(masters(cluster)[0], signal.SIGKILL) # Nothing is done twice, nothing fails without need
    assert t.sh('echo once >> file; cat file')=='once'
    with later(.5, lambda: os.kill(masters(cluster)[0], signal.SIGKILL)), pytest.raises(ConnectionLost, match='broke during `sleep 2`'): t.sh('sleep 2')

def test_a_copy_survives_a_dropped_connection(cluster, tmp_path):
    t = cluster.tasks[0]
    (tmp_path/'big').write_bytes(os.urandom(1_000_000)*150)
    for dst in ('big', 'a big'):
        def drop():
            until(lambda: t.config and int(hosts_size(cluster, dst))>1_000_000)
            os.kill(masters(cluster)[0], signal.SIGKILL)
        with later(0, drop): t.upload(tmp_path/'big', dst)
        assert t.sh(f'cksum < {shlex.quote(dst)}; ls -A | grep -i part || true')==subprocess.run(f'cksum < {tmp_path}/big', shell=True, capture_output=True, text=True).stdout.strip()

def hosts_size(cluster, dst):
    return cluster.tasks[0].sh('find . -path ./runs -prune -o -type f -name "*big*" -printf "%s\\n" | sort -n | tail -1') or 0

def test_a_worker_is_killed(cluster):
    t = cluster.tasks[1]
    p,seen = t.run('echo start; setsid sleep 100 & echo $! > worker; wait $!', wait=False),[]
    with later(.5, lambda: t.sh('kill -9 $(cat worker)')) as at: assert p.follow(seen.append)==137
    assert time.monotonic()-at[0]<3 and seen[0]=='start' and 'Killed' in p.tail()[-1]
    p = t.run('setsid sleep 100 & wait', wait=False)
    p.stop(1)
    assert p.status==143 and t.sh('pgrep -f "[s]leep 100$" || echo none')=='none'

@contextmanager
def back(host):
    "`host` is there again afterwards"
    try: yield
    finally:
        if host.inside('pgrep', 'sshd', check=False): host.mend() # Only the cable was cut
        else:
            host.off()
            host.start()
        until(host.listens)

def follow_all(c, runs, lost):
    "Follow the `runs` until that on machine `lost` ends, then stop the others; the `ClusterError`, what was seen, and when it ended"
    seen,ends = [[] for _ in runs],{}
    def follow(t):
        try: return runs[t.rank].follow(seen[t.rank].append)
        finally: ends[t.rank] = time.monotonic()
    def stop():
        until(lambda: lost in ends, 30)
        for r in runs[:lost]: r.stop()
    with later(0, stop), pytest.raises(ClusterError) as e: c.each(follow)
    return e.value,seen,ends[lost]

@pytest.mark.parametrize('how', ['crash', 'off', 'cut'])
def test_a_machine_is_lost(hosts, how):
    "All processes killed, power off, cable cut: noticed in time with the last output, by name; the others do not mind; afterwards all is well"
    with hosts.cluster() as c:
        runs = c.each(lambda t: t.run(count, wait=False))
        with back(hosts[2]):
            with later(1.5, getattr(hosts[2], how)) as at: error,seen,end = follow_all(c, runs, 2)
            [err] = error.errors
            assert type(err) is HostDead and err.host==hosts[2].address and 'cannot be reached' in str(err) and err.lines==seen[2][-20:] and len(err.lines)==20
            assert end-at[0]<12, f'noticed after {end-at[0]:.1f} s'
            assert all(s==[str(i+1) for i in range(len(s))] for s in seen) and len(seen[0])>len(seen[2])
            assert c.alive()=={t.name: t.rank<2 for t in c.tasks}
        until(c.tasks[2].alive)
        p = c.tasks[2].process(runs[2].name)
        if how=='cut': assert p.status is None and int(p.tail(1)[0])>int(seen[2][-1])
        else: assert p.status==137

def test_the_way_out_names_the_first_error(hosts, capsys):
    "A machine that is lost inside `with` cannot be tidied up; its error comes first"
    with back(hosts[0]), pytest.raises(KeyError), hosts.cluster() as c:
        c.sh('true')
        hosts[0].crash()
        raise KeyError
    assert f'{hosts[0].address}: cannot be reached' in capsys.readouterr().err

def test_refused(hosts, tmp_path):
    "An unknown host key, another one than known, a private key that others may read, a wrong key: said with what to do"
    a = hosts[0].address
    def error(**kwargs):
        c = hosts.cluster(**kwargs)
        with pytest.raises(ClusterError) as e: c.sh('true')
        c.close()
        assert all(type(o) is HostError for o in e.value.errors)
        return str(e.value)
    known = hosts.known_hosts.read_text().splitlines()
    (tmp_path/'known').write_text('\n'.join(known[1:])+'\n')
    said = error(known_hosts=tmp_path/'known')
    assert f'{a}: its host key is not known' in said and hosts[1].address not in said
    (tmp_path/'known').write_text('\n'.join([f'{a} {known[1].split(" ", 1)[1]}', *known[1:]])+'\n')
    said = error(known_hosts=tmp_path/'known')
    assert f'{a}: it shows another host key than the one known' in said and hosts[1].address not in said
    subprocess.run(['ssh-keygen', '-q', '-t', 'ed25519', '-N', '', '-f', tmp_path/'other'], check=True)
    (tmp_path/'open').write_bytes(hosts.key.read_bytes())
    (tmp_path/'open').chmod(0o644)
    said = error(key=tmp_path/'open')
    assert said.count('run `chmod 600`')==3
    assert error(key=tmp_path/'other').count('it refuses the login')==3

def test_a_person_accepts_a_host_key(hosts, tmp_path):
    "With the command that the error names"
    (tmp_path/'known').write_text('')
    c = hosts.cluster(known_hosts=tmp_path/'known')
    with pytest.raises(HostError) as e: c.tasks[0].sh('true')
    ask = re.search(r'`(ssh .*?)`', str(e.value))[1]
    terminal(f'{ask} echo I am in', (b'', 'continue connecting'), (b'yes\n', 'I am in'))
    assert c.tasks[0].sh('echo in')=='in'
    c.close()

def test_through_the_first(hosts):
    "`jump`: the others are reached through the first"
    with hosts.cluster(jump=True) as c:
        hosts[1].inside('ip', 'route', 'add', 'blackhole', hosts[1].address.rpartition('.')[0]+'.1')
        try: assert c.sh('hostname; echo ${SSH_CLIENT%% *}')[1].split()==[hosts[1].name, hosts[0].address]
        finally: hosts[1].inside('ip', 'route', 'del', 'blackhole', hosts[1].address.rpartition('.')[0]+'.1')

def test_the_gate(cluster):
    "The second machine gets a page that only the first one sees"
    first,second = cluster.tasks[:2]
    first.sh('mkdir -p www && echo found > www/page')
    first.run(f'exec {sys.executable} -m http.server -b 127.0.0.1 -d www 8099', wait=False)
    get = f'{sys.executable} -c "import urllib.request; print(urllib.request.urlopen(\\"http://127.0.0.1:8099/page\\", timeout=10).read().decode())"'
    try:
        gate = open_gate(first, sys.executable)
        assert open_gate(first, sys.executable)==gate==f'http://{first.address}:3128'
        assert until(lambda: second.sh(f'http_proxy={gate} {get} || true'))=='found'
        with pytest.raises(HostError, match='refused'): second.sh(get)
    finally: first.sh("pkill -f '[g]ate.py'")

def test_the_launcher_dies(hosts):
    "The run goes on, what followed it does not, and another launcher goes on with it"
    prog = f'''from fastai_fastimagenet.cluster.gate import open_gate
from fastai_fastimagenet.cluster.ssh import SSHCluster
c = SSHCluster(['root@{hosts[0].address}'], key='{hosts.key}', known_hosts='{hosts.known_hosts}')
c.tasks[0].run({count!r}, 'count', wait=False).follow(lambda l: print(l, flush=True))'''
    p = start(sys.executable, '-c', prog)
    try:
        assert p.stdout.readline()=='1\n'
        p.kill()
        p.wait()
        with SSHCluster([f'root@{hosts[0].address}'], key=hosts.key, known_hosts=hosts.known_hosts) as c:
            r,seen = c.tasks[0].process('count'),[]
            assert r.status is None
            until(lambda: c.tasks[0].sh('pgrep -f "[t]ail -c" || true')=='')
            with later(1, r.stop): assert r.follow(seen.append)==143
            assert seen==[str(i+1) for i in range(len(seen))] and len(seen)>40
    finally: kill_all(p)

def test_a_shell_that_talks(hosts):
    "It would be mistaken for output, so it is refused"
    rc = hosts[0].folder/'home/.bashrc'
    rc.write_text('echo Welcome')
    try:
        with hosts.cluster() as c, pytest.raises(HostError, match='(?s)its shell prints something.*Welcome'): c.tasks[0].sh('true')
    except ClusterError as e: assert 'Welcome' in str(e) # `down` says it again
    finally: rc.unlink()

def test_arguments(tmp_path, monkeypatch):
    monkeypatch.setenv('FASTIMAGENET_HOME', str(tmp_path))
    with pytest.raises(ValueError, match='different machines'): SSHCluster(['a', 'me@a'])
    with pytest.raises(ValueError, match='different machines'): SSHCluster([])
    with pytest.raises(ValueError, match="must be a list of .*different machines, as .*got 'gpu1'"): SSHCluster('gpu1')
    with pytest.raises(ValueError, match='Not a name'): SSHCluster(['-oProxyCommand=x'])
    with pytest.raises(ValueError, match='one for each of 2'): SSHCluster(['a', 'b'], addresses=['c'])
    c = SSHCluster(['me@a.b', 'c'], user='you', port=2222)
    assert [t.address for t in c.tasks]==['a.b', 'c'] and [t.name for t in c.tasks]==['a.b', 'c']
    def user(t): return re.search(r'^user (.*)$', subprocess.run(['ssh', '-F', t.config, '-G', t.host], capture_output=True, text=True).stdout, re.M)[1]
    assert [user(t) for t in c.tasks]==['me', 'you'] and c.tasks[0].config.parent.stat().st_mode&0o777==0o700
