"AWSCluster against moto behind the proxy"
import json, os, re, signal, subprocess, sys, threading, time
from collections import Counter
from datetime import datetime, timedelta, timezone
from pathlib import Path
import pytest
from aws_proxy import image
from aws_quick import order, quick
from fastai_fastimagenet.cluster import reach, rent, teardown
from fastai_fastimagenet.cluster.access import *
from fastai_fastimagenet.cluster.aws import *
from fastai_fastimagenet.cluster.cloud import *
from fastai_fastimagenet.cluster.rent import *
from fastai_fastimagenet.cluster.task import *

region = 'us-east-1'
changes = lambda actions: Counter({a: n for a,n in actions.items() if not a.startswith(('Describe','Get','List'))})

@pytest.fixture
def session(aws):
    with quick(): yield aws.session(region)

def test_create_show_down(aws, session):
    "1, 4, 16 and 64 machines: the calls are as many"
    counts = []
    for nodes in (1,4,16,64):
        aws.reset()
        c = order(session, nodes, machine='g6.xlarge').create()
        made = aws.actions()
        assert [i['AmiLaunchIndex'] for i in c.instances]==list(range(nodes)) and made['RunInstances']==1
        [found] = teardown.clusters(session, region)
        assert (found.name,found.nodes,found.machine,found.zone,found.market,found.generation)==('im',nodes,'g6.xlarge','us-east-1a','spot','1')
        assert found.price==pytest.approx(nodes*.8048*.35, rel=1e-3) and 0<=c.cost<.1
        before = aws.actions()
        assert c.down()==[] and aws.left()==[] and teardown.clusters(session, region)==[]
        counts.append((changes(made), made.total()-made['DescribeInstances'], changes(aws.actions()-before)))
    assert counts[1]==counts[2]==counts[3]
    assert counts[1][0]-counts[0][0]==Counter(CreatePlacementGroup=1)

def test_nothing_is_left_says_moto_itself(aws, session, monkeypatch):
    c = order(session).create()
    c.down()
    monkeypatch.setenv('AWS_ENDPOINT_URL', aws.moto)
    ec2 = aws.session(region).client('ec2')
    assert all(i['State']['Name']=='terminated' for r in ec2.describe_instances()['Reservations'] for i in r['Instances'])
    assert not [v for v in ec2.describe_vpcs()['Vpcs'] if not v['IsDefault']] and not ec2.describe_key_pairs()['KeyPairs']
    for op,key in (('volumes','Volumes'), ('network_interfaces','NetworkInterfaces'), ('addresses','Addresses'), ('spot_instance_requests','SpotInstanceRequests')):
        assert not getattr(ec2, f'describe_{op}')()[key], op

def test_create_again_makes_nothing(aws, session):
    first = order(session).create()
    before = aws.actions()
    again = order(session).create()
    assert not changes(aws.actions()-before) and [i['InstanceId'] for i in again.instances]==[i['InstanceId'] for i in first.instances]
    with pytest.raises(CloudError, match='has 2 x p4d.24xlarge, not 3 x p4d'): order(session, 3).create()
    assert len(order(session).create().instances)==2

