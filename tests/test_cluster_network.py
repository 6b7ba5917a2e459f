"The network of a cluster, against moto behind the proxy"
import os, re, stat, threading, time
from http.server import BaseHTTPRequestHandler, HTTPServer
import pytest
from aws_made import *
from fastai_fastimagenet.cluster import network

def changes(aws, start): return sorted(o['action'] for o in aws.log()[start:] if not o['action'].startswith('Describe'))

def tagged_ids(aws):
    "Kind -> ids of what has the tag of the cluster"
    ec2,efs = boto(aws)
    res = {k: [id_of(k, o) for o in tagged(ec2, k, 'demo')] for k in aws_kinds}
    res['file system'] = [f['FileSystemId'] for f in efs.describe_file_systems()['FileSystems'] if tags_of(f).get(cluster_tag)=='demo']
    return {k: v for k,v in res.items() if v}

def test_everything_is_made_with_tags(aws, tmp_path):
    n = net(aws, tmp_path, efs=True)
    ids = tagged_ids(aws)
    assert {k: len(v) for k,v in ids.items()}=={'S3 endpoint':1, 'placement group':1, 'key pair':1, 'security group':1, 'subnet':1, 'internet gateway':1, 'VPC':1, 'file system':1}
    assert ids['VPC']==[n.vpc] and ids['subnet']==[n.subnets[zone]] and ids['security group']==[n.group] and ids['file system']==[n.efs]
    assert ids['key pair']==[n.key_name] and ids['placement group']==[n.placement_group]
    known = {i for v in ids.values() for i in v}
    assert [o for o in aws.left() if o.split()[-1] not in known and 'mount target' not in o and not re.match(r'interface', o)]==[]
    ec2,efs = boto(aws)
    assert all(v==tags_of(tagged(ec2, 'VPC')[0])[k] for k,v in tags('demo').items())
    assert efs.describe_file_systems()['FileSystems'][0]['Encrypted'] and efs.describe_mount_targets(FileSystemId=n.efs)['MountTargets'][0]['SubnetId']==n.subnets[zone]
    routes = ec2.describe_route_tables(Filters=[dict(Name='vpc-id', Values=[n.vpc])])['RouteTables'][0]['Routes']
    assert {r.get('DestinationCidrBlock') for r in routes}>={'10.42.0.0/16','0.0.0.0/0'} and any(r['GatewayId'].startswith('vpce-') for r in routes)
    g = tagged(ec2, 'security group')[0]
    assert [(r['FromPort'],r['ToPort'],[o['CidrIp'] for o in r['IpRanges']]) for r in g['IpPermissions'] if r['IpProtocol']=='tcp']==[(22,22,['203.0.113.7/32'])]
    for rules in (g['IpPermissions'],g['IpPermissionsEgress']): assert [p['GroupId'] for r in rules for p in r['UserIdGroupPairs'] if r['IpProtocol']=='-1']==[n.group]
    assert all(r['IpProtocol']=='-1' and not r['IpRanges'] or r['FromPort']==22 for r in g['IpPermissions'])

def test_a_route_table_that_is_not_shown_yet(aws, tmp_path, monkeypatch):
    monkeypatch.setattr(network, '_again', .05)
    aws.set(faults=[dict(do='empty', action='DescribeRouteTables', times=3)])
    net(aws, tmp_path)
    assert aws.actions()['DescribeRouteTables']==4
    monkeypatch.setattr(network, '_patience', .2)
    aws.set(faults=[dict(do='empty', action='DescribeRouteTables', times=1000)])
    with pytest.raises(CloudError, match='no main route table of vpc-.*fastimagenet-cluster down demo --region us-east-1'): net(aws, tmp_path)

def test_the_second_time_makes_nothing(aws, tmp_path):
    n = net(aws, tmp_path, efs=True)
    before = len(aws.log())
    assert net(aws, tmp_path, efs=True)==n and not changes(aws, before)
    assert len(aws.log())-before<=12

def test_calls_run_together(aws, tmp_path):
    "A fifth of a second for each of some 25 calls is not five seconds"
    ssh_key(tmp_path/'key')
    boto(aws)[0].describe_vpcs()
    aws.set(latency={'*':.2})
    began = time.monotonic()
    net(aws, tmp_path, efs=True)
    assert time.monotonic()-began<4

