"Start programs of several processes, and never leave one behind"
import os, signal, subprocess, sys, time
from pathlib import Path
import psutil

here = Path(__file__).parent
launcher = [sys.executable, '-m', 'fastai_fastimagenet.launch']

def kill_tree(pid):
    "Kill the process `pid` and all that it started: the launcher's workers live in sessions of their own"
    try: procs = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess: return
    for p in procs:
        try: p.kill()
        except psutil.NoSuchProcess: pass
    psutil.wait_procs(procs, 10)

def run(*cmd, timeout=180, ok=True, env=None):
    "Run `cmd`, kill it with all its children after `timeout` seconds; `ok` says if it must succeed (None: whichever)"
    p = subprocess.Popen([str(o) for o in cmd], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **(env or {})})
    try: out,err = p.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill_tree(p.pid)
        out,err = p.communicate()
        raise AssertionError(f'{cmd} still ran after {timeout} s\n{out[-2000:]}\n{err[-4000:]}') from None
    finally: kill_tree(p.pid)
    assert ok is None or (p.returncode==0)==ok, f'exit code {p.returncode}\n{out[-2000:]}\n{err[-6000:]}'
    return subprocess.CompletedProcess(cmd, p.returncode, out, err)
