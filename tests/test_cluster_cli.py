"`fastimagenet-cluster` as a process of its own, against moto behind the proxy"
import os, re, shlex, subprocess, sys, time
from pathlib import Path
import pytest
pytest.importorskip('moto')
from fastai_fastimagenet.cluster.aws import AWSCluster
from fastai_fastimagenet.cluster.cloud import clients
from fastai_fastimagenet.cluster.network import ensure_network

fast = 'import sys; from fastai_fastimagenet.cluster import cli, teardown; teardown._poll = teardown._second_look = .1; cli.main()'

def cluster(*args, ok=True, env=None, input='', module=False):
    "What `fastimagenet-cluster ARGS` printed, and its errors; without the long waits of `down` unless it is started as a `module`"
    cmd = [sys.executable, *(['-m', 'fastai_fastimagenet.cluster.cli'] if module else ['-c', fast]), *map(str, args)]
    r = subprocess.run(cmd, capture_output=True, text=True, timeout=120, input=input, env={**os.environ, **(env or {})})
    assert (r.returncode==0)==ok, f'{args}: exit code {r.returncode}\n{r.stdout}\n{r.stderr}'
    assert 'Traceback' not in r.stderr, r.stderr
    return r.stdout,r.stderr

def make(name='demo', nodes=2, machine='g6.xlarge', **kw):
    said = []
    return AWSCluster(name, nodes, machine, ssh_from='203.0.113.7/32', say=said.append, **kw).create()

@pytest.fixture
def demo(aws): return make()

def test_from_another_computer(aws, demo, tmp_path):
    "All that is shown comes from AWS; the key does not"
    env = {'FASTIMAGENET_HOME': str(tmp_path/'elsewhere')}
    make('second', 1, spot=False)
    head,*rows = cluster('ls', env=env)[0].splitlines()
    assert head.split()[:3]==['NAME','MACHINES','TYPE'] and len(rows)==2
    assert rows[0].startswith('demo    2 running  g6.xlarge  us-east-1') and ' spot ' in rows[0] and ' in 2:59 h ' in rows[0]
    assert rows[1].startswith('second  1 running  g6.xlarge') and ' on-demand ' in rows[1] and ' $0.80/h ' in rows[1]
    out,_ = cluster('show', 'demo', env=env)
    for i in demo.instances: assert re.search(rf'^{i["AmiLaunchIndex"]}     {i["InstanceId"]}  running .* {i["PublicIpAddress"]} ', out, re.M)
    for kind in ('VPC','subnet','internet gateway','S3 endpoint','security group','key pair','placement group','volume'): assert re.search(rf'^{kind} ', out, re.M)
    out,_ = cluster('cost', 'second', env=env)
    assert 'Until now: $0.00' in out and 'Per hour:  $0.80 for 1 machines' in out and 'At most:   $2.41' in out
    for command in ('ssh','logs','hold'):
        _,err = cluster(command, 'demo', env=env, ok=False)
        assert 'The ssh key of cluster demo is not in' in err and 'fastimagenet-cluster down demo --region us-east-1' in err
    assert not (tmp_path/'elsewhere').exists() or not list((tmp_path/'elsewhere').rglob('key'))
    out,_ = cluster('down', '--all', '--yes', env=env)
    assert 'Nothing is left of cluster demo' in out and 'Nothing is left of cluster second' in out and not aws.left()

def test_ls_says_what_it_does_not_know(aws, demo):
    aws.set(faults=[dict(do='error', action='DescribeAddresses', code='UnauthorizedOperation', times=100)])
    *_,last = cluster('ls')[0].splitlines()
    assert last=='Could not be looked up: address'

def test_ls_is_quick(aws, demo):
    "In about a second; the limit leaves room for a busy machine"
    cluster('ls', module=True)
    start = time.monotonic()
    cluster('ls', module=True)
    assert time.monotonic()-start<5
    mods = subprocess.run([sys.executable, '-X', 'importtime', '-c', 'import fastai_fastimagenet.cluster.cli'], capture_output=True, text=True).stderr
    assert not re.search(r'\b(torch|fastai|numpy|pandas|boto3|fastai_fastimagenet.cluster.aws)$', mods, re.M)

