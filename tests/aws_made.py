"Networks and machines in moto, for tests"
from functools import cache
from aws_proxy import image
from fastai_fastimagenet.cluster.access import *
from fastai_fastimagenet.cluster.cloud import *
from fastai_fastimagenet.cluster.network import *

region,zone = 'us-east-1','us-east-1a'

def tags(name, generation=1, **kw):
    return {cluster_tag: name, 'fastimagenet:owner': 'me@laptop', 'fastimagenet:expires': '2099-01-01T00:00:00Z', 'fastimagenet:generation': str(generation), 'Name': name, **kw}

@cache
def boto(aws, region=region):
    "Clients for EC2 and EFS; made once, which takes a while"
    return clients(aws.session(region), region)

def net(aws, tmp_path, name='demo', region=region, zones=None, cidr='203.0.113.7', folder='key', **kw):
    "`ensure_network` with the key in `folder`"
    ec2,efs = boto(aws, region)
    return ensure_network(ec2, name, region, zones or [region+'a'], tags(name), ssh_key(tmp_path/folder), cidr, efs_client=efs, **kw)

def launch(aws, network, name='demo', nodes=2, region=region, machine='c5.large', generation=1, spot=False, **kw):
    "Machines in `network`; their ids"
    ec2,_ = boto(aws, region)
    kinds = ['instance','volume','network-interface'] + ['spot-instances-request']*spot
    spec = [dict(ResourceType=k, Tags=[dict(Key=k, Value=v) for k,v in tags(name, generation, **kw).items()]) for k in kinds]
    r = ec2.run_instances(ImageId=image, InstanceType=machine, MinCount=nodes, MaxCount=nodes, KeyName=network.key_name, TagSpecifications=spec,
                          **(dict(InstanceMarketOptions=dict(MarketType='spot')) if spot else {}), Placement=dict(GroupName=network.placement_group),
                          NetworkInterfaces=[dict(DeviceIndex=0, SubnetId=network.subnets[region+'a'], Groups=[network.group], AssociatePublicIpAddress=True)])
    return [i['InstanceId'] for i in r['Instances']]
