"Runs of a benchmark, each in a process of its own, two at a time on two cores; what is finished is in a file and not run again"
import json, os, subprocess, sys, threading
from concurrent.futures import ThreadPoolExecutor

def run_all(script, jobs, file, keys, more=()):
    "Rows of `file`, after `script --one JOB` printed one for each of `jobs` that is not there yet; `keys` of a row are its job"
    done = [json.loads(l) for l in file.read_text().splitlines()] if file.exists() else []
    todo = [j for j in jobs if not any([d[k] for k in keys]==list(j) for d in done)]
    print(f'{len(todo)} runs to do, {len(jobs)-len(todo)} are done')
    left,lock = iter(todo),threading.Lock()
    def work(core):
        while True:
            with lock: job = next(left, None)
            if job is None: return
            r = subprocess.run(['taskset','-c',str(core),sys.executable,script,'--one',json.dumps(job),*more], capture_output=True, text=True)
            if r.returncode: raise RuntimeError(f'{job}: {r.stderr}')
            with lock:
                with open(file, 'a') as f: f.write(r.stdout.splitlines()[-1]+'\n')
                print(r.stdout.splitlines()[-1], flush=True)
    with ThreadPoolExecutor(2) as pool: [f.result() for f in [pool.submit(work, c) for c in sorted(os.sched_getaffinity(0))[:2]]]
    return [json.loads(l) for l in file.read_text().splitlines()]
