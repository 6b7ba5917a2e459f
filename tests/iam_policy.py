"""The permissions a launcher needs, from the calls it makes: `python tests/iam_policy.py` writes nbs/iam_policy.json.

`life` leads clusters through all that this package does at AWS, against moto behind the proxy, and returns the actions it called. `policy` gives each
of them the narrowest statement that AWS's documentation allows; an action that no statement knows is an error, so that somebody decides."""
import ast, json, os, re, tempfile
from pathlib import Path

root = Path(__file__).parents[1]
file = root/'nbs/iam_policy.json'
own_calls = {'ec2:CreateVolume','ec2:RequestSpotInstances','ec2:CreateSnapshot'} # Of tests, to make something that is to be removed

def actions(log)->set: return {f'{o["service"]}:{o["action"]}' for o in log}

# What a statement allows

_tag = 'fastimagenet:cluster'
_ours = {'Null': {f'aws:ResourceTag/{_tag}': 'false'}} # It has the tag
_marked = {'Null': {f'aws:RequestTag/{_tag}': 'false'}} # It gets the tag
_makes = {'CreateVpc': 'vpc', 'CreateSubnet': 'subnet', 'CreateInternetGateway': 'internet-gateway', 'CreateVpcEndpoint': 'vpc-endpoint', 'CreateSecurityGroup': 'security-group',
          'ImportKeyPair': 'key-pair', 'CreatePlacementGroup': 'placement-group', 'AllocateAddress': 'elastic-ip',
          'RunInstances': 'instance volume network-interface spot-instances-request'}
_uses = {'CreateSubnet': 'vpc', 'CreateVpcEndpoint': 'vpc', 'CreateSecurityGroup': 'vpc', 'RunInstances': 'subnet security-group key-pair placement-group'}
_untagged = {'CreateVpcEndpoint': 'route-table', 'CreateRoute': 'route-table', 'ReplaceRoute': 'route-table'} # The main one of a VPC comes without tags
_changes = '''TerminateInstances CancelSpotInstanceRequests AssociateAddress ReleaseAddress DeleteVolume DeleteNetworkInterface DeleteVpcEndpoints DeletePlacementGroup
    DeleteKeyPair AuthorizeSecurityGroupIngress AuthorizeSecurityGroupEgress RevokeSecurityGroupIngress DeleteSecurityGroup DeleteSubnet AttachInternetGateway
    DetachInternetGateway DeleteInternetGateway ModifyVpcAttribute DeleteVpc'''.split()

def _arns(table, used, account='*'):
    return sorted({f'arn:aws:ec2:*:{account}:{r}/*' for a,rs in table.items() if a in used for r in rs.split()})

def _statement(sid, actions, resources, condition=None):
    return dict(Sid=sid, Effect='Allow', Action=sorted(actions), Resource=resources, **(dict(Condition=condition) if condition else {})) if actions else None

def policy(used:set)->dict:
    "IAM policy for actions such as 'ec2:RunInstances'; `ValueError` for those it does not know"
    ec2 = {a.partition(':')[2] for a in used if a.startswith('ec2:')}
    def of(table): return {f'ec2:{a}' for a in table if a in ec2}
    looks = {a for a in used if re.fullmatch('(ec2|elasticfilesystem):Describe.*|pricing:GetProducts|servicequotas:GetServiceQuota', a)}
    fs,targets = 'arn:aws:elasticfilesystem:*:*:file-system/*', {f'elasticfilesystem:{a}MountTarget' for a in ('Create','Delete')} & used
    service = lambda s: f'arn:aws:iam::*:role/aws-service-role/{s}.amazonaws.com/*'
    res = [_statement('Look', looks, '*'),
        _statement('FindImage', {'ssm:GetParameter'} & used, 'arn:aws:ssm:*::parameter/aws/service/deeplearning/ami/*'),
        _statement('MakeWithTag', of(_makes), _arns(_makes, ec2), _marked),
        _statement('MakeInOurs', of(_uses), _arns(_uses, ec2), _ours),
        _statement('MakeFromImage', of({'RunInstances'}), ['arn:aws:ec2:*::image/*','arn:aws:ec2:*::snapshot/*']),
        _statement('MakeWays', of(_untagged), _arns(_untagged, ec2)),
        _statement('TagWhatIsMade', {'ec2:CreateTags'} & used, '*', {'StringEquals': {'ec2:CreateAction': sorted(a for a in _makes if a in ec2)}}),
        _statement('TagOurVpc', {'ec2:CreateTags'} & used, 'arn:aws:ec2:*:*:vpc/*', _ours),
        _statement('ChangeOurs', of(_changes), '*', _ours),
        _statement('MakeFileSystem', {'elasticfilesystem:CreateFileSystem','elasticfilesystem:TagResource'} if 'elasticfilesystem:CreateFileSystem' in used else None, '*', _marked),
        _statement('RemoveFileSystem', {'elasticfilesystem:DeleteFileSystem'} & used, fs, _ours),
        _statement('MountTargets', targets, fs),
        _statement('InterfacesOfMountTargets', targets and {'ec2:CreateNetworkInterface','ec2:DeleteNetworkInterface'}, '*'),
        _statement('FirstUse', {'iam:CreateServiceLinkedRole'}, [service('spot'), service('elasticfilesystem')],
                   {'StringEquals': {'iam:AWSServiceName': ['spot.amazonaws.com','elasticfilesystem.amazonaws.com']}})]
    res = dict(Version='2012-10-17', Statement=[s for s in res if s])
    if unknown := used-allowed(res): raise ValueError(f'No statement knows {", ".join(sorted(unknown))}: decide in tests/iam_policy.py')
    return res

