"Start programs of several processes, and never leave one behind"
import os, subprocess, sys, uuid
from pathlib import Path
import psutil

here = Path(__file__).parent
launcher = [sys.executable, '-m', 'fastai_fastimagenet.launch']
mark = 'STARTED_BY_TEST'

def _env(p):
    try: return p.environ()
    except (psutil.NoSuchProcess,psutil.AccessDenied,FileNotFoundError): return {}

def start(*cmd, env=None):
    "`cmd` with all output in pipes; its processes, and theirs, carry a mark by which `kill_all` finds them"
    p = subprocess.Popen([str(o) for o in cmd], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                         env={**os.environ, **(env or {}), mark: (name := uuid.uuid4().hex)})
    p.mark = name
    return p

def kill_all(*procs):
    "Kill `procs` and all that they started, also what has lost its parent: the launcher's workers live in sessions of their own"
    names = {p.mark for p in procs}
    left = [p for p in psutil.process_iter() if _env(p).get(mark) in names]
    for p in left:
        try: p.kill()
        except psutil.NoSuchProcess: pass
    psutil.wait_procs(left, 10)
    return left

def run(*cmd, timeout=180, ok=True, env=None):
    "Run `cmd`, kill it and its children after `timeout` seconds; it must succeed, or fail, as `ok` says, and leave no process"
    p = start(*cmd, env=env)
    try: out,err = p.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill_all(p)
        out,err = p.communicate()
        raise AssertionError(f'{cmd} still ran after {timeout} s\n{out[-2000:]}\n{err[-4000:]}') from None
    finally: left = kill_all(p)
    assert not left, f'{cmd} left {left}'
    assert (p.returncode==0)==ok, f'exit code {p.returncode}\n{out[-2000:]}\n{err[-6000:]}'
    return subprocess.CompletedProcess(cmd, p.returncode, out, err)