def test_machines_are_as_ordered(aws, session):
    ec2 = session.client('ec2')
    zone = 'us-east-1a'
    snap = ec2.create_snapshot(VolumeId=ec2.create_volume(AvailabilityZone=zone, Size=150)['VolumeId'])['SnapshotId']
    c = order(session, volume=dict(snapshot=snap, iops=6000, throughput=500)).create()
    first,second = c.instances
    assert first['ImageId']==image and first['MetadataOptions']['HttpTokens']=='required' and first['MetadataOptions']['HttpPutResponseHopLimit']==2
    assert [n['InterfaceType'] for n in first['NetworkInterfaces']]==['efa','efa-only','efa-only','efa-only'] and first['Placement']['GroupName']=='fastimagenet-im'
    assert [n['Attachment']['NetworkCardIndex'] for n in first['NetworkInterfaces']] in ([0,1,2,3],[0]*4)
    assert 'PublicIpAddress' not in second and first['PublicIpAddress']==ec2.describe_addresses()['Addresses'][0]['PublicIp']
    mine = dict(Filters=[dict(Name='tag:fastimagenet:cluster', Values=['im'])])
    volumes = ec2.describe_volumes(**mine)['Volumes']
    assert len(volumes)==4 and all(v['Encrypted'] and v['VolumeType']=='gp3' for v in volumes) and sum(v.get('SnapshotId')==snap for v in volumes)==2
    assert all(d['Ebs']['DeleteOnTermination'] for i in c.instances for d in i['BlockDeviceMappings'])
    assert len(ec2.describe_network_interfaces(**mine)['NetworkInterfaces'])==8
    tags = tags_of(first)
    assert tags['fastimagenet:generation']=='1' and tags['fastimagenet:token']==tags_of(second)['fastimagenet:token'].strip()!='' and first['MetadataOptions'].get('InstanceMetadataTags')!='enabled'
    assert '@' in tags['fastimagenet:owner'] and float(tags['fastimagenet:price'])==7.686
    assert timedelta(hours=2.9)<datetime.fromisoformat(tags['fastimagenet:expires'])-datetime.now(timezone.utc)<timedelta(hours=3)
    what = session.client('ec2', endpoint_url=aws.moto).describe_instance_attribute(InstanceId=first['InstanceId'], Attribute='instanceInitiatedShutdownBehavior')
    assert what['InstanceInitiatedShutdownBehavior']['Value']=='terminate' and 'IamInstanceProfile' not in first

def test_user_data(aws, session):
    import base64
    c = order(session, 1, max_hours=.5).create()
    data = session.client('ec2', endpoint_url=aws.moto).describe_instance_attribute(InstanceId=c.instances[0]['InstanceId'], Attribute='userData')['UserData']['Value']
    text = base64.b64decode(data).decode()
    assert '#!/bin/bash\nshutdown -P +30\n' in text or '#!/bin/bash\nshutdown -P +29\n' in text
    inside = lambda key: [l in text for l in key.read_text().splitlines()[3:5]] # The secret lines
    assert all(inside(c.folder/'host_key/key')) and not any(inside(c.folder/'key')) and 'AWS_SECRET' not in text
    assert (c.folder/'key').stat().st_mode&0o777==0o600 and c.folder.stat().st_mode&0o777==0o700

def test_one_machine_needs_no_address_of_its_own(aws, session):
    c = order(session, 1).create()
    assert c.instances[0]['PublicIpAddress'] and not aws.actions()['AllocateAddress'] and not aws.actions()['CreatePlacementGroup']

def test_efs(aws, session):
    c = order(session, efs=True).create()
    assert 'file system' in ' '.join(aws.left())
    assert c.down()==[] and aws.left()==[]

# -- the plan of offers
def test_offers_are_tried_by_price(aws, session):
    aws.set(capacity={'*/*/spot': 1, 'p4d.24xlarge/us-east-1c/on-demand': 2, 'p4d.24xlarge/*/on-demand': 0}, spot_prices={'p4d.24xlarge/us-east-1b': 2.47})
    c = order(session, zone=None).create()
    assert {i['Placement']['AvailabilityZone'] for i in c.instances}=={'us-east-1c'} and 'InstanceLifecycle' not in c.instances[0]
    tried = [l for l in c.said if 'InsufficientInstanceCapacity' in l]
    assert tried[0].startswith('1 of 8: spot in us-east-1b') and len(tried)==6==aws.actions()['RunInstances']-1 # Not repeated
    assert len([o for o in aws.left() if o.startswith('instance')])==2

def test_machines_of_the_token_have_ended(aws, session):
    "A launcher that comes back within the hour, and whose first machines were taken: the next offer"
    aws.set(faults=[dict(do='error', action='RunInstances', code='IdempotentInstanceTerminated', status=400)])
    c = order(session).create()
    assert 'IdempotentInstanceTerminated' in ' '.join(c.said) and 'InstanceLifecycle' not in c.instances[0] and aws.actions()['RunInstances']==2

