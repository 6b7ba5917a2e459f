"Finding and removing clusters, against moto behind the proxy"
import threading, time
import pytest
from aws_made import *
from fastai_fastimagenet.cluster import teardown
from fastai_fastimagenet.cluster.teardown import *

@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    for k,v in dict(_poll=.05, _second_look=.3, _stuck=2, _ending=20).items(): monkeypatch.setattr(teardown, k, v)

@cache
def session(aws): return aws.session()

def take_down(aws, name='demo', **kw):
    "What is left, and what was said"
    said = []
    return down(session(aws), region, name, say=said.append, **kw), '\n'.join(said)

def belongings(aws, name): return sorted((r.kind,r.id) for r in resources(session(aws), region, name))

def spec(kind, name='demo'): return [dict(ResourceType=kind, Tags=[dict(Key=k, Value=v) for k,v in tags(name).items()])]

def everything(aws, tmp_path, name='demo'):
    "A cluster with all that one can have"
    n = net(aws, tmp_path, name, efs=True)
    launch(aws, n, name, nodes=3, spot=True, **{price_tag: '1.5'})
    ec2,_ = boto(aws)
    ec2.allocate_address(Domain='vpc', TagSpecifications=spec('elastic-ip', name))
    ec2.create_volume(AvailabilityZone=zone, Size=100, TagSpecifications=spec('volume', name))
    ec2.create_network_interface(SubnetId=n.subnets[zone], TagSpecifications=spec('network-interface', name))
    ec2.request_spot_instances(InstanceCount=1, LaunchSpecification=dict(ImageId='ami-0fa57fa57fa57fa50', InstanceType='c5.large'), TagSpecifications=spec('spot-instances-request', name))
    return n

def test_nothing_is_left(aws, tmp_path):
    everything(aws, tmp_path)
    kinds = {r.kind for r in resources(session(aws), region, 'demo')}
    assert kinds=={*aws_kinds,'file system','mount target'}
    ec2,_ = boto(aws)
    extra = [i['InstanceId'] for r in ec2.describe_instances()['Reservations'] for i in r['Instances'] if not tags_of(i)] # Of the spot request; moto starts one without tags
    ec2.terminate_instances(InstanceIds=extra)
    left,said = take_down(aws)
    assert left==[] and aws.left()==[] and 'Nothing is left of cluster demo' in said
    assert take_down(aws)==([], 'Nothing is left of cluster demo in us-east-1')

def test_calls_do_not_grow_with_the_machines(aws, tmp_path):
    counts = []
    for nodes in (2,16):
        launch(aws, net(aws, tmp_path), nodes=nodes)
        before = len(aws.log())
        assert take_down(aws)[0]==[]
        counts.append([o['action'] for o in aws.log()[before:] if not o['action'].startswith('Describe')])
    assert sorted(counts[0])==sorted(counts[1]) and len(counts[0])<15

def test_others_are_not_touched(aws, tmp_path):
    for name in ('demo','demo2'): launch(aws, net(aws, tmp_path, name, efs=True), name)
    before = belongings(aws, 'demo2')
    for name in ('demo','*','d*','demo?'):
        assert take_down(aws, name)[0]==[] and belongings(aws, 'demo2')==before
    assert belongings(aws, 'demo')==[] and clusters(session(aws), region)[0].states=={'running':2}
    assert take_down(aws, 'demo2')[0]==[] and aws.left()==[]

def test_a_given_file_system_stays(aws, tmp_path):
    _,efs = boto(aws)
    fs = efs.create_file_system(CreationToken='mine')['FileSystemId']
    net(aws, tmp_path, efs=fs)
    assert ('file system',fs) not in belongings(aws, 'demo')
    assert take_down(aws)[0]==[] and aws.left()==[f'file system us-east-1 {fs}']

deletions = ['TerminateInstances','CancelSpotInstanceRequests','ReleaseAddress','DeleteVolume','DeleteNetworkInterface','DeleteMountTarget','DeleteVpcEndpoints','DeletePlacementGroup',
             'DeleteKeyPair','DeleteFileSystem','DeleteSecurityGroup','DeleteSubnet','DetachInternetGateway','DeleteInternetGateway','DeleteVpc']

