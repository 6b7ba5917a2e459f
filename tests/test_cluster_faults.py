"""One fault at each single call of create and of down, one at a time: afterwards the cluster works, or nothing is left of it. The launcher is
killed too, after each call. Prints the table"""
import json, os, subprocess, sys
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
kinds = { # Fault, and the calls where it can be; where a call changes nothing a lost answer is no answer
    'throttled': (dict(do='error', code='RequestLimitExceeded', message='Request limit exceeded.', status=503), lambda a: True),
    'unauthorized': (dict(do='error', code='UnauthorizedOperation', message='You are not authorized to perform this operation.', status=403), lambda a: True),
    'no answer': (dict(do='hang', seconds=0), lambda a: True),
    'answer lost': (dict(do='lost'), lambda a: not looks(a)),
    'quota': (dict(do='error', message='The maximum has been reached.'), lambda a: a in quotas),
    'no capacity': (dict(do='error', code='InsufficientInstanceCapacity', message='We currently do not have sufficient capacity.', status=500), lambda a: a=='RunInstances')}
made = Counter({'instance':2, 'interface':8, 'volume':2, 'address':1, 'endpoint':1, 'gateway':1, 'group':1, 'key pair':1, 'placement group':1, 'subnet':1, 'vpc':1})

@pytest.fixture(scope='module')
def world(aws_server, tmp_path_factory):
    "The proxy, and a session of boto3 for all cases"
    with pytest.MonkeyPatch.context() as m, quick():
        for k,v in {**aws_server.env, 'FASTIMAGENET_HOME': str(tmp_path_factory.mktemp('home'))}.items(): m.setenv(k, v)
        yield aws_server, aws_server.session(region)
        aws_server.reset()

@pytest.fixture(scope='module')
def ready(world):
    "Brings back a cluster that was made"
    aws,session = world
    aws.reset()
    order(session).create()
    assert kinds_of(aws.left())==made
    aws.save()
    return aws.restore

def kinds_of(left): return Counter(next(k for k in sorted(made, key=len, reverse=True) if o.startswith(k)) for o in left)

def check_gone(aws, session):
    "Another launcher removes what is left"
    left = down(session, region, 'im', lambda line: None)
    assert left==[] and aws.left()==[], (left, aws.left())

def run_create(aws, session):
    "Make the cluster; it works, or nothing is left, and the message says what it was and how to undo it"
    c = order(session)
    try: c.create()
    except CloudError as e:
        assert undo in str(e) and 'cluster im in us-east-1' in str(e), str(e)
        assert aws.left()==[], f'the launch that failed left {aws.left()}; {e}; {c.said}'
        return 'removed'
    assert len(c.instances)==2 and c.instances[0]['PublicIpAddress']
    there = kinds_of(aws.left())
    assert there['instance']==2, there
    if there!=made: check_gone(aws, session)
    return 'works'

def run_down(aws, session):
    "Remove it; if something is left the message says so, and how to try again"
    said = []
    try: left = down(session, region, 'im', said.append)
    except CloudError as e: left = [e]
    there = aws.left()
    if there: assert left, f'down did not say that it left {there}'
    if left: assert undo in '\n'.join(map(str, said+left)), (said, left)
    if left or there: check_gone(aws, session)
    return 'again' if left else 'works'

def calls(aws, run):
    "The calls of `run`: name, how many of that name came before"
    before = len(aws.log())
    run()
    res,seen = [],Counter()
    for o in aws.log()[before:]:
        res.append((o['action'], seen[o['action']]))
        seen[o['action']] += 1
    return res

def inject(aws, session, start, run):
    "Table of results: kind of fault -> Counter"
    start()
    names = calls(aws, lambda: run(aws, session))
    table = {}
    for kind,(fault,fits) in kinds.items():
        if not (where := [n for n in names if fits(n[0])]): continue
        table[kind] = Counter()
        for action,skip in where:
            start()
            aws.set(faults=[{**fault, 'action': action, 'skip': skip, **({} if 'code' in fault or fault['do']!='error' else {'code': quotas[action]})}])
            try: res = run(aws, session)
            except AssertionError as e: raise AssertionError(f'{kind} at {action} {skip}: {e}') from e
            if not any('fault' in o for o in aws.log()):
                assert action=='DescribeInstances', f'{kind} at {action} {skip} did not happen'
                continue # It had not to wait so long this time
            table[kind] += Counter({'faults': 1, res: 1})
            table[kind]['left over'] += 0 if run==run_create and res=='works' else len(aws.left())
    return table,names

@pytest.fixture
def show(capsys):
    def show(title, table, n):
        columns = sorted({k for row in table.values() for k in row})
        with capsys.disabled():
            print(f'\n{title}, {n} calls\n| fault | '+' | '.join(columns)+' |\n|---|'+'---|'*len(columns))
            for kind,row in table.items(): print(f'| {kind} | '+' | '.join(str(row[c]) for c in columns)+' |')
    return show

def test_faults_of_create(world, show):
    aws,session = world
    table,names = inject(aws, session, aws.reset, run_create)
    show('create', table, len(names))
    assert len(names)==len(set(names))>30 and {'RunInstances','AllocateAddress','AssociateAddress'}<={a for a,_ in names}
    for kind in ('throttled','no answer','answer lost'): assert table[kind]['works']==table[kind]['faults']>15 # Repeated by botocore, or by us
    assert table['unauthorized']['removed'] and table['no capacity']['works']==1

def test_faults_of_down(world, ready, show):
    aws,session = world
    table,names = inject(aws, session, ready, run_down)
    show('down', table, len(names))
    for row in table.values(): assert row['works']==row['faults']>9

@pytest.fixture(scope='module')
def launcher(world):
    p = subprocess.Popen([sys.executable, str(Path(__file__).parent/'aws_launcher.py')], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    def run(**line):
        p.stdin.write(json.dumps(line)+'\n')
        p.stdin.flush()
        return p.stdout.readline().strip()
    yield run
    p.stdin.close()
    p.wait(10)

def killed(world, launcher, start, run, what):
    "Launchers that die after each call; yields where"
    aws,session = world
    start()
    for action,skip in calls(aws, lambda: run(aws, session)):
        start()
        if launcher(what=what, action=action, skip=skip)=='killed': yield action,skip
        else: assert action=='DescribeInstances', f'not killed at {action} {skip}' # It had not to wait so long this time

def test_launcher_killed_in_create(world, launcher, show):
    "After each call: another launcher removes all, or makes the rest, and no more"
    (aws,session),row = world,Counter()
    for action,skip in killed(world, launcher, aws.reset, run_create, 'create'):
        if not looks(action):
            aws.save()
            c = order(session)
            c.create()
            assert kinds_of(aws.left())['instance']==2==len(c.instances), (action, aws.left())
            row['made by another'] += 1
            check_gone(aws, session)
            aws.restore()
        check_gone(aws, session)
        row['removed by another'] += 1
    show('create', {'launcher killed': row}, row['removed by another'])

def test_launcher_killed_in_down(world, launcher, ready, show):
    (aws,session),row = world,Counter()
    for action,skip in killed(world, launcher, ready, run_down, 'down'):
        check_gone(aws, session)
        row['removed by another'] += 1
    show('down', {'launcher killed': row}, row['removed by another'])