def test_no_capacity_anywhere(aws, session):
    aws.set(capacity={'*/*/*': 1})
    with pytest.raises(CloudError, match='(?s)None of 2 offers had 2 machines.*spot in us-east-1a.*on-demand in us-east-1a.*fastimagenet-cluster down im'): order(session).create()
    assert aws.left()==[]

@pytest.mark.parametrize('again', ['create','relaunch'])
def test_a_second_launch_that_fails(aws, session, again):
    "It removes its machines, and nothing that was there before: the file system has the data of the first"
    c = order(session, efs=True).create()
    c.ec2.terminate_instances(InstanceIds=[i['InstanceId'] for i in c.instances])
    time.sleep(.2)
    aws.set(capacity={'*/*/*': 0})
    there = [o for o in aws.left() if not o.startswith(('instance','interface','volume'))]
    with pytest.raises(CloudError, match='None of 2 offers'): getattr(c, again)()
    assert any(o.startswith('file system') for o in there) and not c.instances
    assert [o for o in aws.left() if not o.startswith(('interface','volume'))]==there
    assert 'what was there before stays' in c.said[-1] and c.undo in c.said[-1]
    aws.set(capacity={}, faults=[dict(do='error', action='AssociateAddress', code='UnauthorizedOperation', status=403)])
    with pytest.raises(CloudError, match='public address'): getattr(c, again)()
    time.sleep(.2)
    assert [o for o in aws.left() if not o.startswith(('interface','volume'))]==there
    assert getattr(c, again)() in (c,None) and len(c.instances)==2

def test_machines_that_end_at_once(aws, session):
    "Spot machines that are taken while they start: the next offer, and none of them stays"
    aws.set(pending=1.5)
    ec2 = session.client('ec2')
    def take():
        end = time.monotonic()+20
        while time.monotonic()<end:
            found = [i['InstanceId'] for r in ec2.describe_instances()['Reservations'] for i in r['Instances']]
            if found: return ec2.terminate_instances(InstanceIds=found[:1])
            time.sleep(.02)
    threading.Thread(target=take).start()
    c = order(session).create()
    assert any('1 of 2 machines ended at once' in l for l in c.said) and 'InstanceLifecycle' not in c.instances[0]
    assert len([o for o in aws.left() if o.startswith('instance')])==2

def test_quota(aws, session):
    aws.set(quotas={'L-7212CCBC': 100})
    assert 'InstanceLifecycle' not in order(session).create().instances[0] # Spot is not even tried
    assert aws.actions()['RunInstances']==1
    aws.reset()
    aws.set(quotas={'L-7212CCBC': 100, 'L-417A185B': 100})
    with pytest.raises(ValueError, match='need 192 vCPU, your quota is 100'): order(session).create()
    assert not changes(aws.actions())

def test_dollars_become_hours(aws, session):
    c = order(session, max_dollars=10).create()
    hours = (datetime.fromisoformat(tags_of(c.instances[0])['fastimagenet:expires'])-datetime.now(timezone.utc)).total_seconds()/3600
    assert hours==pytest.approx(10/(2*7.686), abs=.01)
    assert any(l.startswith('At most $10.00: 2 x $7.69 x 0.65 hours') for l in c.said)
    aws.reset()
    with pytest.raises(ValueError, match='minutes of 100 machines'): order(session, 100, max_dollars=10).create()
    assert not changes(aws.actions())

def test_p3_is_refused(aws, session):
    with pytest.raises(ValueError, match='p4d.24xlarge'): order(session, machine='p3.16xlarge').create()
    assert not changes(aws.actions())

def test_wrong_image(aws, session):
    with pytest.raises(ValueError, match='no image ami-12345'): order(session, image='ami-12345').create()
    with pytest.raises(ValueError, match='is for arm64'): order(session, image='ami-0a000000000000064').create()
    assert not changes(aws.actions())

