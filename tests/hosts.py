"""Machines to test on: Linux namespaces with an address, a name, an sshd with a host key, /tmp and a home folder of their own.
Everything else is the file system of this machine, so `sys.executable` works on them. One logs in as root, which needs no new user.
They end with the process that made them, however it ends."""
import os, shutil, subprocess, sys, tempfile, time
from contextlib import contextmanager
from pathlib import Path
import pytest
from fastai_fastimagenet.cluster.ssh import SSHCluster

home = '/mnt' # Of root, on the machines
_commands = 'ip unshare nsenter setpriv ssh sshd ssh-keygen tmux'.split()
_path = f'{os.environ["PATH"]}:/usr/sbin:/sbin'

def _do(*cmd, check=True):
    r = subprocess.run([str(c) for c in cmd], capture_output=True, text=True, stdin=subprocess.DEVNULL, env={**os.environ, 'PATH': _path})
    if check and r.returncode: raise RuntimeError(f'{" ".join(map(str, cmd))}: {r.stderr.strip()}')
    return r

def _until(f, what, timeout=15):
    end = time.monotonic()+timeout
    while not (res := f()):
        if time.monotonic()>end: raise RuntimeError(f'{what()} not within {timeout} s')
        time.sleep(.05)
    return res

def why_not():
    "Why machines cannot be made here; None if they can"
    if not sys.platform.startswith('linux'): return 'namespaces need Linux'
    if os.geteuid(): return 'namespaces with an sshd need root'
    if missing := [c for c in _commands if not shutil.which(c, path=_path)]: return f'not installed: {", ".join(missing)}'
    r = _do('unshare', '--net', '--mount', '--pid', '--uts', '--fork', '--mount-proc', 'true', check=False)
    return f'namespaces are not allowed here: {r.stderr.strip()}' if r.returncode else None

_init = r'''
set -e; cd "$DIR"; hostname "$NAME"
for p in $SHARED; do mkdir -p "tmp$p"; mount --rbind "/tmp$p" "tmp$p"; done
sed "s,^root:[^:]*:\(.*\):[^:]*:[^:]*$,root:*:\1:$HOME_DIR:/bin/bash," /etc/passwd > passwd
rm -rf etc; cp -a /etc etc; cp passwd hosts etc; mount --bind etc /etc # What is written there stays in the machine
[ ! -e /etc/resolv.conf ] || mount --bind /dev/null /etc/resolv.conf
mount -t tmpfs none /run; mkdir /run/sshd
mount --bind home "$HOME_DIR"; mount --rbind tmp /tmp
set +e; until ip link show eth0 > /dev/null 2>&1; do sleep .05; done
ip link set lo up; ip link set eth0 address $MAC; ip addr add $ADDRESS/24 dev eth0; ip link set eth0 up
cd /; "$SSHD" -D -e -f "$DIR"/sshd_config &
while :; do sleep 1000; done
'''

class Host:
    "A machine with `address`; everything about it is in `folder`"
    def __init__(self, name, address, folder, bridge, cable): self.name,self.address,self.folder,self.bridge,self.cable,self.proc = name,address,folder,bridge,cable,None

    def start(self):
        shared = {str(Path(p).resolve())[4:] for p in (sys.prefix, sys.base_prefix, Path(__file__).parents[1]) if str(Path(p).resolve()).startswith('/tmp/')}
        env = dict(PATH=_path, DIR=self.folder, NAME=self.name, ADDRESS=self.address, MAC='02:00:'+':'.join(f'{int(b):02x}' for b in self.address.split('.')), HOME_DIR=home, SHARED=' '.join(sorted(shared)), SSHD=shutil.which('sshd', path=_path))
        with open(self.folder/'sshd.log', 'a') as log:
            self.proc = subprocess.Popen(['setpriv', '--pdeathsig', 'KILL', 'unshare', '--net', '--mount', '--pid', '--uts', '--ipc', '--fork', '--kill-child', '--mount-proc',
                                          'bash', '-c', _init], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={k: str(v) for k,v in env.items()}, start_new_session=True)
        children = Path(f'/proc/{self.proc.pid}/task/{self.proc.pid}/children')
        self.pid = int(_until(lambda: children.read_text().split(), lambda: 'a namespace')[0])
        _until(lambda: os.readlink(f'/proc/{self.pid}/ns/net')!=os.readlink('/proc/self/ns/net'), lambda: 'a network')
        _do('ip', 'link', 'add', self.cable, 'type', 'veth', 'peer', 'name', 'eth0', 'netns', self.pid)
        _do('ip', 'link', 'set', self.cable, 'master', self.bridge, 'up')

    def inside(self, *cmd, check=True):
        "Output of `cmd`, run on the machine without ssh"
        return _do('nsenter', '-t', self.pid, '-a', *cmd, check=check).stdout

    def listens(self): return ':22 ' in self.inside('ss', '-ltn', check=False)
    def crash(self): "All processes die, the kernel lives on and says so"; self.inside('bash', '-c', 'kill -9 -1', check=False)
    def cut(self): "Nothing comes through any more, and nobody says so"; _do('ip', 'link', 'set', self.cable, 'down')
    def mend(self): _do('ip', 'link', 'set', self.cable, 'up')

    def off(self):
        "Power off"
        if self.proc:
            self.proc.kill()
            self.proc.wait()
            _until(lambda: not Path(f'/proc/{self.pid}').exists() or 'State:\tZ' in Path(f'/proc/{self.pid}/status').read_text(), lambda: 'the end of a machine')
        _do('ip', 'link', 'del', self.cable, check=False)
        self.proc = None

