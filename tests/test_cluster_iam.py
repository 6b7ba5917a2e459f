"nbs/iam_policy.json allows what is called, and no more"
import json, re
import pytest
pytest.importorskip('moto')
from iam_policy import *
from fastai_fastimagenet.cluster import teardown

def test_policy_is_that_of_the_calls(aws, monkeypatch):
    "It is written anew by `python tests/iam_policy.py`; the calls are all that the code knows"
    for k in ('_poll','_second_look'): monkeypatch.setattr(teardown, k, .1)
    used = life(aws)
    assert policy(used)==json.loads(file.read_text()), 'run python tests/iam_policy.py'
    never = [o for o in in_code() if not o & used]
    assert not never, f'`life` in iam_policy.py does not call {never}'

def test_an_action_that_nobody_decided_on():
    with pytest.raises(ValueError, match='ec2:StopInstances'): policy({'ec2:RunInstances','ec2:StopInstances'})
    assert not_allowed([dict(service='ec2', action='StopInstances'), dict(service='ec2', action='RunInstances')])=={'ec2:StopInstances'}

def test_what_removes_needs_the_tag():
    "But for mount targets and their interfaces, which have none"
    p = json.loads(file.read_text())
    free = {a for s in p['Statement'] for a in s['Action'] if re.search(':(Delete|Terminate|Release|Cancel|Detach|Revoke)', a) and 'ResourceTag' not in json.dumps(s.get('Condition', ''))}
    assert free=={'elasticfilesystem:DeleteMountTarget','ec2:DeleteNetworkInterface'}
    assert not [a for a in allowed(p) if '*' in a]
    assert len(re.sub(r'\s', '', file.read_text()))<6144, 'a managed policy has at most 6144 characters'