# -- hidden, lost, repeated
def test_machines_that_cannot_be_seen_yet(aws, session):
    "The launcher dies after RunInstances; the next one does not see the machines, and starts no more"
    aws.set(hide=1.5, faults=[dict(do='error', action='DescribeInstances', skip=1, code='UnauthorizedOperation')])
    first = order(session)
    first._give_up = lambda *args: None # It dies
    with pytest.raises(CloudError): first.create()
    c = order(session).create()
    assert len(c.instances)==2==len([o for o in aws.left() if o.startswith('instance')]) and aws.actions()['RunInstances']==2

def test_hidden_machines_are_removed_too(aws, session):
    "A launch that fails while its machines cannot be seen: the second look finds them"
    aws.set(hide=.6, faults=[dict(do='error', action='DescribeInstances', skip=1, code='UnauthorizedOperation')])
    teardown._second_look = 1
    with pytest.raises(CloudError): order(session).create()
    assert aws.left()==[]

def test_time_out(aws, session, monkeypatch):
    from fastai_fastimagenet.cluster import cloud
    monkeypatch.setattr(cloud, '_read', .5)
    aws.set(faults=[dict(do='hang', seconds=2, action=a) for a in ('RunInstances','CreateVpc')])
    assert len(order(aws.session(region)).create().instances)==2

@pytest.mark.parametrize('code,status', [('RequestLimitExceeded',503), ('InternalError',500), ('InvalidGroup.NotFound',400)]) # What was made just now is not known everywhere
def test_repeated_by_us(aws, session, code, status):
    aws.set(faults=[dict(do='error', action='RunInstances', code=code, status=status, times=4)])
    assert len(order(session).create().instances)==2 and aws.actions()['RunInstances']==5

def test_an_answer_that_makes_no_sense(aws, session):
    aws.set(faults=[dict(do='garbled', action='RunInstances'), dict(do='garbled', action='DescribeSpotPriceHistory')])
    c = order(session).create()
    assert len(c.instances)==2==len([o for o in aws.left() if o.startswith('instance')]) and aws.actions()['RunInstances']==2
    assert any('spot prices: ResponseParserError' in l for l in c.said)

# -- later, and from elsewhere
def test_attach(aws, session, monkeypatch, tmp_path):
    made = order(session).create()
    c = AWSCluster.attach('im', region, say=made.said.append)
    assert (c.nodes,c.machine,c.spot,c.image,c.generation)==(2,'p4d.24xlarge',True,image,1) and c.instances[0]['PublicIpAddress']==made.instances[0]['PublicIpAddress']
    monkeypatch.setenv('FASTIMAGENET_HOME', str(tmp_path/'other laptop'))
    other = AWSCluster.attach('im', region, say=made.said.append)
    with pytest.raises(CloudError, match='ssh key of cluster im is not in'): other.ssh_config()
    assert other.down()==[] and aws.left()==[]
    with pytest.raises(CloudError, match='no machines'): AWSCluster.attach('im', region)

def test_create_from_another_laptop(aws, session, monkeypatch, tmp_path):
    "It belongs to someone else: nothing of it is touched, with machines or without, also if a key was made here"
    c,ec2 = order(session, efs=True).create(),session.client('ec2')
    monkeypatch.setenv('FASTIMAGENET_HOME', str(tmp_path/'other laptop'))
    def refused():
        there,before = aws.left(),aws.actions()
        for f in (order(session).create, order(session).relaunch, order(session).plan):
            with pytest.raises(CloudError, match='(?s)another ssh key, that of .*@.*Take another name.*fastimagenet-cluster down im'): f()
        with pytest.raises(CloudError, match='another ssh key'), order(session): raise AssertionError('The block was entered')
        assert aws.left()==there and not changes(aws.actions()-before)
    refused()
    ec2.terminate_instances(InstanceIds=[i['InstanceId'] for i in c.instances])
    time.sleep(.3)
    ssh_key(order(session).folder)
    refused()
    assert any(o.startswith('file system') for o in aws.left())