class Hosts(list):
    "Machines, with the `key` of root and their `known_hosts`; while they exist, the launcher's files are in a folder of their own too"
    def cluster(self, **kwargs): return SSHCluster([h.address for h in self], **{**dict(user='root', key=self.key, known_hosts=self.known_hosts, python=sys.executable), **kwargs})

def _keygen(file): _do('ssh-keygen', '-q', '-t', 'ed25519', '-N', '', '-C', '', '-f', file)

def _prepare(h, hosts, key):
    "Files of machine `h`"
    (h.folder/'home/.ssh').mkdir(parents=True, mode=0o700)
    (h.folder/'home').chmod(0o700)
    (h.folder/'tmp').mkdir()
    (h.folder/'tmp').chmod(0o1777)
    shutil.copy(f'{key}.pub', h.folder/'home/.ssh/authorized_keys')
    _keygen(h.folder/'host_key')
    (h.folder/'hosts').write_text('127.0.0.1 localhost\n' + ''.join(f'{o.address} {o.name}\n::ffff:{o.address} {o.name}\n' for o in hosts))
    (h.folder/'sshd_config').write_text(f'ListenAddress {h.address}\nHostKey {h.folder}/host_key\nPidFile none\nUsePAM no\nPasswordAuthentication no\n'
                                        'PermitRootLogin prohibit-password\nUseDNS no\nPrintMotd no\nSubsystem sftp internal-sftp\n')

def _tidy():
    "Remove what a process that was killed could not; its machines ended with it"
    for bridge in Path('/sys/class/net').glob('fb[0-9]*'):
        if not Path('/proc', bridge.name[2:]).exists(): _do('ip', 'link', 'del', bridge.name, check=False)
    for folder in Path('/var/tmp').glob('hosts-[0-9]*-*'):
        if not Path('/proc', folder.name.split('-')[1]).exists(): shutil.rmtree(folder, ignore_errors=True)

def _free_net():
    "Three numbers of a network that nobody here uses, of those reserved for tests"
    used = _do('ip', '-o', '-4', 'addr').stdout
    return next(n for i in range(256) if f' {(n := f"198.18.{(os.getpid()+i)%256}")}.' not in used)

@contextmanager
def make_hosts(n):
    "`n` machines; skips the test where they cannot be made"
    if reason := why_not(): pytest.skip(reason)
    _tidy()
    folder,bridge,net = Path(tempfile.mkdtemp(prefix=f'hosts-{os.getpid()}-', dir='/var/tmp')),f'fb{os.getpid()}',_free_net()
    before,os.environ['FASTIMAGENET_HOME'] = os.environ.get('FASTIMAGENET_HOME'),str(folder/'launcher')
    hosts = Hosts(Host(f'machine{i}', f'{net}.{11+i}', folder/f'machine{i}', bridge, f'fv{os.getpid()}r{i}') for i in range(n))
    try:
        hosts.key,hosts.known_hosts = folder/'key',folder/'known_hosts'
        _keygen(hosts.key)
        if (r := _do('ip', 'link', 'add', bridge, 'type', 'bridge', check=False)).returncode: pytest.skip(f'a network bridge is not allowed here: {r.stderr.strip()}')
        _do('ip', 'addr', 'add', f'{net}.1/24', 'dev', bridge)
        _do('ip', 'link', 'set', bridge, 'up')
        for h in hosts:
            _prepare(h, hosts, hosts.key)
            h.start()
        hosts.known_hosts.write_text(''.join(f'{h.address} {" ".join((h.folder/"host_key.pub").read_text().split()[:2])}\n' for h in hosts))
        for h in hosts: _until(h.listens, lambda: f'sshd of {h.name}: {(h.folder/"sshd.log").read_text()}')
        yield hosts
    finally:
        for h in hosts: h.off()
        _do('ip', 'link', 'del', bridge, check=False)
        shutil.rmtree(folder, ignore_errors=True)
        os.environ.pop('FASTIMAGENET_HOME')
        if before is not None: os.environ['FASTIMAGENET_HOME'] = before
