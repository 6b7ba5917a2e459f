"""Seconds until machines run, and calls to AWS it takes: python benchmarks/cluster_create.py

A moto server behind the proxy of the tests, in a process of its own, answers each call after `--latency` seconds. Measured is `AWSCluster.create`
from nothing (look-ups, network, launch, machines running) and `down`; ssh is not part of it, and real machines take a minute more to start."""
import argparse, os, statistics, sys, tempfile, time
from pathlib import Path
sys.path.append(str(Path(__file__).parent.parent/'tests'))
from aws_proxy import Aws
from fastai_fastimagenet.cluster.aws import *
from fastai_fastimagenet.cluster import rent, teardown
from setting import setting_line

def once(aws, nodes, machine, latency):
    "Seconds and calls of create and of down"
    aws.reset()
    aws.set(latency={'*':latency})
    c = AWSCluster('bench', nodes, machine=machine, region='us-east-1', ssh_from='203.0.113.7/32', say=lambda line: None)
    res = []
    for f in (c.create, c.down):
        began,before = time.perf_counter(),len(aws.log())
        f()
        res += [time.perf_counter()-began, len(aws.log())-before]
    assert aws.left()==[]
    return res

if __name__=='__main__':
    p = argparse.ArgumentParser()
    p.add_argument('--nodes', type=int, nargs='+', default=[1,4,16,64])
    p.add_argument('--machine', default='p4d.24xlarge')
    p.add_argument('--latency', type=float, default=.1, help='seconds')
    p.add_argument('--repeats', type=int, default=5)
    a = p.parse_args()
    rent._poll,teardown._poll,teardown._second_look = .1,.1,0 # Only what AWS takes
    aws = Aws()
    try:
        os.environ.update(aws.env)
        with tempfile.TemporaryDirectory() as tmp:
            os.environ['FASTIMAGENET_HOME'] = tmp
            print(f'{a.machine}, {a.latency} s per call, median (least, most) of {a.repeats}; {setting_line()}')
            print('| machines | create (s) | calls | down (s) | calls |\n|---|---|---|---|---|')
            for nodes in a.nodes:
                runs = list(zip(*(once(aws, nodes, a.machine, a.latency) for _ in range(a.repeats+1))))
                t = [f'{statistics.median(r[1:]):.1f} ({min(r[1:]):.1f}, {max(r[1:]):.1f})' for r in runs]
                print(f'| {nodes} | {t[0]} | {runs[1][-1]} | {t[2]} | {runs[3][-1]} |', flush=True)
    finally: aws.close()