def test_options_that_are_none(aws, session):
    "Said before AWS is asked, with what was meant"
    for kw,error,what in ((dict(mashine='g6.xlarge'), TypeError, 'AWSCluster has no option `mashine`. Nearest: machine'), (dict(fialed=60), TypeError, 'no option `fialed`. Nearest: failed'),
                          (dict(folder='x'), TypeError, 'no option `folder`'), (dict(nodes='2'), ValueError, "`nodes` must be a whole number, 1 or more, got '2'"),
                          (dict(nodes=0), ValueError, '`nodes` must be'), (dict(volume=5), ValueError, "`volume` must be a snapshot 'snap-...'.*got 5")):
        with pytest.raises(error, match=what): AWSCluster('im', **{'nodes': 1, 'region': region, **kw})
    assert not aws.log()

def test_two_laptops_at_the_same_time(aws, session, monkeypatch, tmp_path):
    "The other key pair shows up while this laptop makes the cluster"
    c = order(session)
    real = c.show
    def show():
        monkeypatch.setenv('FASTIMAGENET_HOME', str(tmp_path/'other laptop'))
        order(session).create()
        monkeypatch.setenv('FASTIMAGENET_HOME', str(tmp_path/'home'))
        real()
    c.show = show
    with pytest.raises(CloudError, match='another ssh key'): c.create()
    assert len([o for o in aws.left() if o.startswith('instance')])==2

def test_the_same_name_in_two_regions(aws, session):
    "Each has its own key, ssh_config and connections; the end of one leaves those of the other"
    c = order(session).create()
    other = order(aws.session('us-west-2'), region='us-west-2', zone=None).create()
    assert c.ssh_config()!=other.ssh_config() and (c.folder/'key').read_text()!=(other.folder/'key').read_text()
    assert other.down()==[] and not other._folder and (c.folder/'key').exists()
    c.ssh_config()

def test_relaunch(aws, session):
    c = order(session, max_hours=2).create()
    first,ends = {i['InstanceId'] for i in c.instances},c.ends
    session.client('ec2').terminate_instances(InstanceIds=sorted(first)[:1]) # Taken back
    aws.set(stopping=.7)
    started = []
    c.show = lambda: started.extend(state_of(i) for i in all_machines(c.ec2, 'im')) # Just before the launch
    c.relaunch()
    assert started==['terminated']*2 # Until then they count for the quota
    aws.set(stopping=.1)
    assert c.generation==2 and not first&{i['InstanceId'] for i in c.instances} and len(c.instances)==2
    time.sleep(.2)
    assert len([o for o in aws.left() if o.startswith('instance')])==2 and len([o for o in aws.left() if o.startswith('address')])==1
    assert abs(datetime.fromisoformat(tags_of(c.instances[0])['fastimagenet:expires'])-ends)<timedelta(seconds=5) # No more time than before
    assert c.instances[0]['PublicIpAddress'] and c.down()==[] and aws.left()==[]

def test_relaunch_by_another_launcher(aws, session):
    order(session).create()
    c = AWSCluster.attach('im', region, zone='us-east-1a', ssh_from='203.0.113.7/32', say=lambda line: None)
    c.relaunch()
    assert c.generation==2 and len(order(session).create().instances)==2

def test_a_removed_cluster_is_not_relaunched(aws, session):
    "Given back here, or from another computer; `create` makes it anew"
    c = order(session).create()
    for remove in (c.down, lambda: teardown.down(session, region, 'im', lambda line: None)):
        remove()
        with pytest.raises(CloudError, match='Cluster im in us-east-1 was removed: its machines are not replaced'): c.relaunch()
        assert aws.left()==[]
        c.create()
    c.relaunch()
    assert c.generation>1 and len(c.instances)==2

@pytest.mark.parametrize('who', ['here','elsewhere'])
def test_removed_while_machines_are_replaced(aws, session, who):
    "The watcher of a run saw dead machines, and took them for taken ones"
    c,errors = order(session).create(),[]
    def relaunch():
        try: c.relaunch()
        except CloudError as e: errors.append(str(e))
    aws.set(stopping=1)
    thread = threading.Thread(target=relaunch)
    thread.start()
    while not any('Waiting until the old machines' in l for l in c.said): time.sleep(.02)
    assert (c.down() if who=='here' else teardown.down(session, region, 'im', lambda line: None))==[]
    thread.join()
    assert aws.left()==[] and 'was removed' in errors[0]