@pytest.mark.parametrize('fault', [dict(do='error', code='DependencyViolation', times=4), dict(do='error', code='UnauthorizedOperation'), dict(do='error', code='Something.NotFound'), dict(do='lost')])
def test_every_deletion_fails_at_first(aws, tmp_path, fault):
    everything(aws, tmp_path)
    aws.set(faults=[dict(fault, action=a) for a in deletions])
    left,said = take_down(aws)
    assert left==[] and belongings(aws, 'demo')==[]
    if fault.get('code')=='DependencyViolation': assert 'Waiting for subnet subnet-' in said

def test_machines_that_end_slowly(aws, tmp_path):
    launch(aws, net(aws, tmp_path), nodes=2)
    aws.set(stopping=1.5)
    left,said = take_down(aws)
    assert left==[] and aws.left()==[] and said.count('Waiting until the machines are gone')==1
    assert 'DeleteSubnet' not in [o['action'] for o in aws.log() if o.get('error')] # Not even tried before

def test_what_stays_in_use(aws, tmp_path):
    everything(aws, tmp_path)
    aws.set(faults=[dict(do='error', action='DeleteVolume', code='VolumeInUse', message='attached to something', times=1000)])
    left,said = take_down(aws)
    assert [r.kind for r in left]==['volume'] and left[0].billable and left[0].usd==pytest.approx(100*.08/730) and 'attached to something' in left[0].why
    assert f'Left: volume {left[0].id} of cluster demo in us-east-1, about $0.011 per hour: ' in said and said.endswith('Try again: fastimagenet-cluster down demo --region us-east-1')

def test_what_aws_refuses(aws, tmp_path):
    launch(aws, net(aws, tmp_path))
    aws.set(faults=[dict(do='error', action='DeleteSecurityGroup', code='UnauthorizedOperation', times=1000)])
    began = time.monotonic()
    left,said = take_down(aws)
    assert [r.kind for r in left]==['security group','VPC'] and not any(r.billable for r in left) and time.monotonic()-began<2 # Not as long as for what is in use
    assert 'UnauthorizedOperation' in left[0].why and 'DependencyViolation' in left[1].why

def test_machines_that_may_not_be_ended(aws, tmp_path):
    launch(aws, net(aws, tmp_path), **{price_tag: '21.96'})
    aws.set(faults=[dict(do='error', action='TerminateInstances', code='OperationNotPermitted', message="Modify its 'disableApiTermination' attribute", times=1000)])
    left,said = take_down(aws)
    assert [r.kind for r in left].count('instance')==2 and 'about $22 per hour' in said and 'disableApiTermination' in said

def test_a_second_look_finds_what_was_hidden(aws, tmp_path):
    "A launcher died in the call that launches: its machines cannot be seen yet"
    ec2,_ = boto(aws)
    ec2.import_key_pair(KeyName='fastimagenet-demo', PublicKeyMaterial=ssh_key(tmp_path/'key').encode(), TagSpecifications=spec('key-pair'))
    for again in (False,True): # The second time nothing at all is found at first
        aws.set(hide=.25)
        ec2.run_instances(ImageId='ami-0fa57fa57fa57fa50', InstanceType='c5.large', MinCount=2, MaxCount=2, TagSpecifications=spec('instance'))
        left,said = take_down(aws, again=again)
        assert left==[] and 'Ending 2 machines' in said and aws.left()==[]

def test_hidden_machines_in_the_network(aws, tmp_path):
    n = net(aws, tmp_path)
    aws.set(hide=1)
    launch(aws, n)
    left,said = take_down(aws)
    assert left==[] and aws.left()==[] and 'Waiting for' in said and 'Ending 2 machines' in said