def test_down(aws, demo):
    "Waits included"
    folder = demo.folder
    assert (folder/'key').exists()
    out,_ = cluster('down', 'demo', module=True)
    assert 'Ending 2 machines' in out and 'Nothing is left of cluster demo in us-east-1' in out
    assert not aws.left() and not folder.exists()
    assert 'There are no clusters in us-east-1' in cluster('ls')[0]
    out,_ = cluster('down', 'demo')
    assert 'There is no cluster demo in us-east-1. Clusters there: none.' in out

def test_down_asks(aws, demo):
    _,err = cluster('down', '--all', ok=False)
    assert 'Add --yes' in err and 'demo (2 machines)' in err and len(err.splitlines())==1
    _,err = cluster('down', ok=False)
    assert 'Give NAME, or --all' in err
    _,err = cluster('down', 'demo', '--all', ok=False)
    assert 'Give NAME, or --all' in err and len(aws.left())>8

def test_down_that_does_not_succeed(aws, demo):
    "Exit code 1, what is left, and the command that goes on"
    aws.set(faults=[dict(do='error', action='DeleteVpc', code='UnauthorizedOperation', times=100)])
    out,_ = cluster('down', 'demo', ok=False)
    assert re.search(r'Left: VPC vpc-\w+ of cluster demo in us-east-1: .*UnauthorizedOperation', out) and 'Try again: fastimagenet-cluster down demo --region us-east-1' in out
    aws.set(faults=[])
    cluster('down', 'demo')
    assert not aws.left()

def test_down_when_a_look_up_is_denied(aws, demo):
    "All else is removed, and what may be there is named"
    make('second', 1)
    denied = dict(do='error', action='DescribeVolumes', code='UnauthorizedOperation', times=10**6)
    aws.set(faults=[denied])
    out,_ = cluster('down', 'demo', ok=False)
    assert 'Ending 2 machines' in out and 'Left: volumes that cannot be looked up of cluster demo' in out and 'Try again: fastimagenet-cluster down demo' in out
    assert len([o for o in aws.left() if o.startswith('instance')])==1
    out,_ = cluster('down', '--all', '--yes', ok=False)
    assert 'second: Ending 1 machine' in out and not [o for o in aws.left() if o.startswith('instance')]

def test_down_all_goes_on(aws, demo):
    make('second', 1)
    "A cluster that cannot be removed does not keep the others"
    clients(aws.session(), 'us-east-1')[0].create_vpc(CidrBlock='10.0.0.0/16', TagSpecifications=[dict(ResourceType='vpc', Tags=[dict(Key='fastimagenet:cluster', Value='Not_A_Name')])])
    out,_ = cluster('down', '--all', '--yes', ok=False)
    assert "Not_A_Name: A name has small letters" in out and 'demo: Nothing is left' in out and 'second: Nothing is left' in out
    assert len(aws.left())==1

def test_leaks(aws, tmp_path):
    "The launcher died before there were machines"
    assert cluster('ls', '--leaks', '--region', 'us-east-1')[0]=='Nothing is left over\n'
    c = AWSCluster('half', 1, 'g6.xlarge')
    ensure_network(clients(c.session, 'us-east-1')[0], 'half', 'us-east-1', ['us-east-1a'], {'Name':'half'}, 'ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBB', '203.0.113.7/32')
    out,_ = cluster('ls', '--leaks', ok=False, env={'AWS_DEFAULT_REGION':'eu-west-1'})
    assert 'Cluster half in us-east-1: it has no machines' in out and 'fastimagenet-cluster down half --region us-east-1' in out
    row = cluster('ls')[0].splitlines()[1]
    assert row.startswith('half  none')
    cluster('down', 'half')
    assert not aws.left()

def ssh_there(tmp_path):
    "A command `ssh` that does here, in a folder of the test, what it is asked to do there"
    (tmp_path/'bin').mkdir()
    (tmp_path/'there/fastimagenet/watch').mkdir(parents=True)
    f = tmp_path/'bin/ssh'
    f.write_text(f'''#!/bin/bash
(printf '%q ' "$@"; echo) >> {tmp_path}/calls
while [[ $1 == -* ]]; do case $1 in -F|-o|-O|-S) shift 2;; -*N*) exit;; *) shift;; esac; done
shift
cd {tmp_path}/there && HOME=$PWD exec bash -c "$*"
''')
    f.chmod(0o755)
    return {'PATH': f'{tmp_path}/bin:{os.environ["PATH"]}'},tmp_path/'there/fastimagenet'