def test_which_machines_may_be_taken(aws, session):
    c = order(session).create()
    assert c.on_spot
    c.down()
    assert not c.on_spot
    aws.set(capacity={'*/*/spot': 1})
    assert not c.create().on_spot and c.spot=='auto'

def test_looking_ends_no_machines(aws, session):
    "Two generations live: attach takes the newer, create ends the older"
    order(session).create()
    c = order(session)
    c.look_up()
    c.generation = 2
    c.launch()
    assert AWSCluster.attach('im', region, say=c.say).generation==2
    live = lambda: sorted(generation_of(i) for i in all_machines(c.ec2, 'im') if is_live(i))
    assert live()==[1,1,2,2]
    assert order(session).create().generation==2 and live()==[2,2]

def test_create_after_the_machines_ended(aws, session):
    c = order(session).create()
    session.client('ec2').terminate_instances(InstanceIds=[i['InstanceId'] for i in c.instances])
    before = aws.actions()
    assert order(session).create().generation==2 and changes(aws.actions()-before)==Counter(RunInstances=1, AssociateAddress=1)

# -- the end of a block
class JobFailed(Exception): look = True

def test_block(aws, session):
    with order(session) as c: assert len(c.instances)==2
    assert aws.left()==[] and not (Path(os.environ['FASTIMAGENET_HOME'])/'im.us-east-1').exists() # The keys are gone too

def test_block_that_fails(aws, session):
    with pytest.raises(ZeroDivisionError), order(session): 1/0
    assert aws.left()==[]

def test_block_that_cannot_remove_all(aws, session, capsys):
    "It is an error, or said besides that of the block"
    never = [dict(do='error', action='DeleteVpc', code='UnauthorizedOperation', status=403, times=1000)]
    with pytest.raises(CloudError, match=f'(?s)Left of cluster im in us-east-1: VPC vpc-.*UnauthorizedOperation.*{undo_command("im", region)}'), order(session): aws.set(faults=never)
    aws.set(faults=[])
    with pytest.raises(ZeroDivisionError), order(session):
        aws.set(faults=never)
        1/0
    assert re.search(f'Left of cluster im.*VPC vpc-.*{undo_command("im", region)}', capsys.readouterr().err)

def test_failed_job_leaves_the_machines_for_a_while(aws, session):
    with pytest.raises(JobFailed), order(session, done=3) as c: raise JobFailed
    assert len([o for o in aws.left() if o.startswith('instance')])==2
    assert 'end 20 minutes after a run that failed, 3 after one that ended well, 10 if none was started' in c.said[-1] and f'ssh -F {c.folder/"ssh_config"}' in c.said[-1] and undo_command('im', region) in c.said[-1]
    assert (c.folder/'ssh_config').exists()

script = '''
import sys; sys.path[:0] = [{tests!r}]
from aws_quick import order, quick
import boto3
quick()
c = order(boto3.Session(region_name='us-east-1'), say=lambda line: print(line, flush=True))
with c:
    print('inside', flush=True)
    import time; time.sleep(60)
'''