def test_two_at_once(aws, tmp_path):
    everything(aws, tmp_path)
    res = []
    threads = [threading.Thread(target=lambda: res.append(take_down(aws)[0])) for _ in range(2)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert res==[[],[]] and belongings(aws, 'demo')==[]

def test_lookups_that_fail(aws, tmp_path):
    net(aws, tmp_path)
    ec2,_ = boto(aws)
    ec2.create_volume(AvailabilityZone=zone, Size=100, TagSpecifications=spec('volume'))
    denied = dict(do='error', action='DescribeVolumes', code='UnauthorizedOperation')
    aws.set(faults=[dict(denied, times=1000)])
    with pytest.raises(CloudError, match='volumes in us-east-1.*UnauthorizedOperation'): resources(session(aws), region)
    assert [(c.name,c.unknown) for c in clusters(session(aws), region)]==[('demo',['volume'])]
    left,said = take_down(aws)
    assert [(r.kind,r.id) for r in left]==[('volume','?')] and left[0].billable and 'UnauthorizedOperation' in said and 'Try again: fastimagenet-cluster down demo' in said
    aws.set(faults=[denied])
    assert take_down(aws)[0]==[] and aws.left()==[]

def test_a_name_is_needed(aws):
    for name in (None,''):
        with pytest.raises(ValueError, match='Which cluster'): take_down(aws, name)
    assert not aws.log()

def test_without_credentials(aws, monkeypatch):
    import boto3
    for k in ('AWS_ACCESS_KEY_ID','AWS_SECRET_ACCESS_KEY'): monkeypatch.delenv(k)
    began = time.monotonic()
    with pytest.raises(CloudError, match='(?i)credentials'): down(boto3.Session(), region, 'demo', say=list)
    assert time.monotonic()-began<5 and not aws.log()

def test_clusters(aws, tmp_path):
    launch(aws, net(aws, tmp_path, 'big'), 'big', nodes=3, machine='g5.xlarge', spot=True, generation=2, **{price_tag: '0.5'})
    n = net(aws, tmp_path, 'small')
    launch(aws, n, 'small', nodes=1)
    net(aws, tmp_path, 'empty')
    big,empty,small = clusters(session(aws), region)
    assert (big.name,big.nodes,big.states,big.machine,big.zone,big.market,big.generation,big.owner)==('big',3,{'running':3},'g5.xlarge',zone,'spot','2','me@laptop')
    assert big.price==1.5 and 0<=big.cost<.1 and big.expires.year==2099 and big.launched.tzinfo
    assert (small.nodes,small.market,small.price)==(1,'on-demand',None)
    assert (empty.name,empty.nodes,empty.states,empty.machine,empty.launched,empty.owner)==('empty',0,{},'',None,'me@laptop')
    before = len(aws.log())
    clusters(session(aws), region)
    assert len(aws.log())-before==13

def test_leaks_in_two_regions(aws, tmp_path):
    west = 'us-west-2'
    launch(aws, net(aws, tmp_path, 'fine'), 'fine')
    launch(aws, net(aws, tmp_path, 'late'), 'late', **{'fastimagenet:expires': '2020-01-01T00:00:00Z', price_tag: '2'})
    net(aws, tmp_path, 'empty', region=west)
    n = net(aws, tmp_path, 'twice', region=west)
    for g in (1,2): launch(aws, n, 'twice', region=west, nodes=1, generation=g)
    found,refused = leaks(session(aws), [region, west])
    assert [(l.cluster,l.region) for l in found]==[('late',region),('empty',west),('twice',west)] and refused=={}
    assert 'its time was over at 2020-01-01' in str(found[0]) and found[0].usd>4 and '2 instance' in str(found[0])
    assert 'no machines' in found[1].why and '1, 2' in found[2].why and str(found[2]).endswith('Remove it: fastimagenet-cluster down twice --region us-west-2')

def test_leaks_in_all_regions(aws, tmp_path):
    net(aws, tmp_path, 'empty', region='eu-west-1')
    aws.set(faults=[dict(do='error', action='DescribeVpcs', code='UnauthorizedOperation', message='not in this region')])
    found,refused = leaks(session(aws))
    assert [l.region for l in found]==['eu-west-1'] and len(refused)==1 and 'not in this region' in list(refused.values())[0]
    aws.set(faults=[dict(do='error', action='DescribeRegions', code='UnauthorizedOperation')])
    with pytest.raises(CloudError, match='does not list its regions.*UnauthorizedOperation'): leaks(session(aws))
