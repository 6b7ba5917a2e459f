"""Run fastimagenet-presize ten times and kill each run: python presize_kills.py SEED ARGUMENTS, of which the second is the folder for the copies

Runs are forked from here, so that they start at once; each has a session of its own, and only its first process is killed.
A run is killed when a random number of images has come into the journal, and up to 5 ms later."""
import os, random, runpy, signal, sys, time
from pathlib import Path
import fastai_fastimagenet.copies, fastai_fastimagenet.pool, fastcore.script

seed,*args = sys.argv[1:]
rng,journal = random.Random(int(seed)),Path(args[1])/'.presize/journal'
total = sum(f.is_file() for f in Path(args[0]).rglob('[!.]*'))

def lines(): return journal.read_bytes().count(b'\n') if journal.exists() else 0

for goal in [0, *sorted(rng.uniform(0, .9*total) for _ in range(9))]:
    pid = os.fork()
    if not pid:
        os.setsid()
        sys.argv = ['fastimagenet-presize', *args]
        runpy.run_module('fastai_fastimagenet.presize', run_name='__main__')
        os._exit(0)
    while lines()<goal or not journal.parent.exists():
        assert os.waitpid(pid, os.WNOHANG)==(0,0), 'It came to its end'
        time.sleep(.001)
    time.sleep(rng.uniform(0, .005))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    print(lines(), flush=True)