def allowed(p)->set: return {a for s in p['Statement'] for a in s['Action']}
def not_allowed(log)->set: return actions(log)-allowed(json.loads(file.read_text()))-own_calls

# What is called

def in_code()->list:
    "For each operation of boto3 that is named in the modules: the actions it may stand for"
    import boto3
    from botocore import xform_name
    models = [boto3.Session(region_name='us-east-1')._session.get_service_model(s) for s in ('ec2','efs','ssm','pricing','service-quotas')]
    ops = {}
    for m in models:
        for o in m.operation_names: ops.setdefault(xform_name(o), set()).add(f'{m.signing_name}:{o}')
    nodes = [n for f in (root/'fastai_fastimagenet/cluster').glob('*.py') for n in ast.walk(ast.parse(f.read_text()))]
    words = {n.attr for n in nodes if isinstance(n, ast.Attribute)} | {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    return [ops[w] for w in sorted(words) if w in ops]

def life(aws)->set:
    "Actions of clusters from their beginning to their end; the folder of the launcher and the environment are the caller's"
    from fastai_fastimagenet.cluster.aws import AWSCluster
    from fastai_fastimagenet.cluster.cli import main
    ec2,tags = aws.session().client('ec2'),[dict(Key=_tag, Value='life')]
    def spec(kind): return [dict(ResourceType=kind, Tags=tags)]
    disk = ec2.create_volume(AvailabilityZone='us-east-1a', Size=1)['VolumeId']
    snapshot = ec2.create_snapshot(VolumeId=disk)['SnapshotId']
    start = len(aws.log())
    AWSCluster('life', 2, 'p4d.24xlarge', spot=True, efs=True, volume=snapshot, ssh_from='203.0.113.7/32', say=lambda s: None).create()
    made = aws.log()[start:]
    vpc = ec2.describe_vpcs(Filters=[dict(Name=f'tag:{_tag}', Values=['life'])])['Vpcs'][0]['VpcId']
    table = ec2.describe_route_tables(Filters=[dict(Name='vpc-id', Values=[vpc])])['RouteTables'][0]['RouteTableId']
    subnet = ec2.describe_subnets(Filters=[dict(Name='vpc-id', Values=[vpc])])['Subnets'][0]['SubnetId']
    other = ec2.create_internet_gateway()['InternetGateway']['InternetGatewayId']
    ec2.replace_route(RouteTableId=table, DestinationCidrBlock='0.0.0.0/0', GatewayId=other)
    ec2.delete_internet_gateway(InternetGatewayId=other)
    ec2.create_volume(AvailabilityZone='us-east-1a', Size=1, TagSpecifications=spec('volume'))
    ec2.create_network_interface(SubnetId=subnet, TagSpecifications=spec('network-interface'))
    ec2.request_spot_instances(InstanceCount=1, LaunchSpecification=dict(InstanceType='c5.large'), TagSpecifications=spec('spot-instances-request'))
    start = len(aws.log())
    c = AWSCluster.attach('life', ssh_from='203.0.113.8/32', say=lambda s: None)
    c.relaunch()
    for cmd in ('ls','show life','cost life','ls --leaks','down life'):
        try: main(cmd.split())
        except SystemExit as e: assert not e.code, f'{cmd}: {e}'
    made += aws.log()[start:]
    ec2.delete_volume(VolumeId=disk)
    return actions(made)

if __name__=='__main__':
    from aws_proxy import Aws
    from fastai_fastimagenet.cluster import teardown
    teardown._poll = teardown._second_look = .1
    aws = Aws()
    try:
        with tempfile.TemporaryDirectory() as tmp:
            os.environ.update(aws.env, FASTIMAGENET_HOME=tmp)
            p = policy(life(aws))
    finally: aws.close()
    file.write_text(json.dumps(p, indent=1)+'\n')
    print(f'{file.name}: {len(allowed(p))} actions')
