"What machines cost and where they are, asked of moto behind the proxy"
from datetime import datetime, timedelta, timezone
import pytest
from fastai_fastimagenet.machines import profiles
from fastai_fastimagenet.cluster.market import *
from fastai_fastimagenet.cluster.cloud import client

region,zones = 'us-east-1',['us-east-1a','us-east-1b','us-east-1c','us-east-1d']

@pytest.fixture
def session(aws): return aws.session(region)

def machine(session, name='p4d.24xlarge'): return machine_info(client(session, 'ec2', region), name)

@pytest.mark.parametrize('name,gpus,gb,gbit,efa', [('p4d.24xlarge',8,40,400,4), ('p5.48xlarge',8,80,3200,32), ('p6-b300.48xlarge',8,268.6,6400,16), ('g6.xlarge',1,22.4,10,0), ('c5.large',0,0,10,0)])
def test_machines(session, name, gpus, gb, gbit, efa):
    m = machine(session, name)
    assert (m.gpus,m.network_gbit,len(m.efa_cards))==(gpus,gbit,efa) and m.gpu_gb==pytest.approx(gb, abs=.1) and m.grouped and m.arch=='x86_64'

def test_machines_that_cannot_be_rented(session, aws):
    with pytest.raises(ValueError, match='p4d.24xlarge'): machine(session, 'p3.16xlarge')
    assert not aws.log()
    with pytest.raises(ValueError, match='no machine type'): machine(session, 'p9.large')

def test_offers_by_price(session, aws):
    aws.set(spot_prices={'p4d.24xlarge/us-east-1b': 2.47, 'p4d.24xlarge/us-east-1d': 30})
    found = offers(session, 'p4d.24xlarge', region)
    assert [(o.zone[-1],o.market,o.price) for o in found][:2]==[('b','spot',2.47), ('a','spot',7.686)]
    assert [o.price for o in found]==sorted(o.price for o in found) and found[-1].market=='spot' # Dearer than on demand
    assert {o.price for o in found if o.market=='on-demand'}=={21.96} and len(found)==2*len({o.zone for o in found})
    assert {o.market for o in offers(session, 'p4d.24xlarge', region, spot=False)}=={'on-demand'}
    assert {(o.zone,o.market) for o in offers(session, 'p4d.24xlarge', region, spot=True, zone='us-east-1a')}=={('us-east-1a','spot')}

def test_offers_that_are_none(session):
    with pytest.raises(ValueError, match='us-east-1z'): offers(session, 'p4d.24xlarge', region, zone='us-east-1z')
    with pytest.raises(ValueError, match='another region'): offers(session, 'p4d.24xlarge', 'eu-west-3')
    with pytest.raises(ValueError, match='auto'): offers(session, 'p4d.24xlarge', region, spot='no')

def test_prices_that_may_not_be_looked_up(session, aws):
    denied = [dict(do='error', action=a, code='AccessDeniedException') for a in ('GetProducts','DescribeSpotPriceHistory')]
    aws.set(faults=denied)
    found = offers(session, 'p4d.24xlarge', region)
    assert {o.price for o in found}=={profiles['p4d.24xlarge'].usd} and found[0].market=='spot'
    assert all('AccessDenied' in o.source and profiles['p4d.24xlarge'].usd_from in o.source for o in found)
    aws.set(faults=[dict(f) for f in denied])
    assert {o.price for o in offers(session, 'p6-b300.48xlarge', region)}=={142.42}
    aws.set(faults=[dict(f) for f in denied])
    assert all(o.price is None for o in offers(session, 'c5.xlarge', region))

def test_quota(session, aws):
    aws.set(quotas={'L-417A185B': 96*4, 'L-7212CCBC': 96})
    m = machine(session)
    assert set(check_quota(session, region, m, 1, 'auto'))=={'spot','on-demand'}
    assert set(check_quota(session, region, m, 4, 'auto'))=={'on-demand'}
    with pytest.raises(ValueError, match=r'2 x p4d.24xlarge \(spot\) need 192 vCPU, your quota is 96.*L-7212CCBC, or take 1 machines'): check_quota(session, region, m, 2, True)
    with pytest.raises(ValueError, match='(?s)spot.*on-demand'): check_quota(session, region, m, 5, 'auto')
    aws.set(faults=[dict(do='error', code='AccessDeniedException')])
    assert 'could not be looked up: AccessDenied' in check_quota(session, region, m, 5, False)['on-demand']
    aws.set(faults=[])
    assert 'no quota is known' in check_quota(session, region, machine(session, 'inf2.xlarge'), 1, False)['on-demand']

def test_nothing_is_changed(session, aws):
    offers(session, 'p4d.24xlarge', region)
    check_quota(session, region, machine(session), 1, 'auto')
    assert aws.left()==[] and all(a.startswith(('Describe','Get')) for a in aws.actions())