def launcher(): return subprocess.Popen([sys.executable, '-c', script.format(tests=str(Path(__file__).parent))], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

def until(p, text):
    for line in p.stdout:
        if text in line: return
    raise AssertionError(f'it ended without saying {text!r}')

@pytest.mark.parametrize('num', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize('when', ['inside','Offer 1'])
def test_signals(aws, num, when):
    "While it is made, and while it is used"
    p = launcher()
    try:
        until(p, when)
        p.send_signal(num)
        out,_ = p.communicate(timeout=60)
        assert p.returncode and 'Nothing is left of cluster im' in out, out
        assert aws.left()==[]
    finally: p.kill()

def test_second_signal_leaves_it(aws, session):
    aws.set(stopping=30)
    p = launcher()
    try:
        until(p, 'inside')
        p.send_signal(signal.SIGINT)
        until(p, 'Waiting until the machines are gone')
        p.send_signal(signal.SIGINT)
        out,_ = p.communicate(timeout=60)
        assert p.returncode and f'Stopped. Remove the rest: {undo_command("im", region)}' in out, out
    finally: p.kill()

# -- dry run
def test_plan_is_what_is_done(aws, session):
    c = order(session, efs=True)
    p = c.plan()
    assert aws.left()==[] and not changes(aws.actions()) and not (Path(os.environ['FASTIMAGENET_HOME'])/'im.us-east-1').exists()
    assert 'At most $' in str(p) and 'your quota is 10000' in str(p) and 'PRIVATE KEY' not in str(p)
    c.create()
    assert Counter(name for _,name,_ in p.calls)==changes(aws.actions())
    assert c.plan().calls==[] and 'Nothing would be changed' in str(c.plan())
    session.client('ec2').terminate_instances(InstanceIds=[i['InstanceId'] for i in c.instances])
    assert Counter(name for _,name,_ in order(session, efs=True).plan().calls)==Counter(RunInstances=1, AssociateAddress=1)

def test_plan_without_credentials(aws, monkeypatch, tmp_path):
    for k in ('AWS_ACCESS_KEY_ID','AWS_SECRET_ACCESS_KEY'): monkeypatch.delenv(k)
    p = AWSCluster('im', 2, region=region, ssh_from='203.0.113.7/32').plan()
    assert not aws.log() and 'price list of 2026' in str(p) and 'NoCredentialsError' in str(p)
    assert {'DescribeInstanceTypes','DescribeInstanceTypeOfferings','GetServiceQuota'}<=set(p.unknown) and 'RunInstances' in {n for _,n,_ in p.calls}

# -- ssh
def test_ssh_config(aws, session):
    c = order(session, 3).create()
    text = c.ssh_config().read_text()
    assert f'HostName {c.instances[0]["PublicIpAddress"]}' in text and f'HostName {c.instances[2]["PrivateIpAddress"]}' in text and text.count('ProxyCommand')==2
    assert (c.folder/'known_hosts').read_text().startswith('* ssh-ed25519 ')

def test_a_laptop_that_moved(aws, session, monkeypatch):
    "It is let in from its new address, once; who does not know it goes on"
    c = order(session, 1).create()
    knocks = lambda: sorted(ssh_from(tagged(c.ec2, 'security group', 'im')[0]))
    for where in ('203.0.113.7/32','198.51.100.4/32','198.51.100.4/32'):
        c.ssh_from,before = where,aws.actions()
        c.knock()
    assert knocks()==['198.51.100.4/32','203.0.113.7/32'] and not changes(aws.actions()-before)
    c.ssh_from = '203.0.113.0/24'
    c.knock()
    c.ssh_from = '203.0.113.99/32' # Within it
    c.knock()
    assert len(knocks())==3
    aws.set(faults=[dict(do='error', action='DescribeSecurityGroups', code='UnauthorizedOperation', status=403)])
    c.knock()
    assert 'ssh may not be allowed from here. Adding the ssh rule for' in c.said[-1]

def test_machines_that_do_not_answer(aws, session, monkeypatch):
    monkeypatch.setattr(reach, '_ssh_wait', .1)
    monkeypatch.setattr(reach, '_ssh_poll', .1)
    c = order(session, 1).create()
    c.instances[0]['PublicIpAddress'] = '127.0.0.1' # Refuses, where moto's addresses say nothing
    (c.folder/'ssh_config').unlink(missing_ok=True)
    with pytest.raises(ClusterError, match='rank0'): c.tasks

def fake_ssh(tmp_path, monkeypatch, connects='exit'):
    "A command `ssh` that does here what it is asked to do there; what it does to connect"
    from test_cluster_cli import ssh_there
    env,_ = ssh_there(tmp_path)
    monkeypatch.setenv('PATH', env['PATH'])
    f = tmp_path/'bin/ssh'
    f.write_text(f.read_text().replace('-*N*) exit;;', f'-*N*) {connects};;'))

def test_machines_whose_set_up_does_not_end(aws, session, monkeypatch, tmp_path):
    fake_ssh(tmp_path, monkeypatch)
    monkeypatch.setattr(reach, '_ssh_wait', .5)
    monkeypatch.setattr(reach, '_ssh_poll', .1)
    c = order(session, 1).create()
    with pytest.raises(ClusterError, match=f'rank0: its set-up did not end within 0.5 s. Look at its console \\(EC2: Get system log\\), or remove it: {c.undo}'): c.tasks

def test_machines_that_refuse(aws, session, monkeypatch, tmp_path):
    "A machine may do so while it is set up, but not for ten minutes"
    fake_ssh(tmp_path, monkeypatch, 'echo "me@there: Permission denied (publickey)." >&2; exit 255')
    monkeypatch.setattr(reach, '_refused_wait', .3)
    monkeypatch.setattr(reach, '_ssh_poll', .1)
    began = time.monotonic()
    with pytest.raises(ClusterError, match='rank0: it refuses the login'): order(session, 1).create().tasks
    assert time.monotonic()-began<30

def test_machines_over_ssh(aws, session, monkeypatch):
    "Three machines with an sshd in place of moto's: reached through rank 0, they know each other's names, and the host key is checked"
    from hosts import make_hosts
    monkeypatch.setattr(reach, '_ssh_poll', .2)
    monkeypatch.setattr(reach, '_beat', .3)
    with make_hosts(3) as machines:
        c = order(session, 3, user='root', python=sys.executable).create()
        for i,(h,o) in enumerate(zip(machines, c.instances)):
            o['PrivateIpAddress'] = o['PublicIpAddress'] = h.address
            home = h.folder/'home'
            (home/'.ssh/authorized_keys').write_text((c.folder/'key.pub').read_text())
            (h.folder/'host_key').write_text((c.folder/'host_key/key').read_text())
            h.inside('pkill', '-HUP', '-o', 'sshd')
            (home/'fastimagenet/watch').mkdir(parents=True)
            (home/'fastimagenet/watch/ready').write_text('a disk is missing\n'*(i==1))
        assert [t.name for t in c.tasks]==['rank0','rank1','rank2'] and c.sh('hostname')==[h.name for h in machines]
        assert [l for l in c.said if 'is missing' in l]==['rank1: a disk is missing']
        leases = [h.folder/'home/fastimagenet/watch/lease' for h in machines]
        before = [l.stat().st_mtime for l in leases]
        for _ in range(2):
            for line in c.sh('getent ahostsv4 rank2 | head -n 1'): assert line.split()[0]==machines[2].address
            for text in c.sh('cat /etc/hosts'): assert text.count('rank1 ')==2 and f'::ffff:{machines[1].address} rank1' in text and 'localhost' in text
            c._disconnect() # The names are written again
        proxies = [h.inside('bash', '-c', f'grep -c {machines[0].address}:3128$ /etc/environment || true').strip() for h in machines]
        assert proxies[1:]==['4','4'] and proxies[0] in ('','0') # The others reach the internet through rank 0
        time.sleep(.5)
        c.tasks
        time.sleep(.8)
        assert all(l.stat().st_mtime>b+.5 for l,b in zip(leases, before))
        c.create() # It finds the same machines
        for h,o in zip(machines, c.instances): o['PrivateIpAddress'] = o['PublicIpAddress'] = h.address
        c.tasks
        beats = [t for t in threading.enumerate() if t._target is reach._beats]
        c._disconnect()
        for t in beats: t.join(5)
        assert beats and not any(t.is_alive() for t in beats) # No launcher, no sign of life
        (machines[2].folder/'host_key').write_text((machines[2].folder/'../key').read_text()) # Someone else answers
        c._disconnect()
        machines[2].inside('pkill', '-HUP', '-o', 'sshd')
        monkeypatch.setattr(reach, '_ssh_wait', .1)
        with pytest.raises(ClusterError, match='rank2.*host key'): c.tasks
        assert c.down()==[] and aws.left()==[]