def test_another_zone_and_another_address(aws, tmp_path):
    n = net(aws, tmp_path)
    before = len(aws.log())
    m = net(aws, tmp_path, zones=['us-east-1b'], cidr='198.51.100.0/24')
    assert set(m.subnets)=={'us-east-1a','us-east-1b'} and m.subnets[zone]==n.subnets[zone] and m.vpc==n.vpc
    assert changes(aws, before)==['AuthorizeSecurityGroupIngress','CreateSubnet','RevokeSecurityGroupIngress']
    g = tagged(boto(aws)[0], 'security group')[0]
    assert [o['CidrIp'] for r in g['IpPermissions'] for o in r['IpRanges']]==['198.51.100.0/24']

steps = ['CreateVpc','ModifyVpcAttribute','CreateSubnet','CreateInternetGateway','AttachInternetGateway','CreateRoute','CreateVpcEndpoint','CreateSecurityGroup',
         'AuthorizeSecurityGroupIngress','AuthorizeSecurityGroupEgress','ImportKeyPair','CreatePlacementGroup','CreateFileSystem','CreateTags','CreateMountTarget']

def check_whole(aws, n):
    "The network is complete, and nothing is there that `down` would not find by its tag"
    ec2,efs = boto(aws)
    [g] = [g for g in tagged(ec2, 'security group') if g['GroupId']==n.group]
    [t] = ec2.describe_route_tables(Filters=[dict(Name='vpc-id', Values=[n.vpc])])['RouteTables']
    assert len(g['IpPermissions'])==2 and any(r['UserIdGroupPairs'] for r in g['IpPermissionsEgress']) and len(t['Routes'])==3
    assert ec2.describe_vpc_attribute(VpcId=n.vpc, Attribute='enableDnsHostnames')['EnableDnsHostnames']['Value']
    assert [x['SubnetId'] for x in efs.describe_mount_targets(FileSystemId=n.efs)['MountTargets']]==[n.subnets[zone]]
    assert [tags_of(v)[efs_tag] for v in tagged(ec2, 'VPC') if v['VpcId']==n.vpc]==[n.efs]
    assert all(len(v)==1 for k,v in tagged_ids(aws).items() if k not in ('VPC','internet gateway')) # Of those a lost reply makes two

@pytest.mark.parametrize('action', steps)
def test_half_made_networks_are_completed(aws, tmp_path, action):
    "Refused at any step: the error says what and how to undo it, and the next call completes the network"
    aws.set(faults=[dict(do='error', action=action, code='UnauthorizedOperation')])
    with pytest.raises(CloudError, match='(?s)of cluster demo in us-east-1.*UnauthorizedOperation.*fastimagenet-cluster down demo --region us-east-1'): net(aws, tmp_path, efs=True)
    n = net(aws, tmp_path, efs=True)
    check_whole(aws, n)
    assert all(len(v)==1 for v in tagged_ids(aws).values())

@pytest.mark.parametrize('action', steps)
def test_lost_replies(aws, tmp_path, action):
    "AWS did it, the connection broke, and boto3 asked again"
    aws.set(faults=[dict(do='lost', action=action)])
    n = net(aws, tmp_path, efs=True)
    check_whole(aws, n)
    assert net(aws, tmp_path, efs=True)==n

def test_not_known_everywhere_yet(aws, tmp_path, monkeypatch):
    monkeypatch.setattr(network, '_again', .01)
    aws.set(faults=[dict(do='error', action=a, code=c, times=2) for a,c in (('CreateSubnet','InvalidVpcID.NotFound'), ('AttachInternetGateway','InvalidInternetGatewayID.NotFound'),
                                                                         ('AuthorizeSecurityGroupIngress','InvalidGroup.NotFound'))])
    check_whole(aws, net(aws, tmp_path, efs=True))

