"""One fault at each single call of create and of down, one at a time: afterwards the cluster works, or nothing is left of it. The launcher is
killed too, after each call. `pytest -s` shows the table"""
import json, subprocess, sys
from collections import Counter
from pathlib import Path
import pytest
from aws_quick import order, quick
from fastai_fastimagenet.cluster.cloud import CloudError, undo_command
from fastai_fastimagenet.cluster.teardown import down

region,undo = 'us-east-1',undo_command('im','us-east-1')
quotas = dict(CreateVpc='VpcLimitExceeded', CreateSubnet='SubnetLimitExceeded', CreateInternetGateway='InternetGatewayLimitExceeded', CreateSecurityGroup='SecurityGroupLimitExceeded',
              AuthorizeSecurityGroupIngress='RulesPerSecurityGroupLimitExceeded', AuthorizeSecurityGroupEgress='RulesPerSecurityGroupLimitExceeded', ImportKeyPair='KeyPairLimitExceeded',
              CreatePlacementGroup='PlacementGroupLimitExceeded', CreateVpcEndpoint='VpcEndpointLimitExceeded', CreateRoute='RouteLimitExceeded',
              AllocateAddress='AddressLimitExceeded', RunInstances='MaxSpotInstanceCountExceeded')
looks = lambda action: action.startswith(('Describe','Get','List'))
kinds = { # Fault, and the calls where it can be
    'throttled': (dict(do='error', code='RequestLimitExceeded', message='Request limit exceeded.', status=503), lambda a: True),
    'unauthorized': (dict(do='error', code='UnauthorizedOperation', message='You are not authorized to perform this operation.', status=403), lambda a: True),
    'no answer': (dict(do='hang', seconds=0), lambda a: True),
    'answer lost': (dict(do='lost'), lambda a: not looks(a)),
    'quota': (dict(do='error', message='The maximum has been reached.'), lambda a: a in quotas),
    'no capacity': (dict(do='error', code='InsufficientInstanceCapacity', message='We currently do not have sufficient capacity.', status=500), lambda a: a=='RunInstances')}
made = Counter({'instance':2, 'interface':8, 'volume':2, 'address':1, 'endpoint':1, 'gateway':1, 'group':1, 'key pair':1, 'placement group':1, 'subnet':1, 'vpc':1})

@pytest.fixture(scope='module')
def world(aws_server, tmp_path_factory):
    "A session of boto3 for all cases, and the names of the calls of an undisturbed create and down"
    with pytest.MonkeyPatch.context() as m, quick():
        for k,v in {**aws_server.env, 'FASTIMAGENET_HOME': str(tmp_path_factory.mktemp('home'))}.items(): m.setenv(k, v)
        yield aws_server, aws_server.session(region)
        aws_server.reset()

def kinds_of(left): return Counter(next(k for k in sorted(made, key=len, reverse=True) if o.startswith(k)) for o in left)

def check_gone(aws, session):
    "Another launcher removes what is left"
    left = down(session, region, 'im', lambda line: None)
    assert left==[] and aws.left()==[], (left, aws.left())

def run_create(aws, session):
    c = order(session)
    try: c.create()
    except (CloudError,ValueError) as e:
        said = str(e)+'\n'.join(c.said)
        assert undo in said or (isinstance(e, ValueError) and not aws.left()), said
        assert 'im in us-east-1' in said or 'vCPU' in said, said
        left = aws.left()
        assert left==[], f'the launch that failed left {left}; {said}'
        return 'removed'
    assert len(c.instances)==2 and c.instances[0]['PublicIpAddress'] and aws.left()
    there = kinds_of(aws.left())
    assert there['instance']==2, there
    if there!=made: check_gone(aws, session)
    return 'works'

def run_down(aws, session):
    said = []
    try: left = down(session, region, 'im', said.append)
    except CloudError as e: left = [e]
    if left: assert undo in '\n'.join(map(str, said+left)), (said, left)
    if aws.left(): assert left, f'down did not say that it left {aws.left()}'
    res = 'says what is left' if left else 'works'
    if left or aws.left(): check_gone(aws, session)
    return res

def calls_of(aws, run):
    before = len(aws.log())
    run()
    return [o['action'] for o in aws.log()[before:]]

def faults(aws, session, run, start):
    "Table of results: kind of fault -> Counter"
    start()
    names = calls_of(aws, lambda: run(aws, session))
    table = {}
    for kind,(fault,fits) in kinds.items():
        table[kind] = Counter()
        for n in range(1, len(names)+1):
            start()
            aws.set(faults=[{**fault, 'call': n, 'code': fault.get('code', ''), 'only': kind}])
            table[kind][run(aws, session)] += 1
    return table