def test_on_the_machines(aws, demo, tmp_path):
    env,there = ssh_there(tmp_path)
    out,_ = cluster('ssh', 'demo', '-r', 1, 'echo', 'hello', env=env)
    assert out=='hello\n'
    assert (tmp_path/'calls').read_text().splitlines()[-1]==f'-F {demo.folder}/ssh_config rank1 echo hello '
    assert cluster('ssh', 'demo', 'ls', '-d', '-r', '/', env=env)[0]==cluster('ssh', 'demo', '--', 'ls', '-d', '/', env=env)[0]=='/\n'
    config = (demo.folder/'ssh_config').read_text()
    assert all(i['PublicIpAddress'] in config for i in demo.instances)
    cluster('hold', 'demo', env=env)
    assert (there/'watch/hold').exists() and not (there/'watch/lease').exists()
    calls = (tmp_path/'calls').read_text()
    assert all(re.search(f' rank{i} .*watch/hold', calls) for i in (0,1))
    _,err = cluster('logs', 'demo', env=env, ok=False)
    assert 'rank0 of cluster demo has no runs' in err
    (there/'runs/first-setup').mkdir(parents=True)
    (there/'runs/first-setup/run.sh').write_text('')
    _,err = cluster('logs', 'demo', env=env, ok=False)
    assert 'has no runs; with --run: first-setup' in err
    for name,text,status in (('old','alpha\n','0'), ('new','beta\ngamma\n','3'), ('new-check','','0'), ('new-setup','','0'), ('tensorboard-a1b2c3','','0')):
        (there/'runs'/name).mkdir(parents=True)
        for k,v in {'run.sh':'', 'log':text, 'status':status}.items(): (there/'runs'/name/k).write_text(v)
        if name=='old': os.utime(there/'runs/old/run.sh', (1,1))
    out,err = cluster('logs', 'demo', '--rank', 1, '-n', 1, env=env)
    assert out=='gamma\n' and err.endswith('Run new of rank1 ended with exit code 3\n')
    assert cluster('logs', 'demo', '--run', 'old', env=env)[0]=='alpha\n'
    out,_ = cluster('logs', 'demo', '-f', env=env, ok=False)
    assert out=='beta\ngamma\n'
    _,err = cluster('ssh', 'demo', '-r', 2, ok=False, env=env)
    assert 'Cluster demo has machines 0 to 1, got 2' in err

def test_errors_of_one_line(aws, demo, tmp_path):
    (tmp_path/'boto3.py').write_text('raise ImportError("no boto3")')
    none = {'AWS_ACCESS_KEY_ID':'', 'AWS_SECRET_ACCESS_KEY':''}
    path = os.pathsep.join([str(tmp_path), os.environ.get('PYTHONPATH', '')])
    for args,env,what in ((['ls'], {'PYTHONPATH':path}, "pip install 'fastai_fastimagenet[aws]'"), (['ls'], none, 'There are no credentials for AWS'),
                          (['ls'], {'AWS_DEFAULT_REGION':''}, 'Which region? Say region='), (['show','typo'], {}, 'There is no cluster typo in us-east-1. Clusters there: demo.'),
                          (['cost','demo','--region','eu-west-1'], {}, 'There is no cluster demo in eu-west-1. Clusters there: none.'),
                          (['logs','typo'], {}, 'Cluster typo has no machines in us-east-1'), (['plan','Demo'], {}, "got 'Demo'"), (['plan','a','--machine','p3.16xlarge'], {}, 'p4d.24xlarge')):
        out,err = cluster(*args, ok=False, env=env)
        assert err.startswith('fastimagenet-cluster: ') and what in err and len(err.splitlines())==1 and not out, err

def test_plan(aws):
    before = len(aws.log())
    out,_ = cluster('plan', 'big', '--nodes', 16, '--max-hours', 1, '--ssh-from', '203.0.113.7/32')
    assert 'At most $' in out and 'ec2 run_instances' in re.sub('RunInstances', 'run_instances', out) and 'vCPU' in out
    assert all(re.match('Describe|Get', o['action']) for o in aws.log()[before:]) and not aws.left()