def test_a_gateway_that_went_away(aws, tmp_path):
    n = net(aws, tmp_path)
    ec2,_ = boto(aws)
    g = tagged(ec2, 'internet gateway')[0]['InternetGatewayId']
    ec2.detach_internet_gateway(InternetGatewayId=g, VpcId=n.vpc)
    ec2.delete_internet_gateway(InternetGatewayId=g)
    assert net(aws, tmp_path)==n
    new = tagged(ec2, 'internet gateway')[0]['InternetGatewayId']
    assert new in [r.get('GatewayId') for r in ec2.describe_route_tables(Filters=[dict(Name='vpc-id', Values=[n.vpc])])['RouteTables'][0]['Routes']]

def test_the_key_of_another_laptop(aws, tmp_path):
    net(aws, tmp_path)
    before = len(aws.log())
    with pytest.raises(CloudError, match='me@laptop.*cannot reach.*fastimagenet-cluster show demo.*fastimagenet-cluster down demo --region us-east-1'): net(aws, tmp_path, folder='other')
    assert not changes(aws, before)

def test_names_that_are_taken(aws, tmp_path):
    ec2,_ = boto(aws)
    ec2.import_key_pair(KeyName='fastimagenet-demo', PublicKeyMaterial=ssh_key(tmp_path/'other').encode())
    with pytest.raises(CloudError, match='key pair fastimagenet-demo exists.*fastimagenet:cluster=demo'): net(aws, tmp_path)

def test_too_many_networks(aws, tmp_path):
    aws.set(faults=[dict(do='error', action='CreateVpc', code='VpcLimitExceeded')])
    with pytest.raises(CloudError, match='room for 5.*L-F678F1CE.*--leaks'): net(aws, tmp_path)

def test_a_file_system_that_exists(aws, tmp_path):
    _,efs = boto(aws)
    fs = efs.create_file_system(CreationToken='mine')['FileSystemId']
    n = net(aws, tmp_path, efs=fs)
    assert n.efs==fs and tags_of(tagged(boto(aws)[0], 'VPC')[0])[efs_tag]==fs
    assert efs.describe_mount_targets(FileSystemId=fs)['MountTargets'][0]['VpcId']==n.vpc and 'file system' not in tagged_ids(aws)
    with pytest.raises(CloudError, match=f'{fs} has mount targets in {n.vpc}.*fastimagenet-cluster down other'): net(aws, tmp_path, name='other', efs=fs)
    with pytest.raises(CloudError, match='FileSystemNotFound'): net(aws, tmp_path, name='third', efs='fs-0123456789abcdef0')

def test_no_placement_group(aws, tmp_path):
    assert net(aws, tmp_path, placement=False).placement_group is None and 'placement group' not in tagged_ids(aws)

def test_the_key_is_made_once_and_is_private(tmp_path):
    folder,keys = tmp_path/'a'/'demo',[]
    threads = [threading.Thread(target=lambda: keys.append(ssh_key(folder))) for _ in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(keys)==4 and len(set(keys))==1 and sorted(os.listdir(folder))==['key','key.pub']
    assert stat.S_IMODE(folder.stat().st_mode)==0o700 and stat.S_IMODE((folder/'key').stat().st_mode)==0o600
    (folder/'key').chmod(0o644)
    with pytest.raises(RuntimeError, match='(?i)permissions'): ssh_key(folder)

@pytest.mark.parametrize('answer,ok', [(b'203.0.113.7\n',True), (b'<html>sign in to the hotel</html>',False), (b'2001:db8::1',False), (b'',False)])
def test_the_address_of_this_laptop(answer, ok):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer)
        def log_message(self, *args): pass
    server = HTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=server.serve_forever, args=[.01], daemon=True).start()
    try:
        url = f'http://127.0.0.1:{server.server_port}'
        if ok: assert my_cidr(url=url)=='203.0.113.7/32'
        else:
            with pytest.raises(CloudError, match="ssh_from='a.b.c.d/32'"): my_cidr(url=url)
    finally:
        server.shutdown()
        server.server_close()

@pytest.mark.parametrize('cidr', ['0.0.0.0/0','2001:db8::1','my laptop','203.0.113.7/24'])
def test_addresses_that_may_not_come_in(aws, tmp_path, cidr):
    with pytest.raises(ValueError, match='203.0.113.7/32'): net(aws, tmp_path, cidr=cidr)
    assert not aws.log()
