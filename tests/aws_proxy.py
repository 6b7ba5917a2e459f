"""A moto server behind a proxy that is as difficult as AWS.

`python tests/aws_proxy.py` prints the address to put into AWS_ENDPOINT_URL and that of moto itself. The proxy lives in the process of moto, so
that it reads and corrects moto's state. It adds what moto 5.2.5 lacks: placement groups, ClientToken, capacity, quotas, prices, the images of
SSM, network cards, delays of instances, the order of deletion. POST /__fault__ with JSON says what else goes wrong (`State.settings`), so that
launchers in other processes see it too. GET /__log__ lists the calls, GET /__left__ what moto holds (nothing of the default VPC, nothing
terminated), POST /__reset__ forgets all."""
import base64, copy, http.client, json, os, re, signal, subprocess, sys, tempfile, threading, time, uuid
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, urlencode
from xml.sax.saxutils import escape

image = 'ami-0fa57fa57fa57fa50' # The newest Deep Learning image
images = {image: 'x86_64', 'ami-0a000000000000064': 'arm64'}
_quota_codes = {('p','on-demand'): 'L-417A185B', ('g','on-demand'): 'L-DB2E81BA', ('other','on-demand'): 'L-1216C47A',
                ('p','spot'): 'L-7212CCBC', ('p5','spot'): 'L-C4BD4855', ('g','spot'): 'L-3819A6DF', ('other','spot'): 'L-34B43A08'}
_addresses_code = 'L-0263D0A3'
_on_demand = {'p4d.24xlarge': 21.96, 'p5.48xlarge': 55.04, 'g5.xlarge': 1.006, 'g6.xlarge': .8048, 'g5.48xlarge': 16.29, 'c5.large': .085} # $/h
_ns = 'http://ec2.amazonaws.com/doc/2016-11-15/'

class Refused(Exception):
    "Error reply: code, message, HTTP status"

def _xml(o):
    "dict -> elements, list -> items"
    if isinstance(o, dict): return ''.join(f'<{k}>{_xml(v)}</{k}>' for k,v in o.items())
    if isinstance(o, list): return ''.join(f'<item>{_xml(v)}</item>' for v in o)
    return escape(str(o))

def _cbor(s): return bytes([0x79]) + len(s.encode()).to_bytes(2, 'big') + s.encode()

def _rest_actions():
    "Method and path -> name, of EFS"
    from botocore.loaders import Loader
    ops = Loader().load_service_model('efs', 'service-2')['operations']
    return [(o['http']['method'], re.compile(re.sub(r'\{[^}]*\}', '[^/]+', o['http']['requestUri'])+'$'), n) for n,o in ops.items()]

class Call:
    "One request: service, region, action, parameters"
    def __init__(self, method, path, headers, body):
        self.method,self.path,self.headers,self.body = method,path,headers,body
        found = re.search(r'Credential=[^/]*/\d+/([^/]+)/([^/]+)/', headers.get('Authorization', ''))
        self.region,self.service = found.groups() if found else ('us-east-1','none')
        self.query = dict(parse_qsl(body.decode('utf8','replace'), keep_blank_values=True)) if b'Action=' in body[:4000] and self.service not in ('ssm','pricing') else {}
        target = headers.get('X-Amz-Target', '')
        if target: self.json = json.loads(body or '{}')
        self.action = self.query.get('Action') or target.rpartition('.')[2] or self._by_path()

    def _by_path(self):
        path = self.path.partition('?')[0]
        if '/operation/' in path: return path.rpartition('/')[2]
        return next((n for m,r,n in Call.rest if m==self.method and r.match(path)), f'{self.method} {path}')

    def get(self, key, default=None): return self.query.get(key, default)

    def many(self, prefix)->list:
        "Values of PREFIX.1, PREFIX.2 ..., or dicts of what follows the numbers"
        out = {}
        for k,v in self.query.items():
            found = re.match(rf'{re.escape(prefix)}\.(\d+)(?:\.(.+))?$', k)
            if not found: continue
            n = int(found[1])
            if found[2]: out.setdefault(n, {})[found[2]] = v
            else: out[n] = v
        return [v for _,v in sorted(out.items())]

    def tags(self, kind):
        n = next((i for i,s in enumerate(self.many('TagSpecification'), 1) if s['ResourceType']==kind), None)
        return {t['Key']: t.get('Value','') for t in self.many(f'TagSpecification.{n}.Tag')} if n else {}

    def answer(self, inner):
        body = f'<?xml version="1.0" encoding="UTF-8"?><{self.action}Response xmlns="{_ns}"><requestId>{uuid.uuid4()}</requestId>{_xml(inner)}</{self.action}Response>'
        return 200, {'Content-Type': 'text/xml'}, body.encode()

    def answer_json(self, o): return 200, {'Content-Type': 'application/x-amz-json-1.1'}, json.dumps(o).encode()

    def refusal(self, code, message, status=400):
        if self.query:
            return status, {'Content-Type': 'text/xml'}, (f'<?xml version="1.0" encoding="UTF-8"?><Response><Errors><Error><Code>{code}</Code><Message>{escape(message)}</Message>'
                                                         f'</Error></Errors><RequestID>{uuid.uuid4()}</RequestID></Response>').encode()
        if 'cbor' in self.headers.get('Content-Type', ''):
            return status, {'Content-Type': 'application/cbor', 'smithy-protocol': 'rpc-v2-cbor'}, bytes([0xa2]) + b''.join(map(_cbor, ('__type', code, 'message', message)))
        return status, {'Content-Type': 'application/json', 'x-amzn-ErrorType': code}, json.dumps(dict(__type=code, message=message, ErrorCode=code, Message=message)).encode()

class State:
    settings = dict(
        latency={},     # Action or * -> seconds
        throttle={},    # Action -> [size of the bucket, refill per second]
        capacity={},    # TYPE/ZONE/MARKET, each may be *: machines there are; no limit where nothing is said
        quotas={},      # Code of Service Quotas -> value; 10000 vCPU and 5 addresses where nothing is said
        spot_prices={}, # TYPE/ZONE -> dollars per hour
        hide=0,         # Seconds during which a new instance cannot be seen
        pending=0,      # Seconds until a new instance is running
        stopping=.1,    # Seconds until an instance is terminated; what it uses cannot be deleted before
        faults=[],      # Dicts; setting it restarts `count`, the number of calls. `do`: 'error' (with `code`, `message`, `status`), 'lost' (done, but
                        # no reply), 'hang' (`seconds` without reply), 'kill' or 'kill-after' (SIGKILL to process `pid`), 'empty' (nothing found), 'garbled' (done, but the reply is none). `call`: number, `action`: name,
                        # `skip`: so many of those come before, `times`: 1. Without `call` and `action` all calls are meant
    )
    def __init__(self): self.lock,self.forward = threading.RLock(),None

    def reset(self):
        with self.lock:
            self.forward(Call('POST', '/moto-api/reset', {}, b''))
            vars(self).update({k: type(v)(v) for k,v in self.settings.items()}, count=0, log=[], groups={}, tokens={}, buckets={}, born={}, waiting=[])

    def save(self):
        "Keep what there is, for `restore`"
        self.saved = self._copy(self._everything())

    def restore(self):
        "Everything as it was when it was saved; no faults"
        self.reset()
        (regions,disks),ours = self._copy(self.saved)
        for service,found in (('ec2',regions), ('efs',disks)):
            for region,b in found.items(): self._backends(service)[region] = b
        vars(self).update(ours)

    def _backends(self, service):
        from moto.backends import get_backend
        return get_backend(service)['123456789012']

    def _everything(self): return [dict(self._backends(s)) for s in ('ec2','efs')], dict(groups=self.groups, tokens=self.tokens, waiting=self.waiting)

    def _copy(self, o): return copy.deepcopy(o)

    def configure(self, new):
        unknown = set(new)-set(self.settings)
        if unknown: raise ValueError(f'unknown: {unknown}')
        with self.lock:
            vars(self).update(new)
            if 'faults' in new: self.count = 0
            if 'throttle' in new: self.buckets = {}

    def backend(self, region):
        from moto.backends import get_backend
        return get_backend('ec2')['123456789012'][region]

    # -- one call
    def handle(self, call):
        "Status, headers, body; None if the connection is to be closed without"
        time.sleep(self.latency.get(call.action, self.latency.get('*', 0)))
        with self.lock:
            self.count += 1
            entry = dict(call=self.count, service=call.service, action=call.action, time=time.time())
            self.log.append(entry)
            fault = self.fault(call)
            if fault: entry['fault'] = fault['do']
            before = fault and fault['do'] in ('error','hang','kill')
            if not before: reply = self.act(call)
            elif fault['do']=='error': reply = call.refusal(fault['code'], fault.get('message', 'injected by the test'), fault.get('status', 400))
            else: reply = None
            if fault and fault['do'].startswith('kill'): os.kill(fault['pid'], signal.SIGKILL)
            entry['status'] = reply[0] if reply else 0
            if reply and reply[0]>=400: entry['error'] = re.sub(r'.*(<Code>|"__type": "|__type..)(\w[\w.]*).*', r'\2', reply[2].decode('utf8','replace'), flags=re.S)[:80]
        if fault and fault['do']=='hang': time.sleep(fault['seconds'])
        if fault and fault['do']=='garbled': return reply[0], reply[1], b'<html'
        if fault and fault['do']=='empty': return reply[0], reply[1], re.sub(rb'<(\w+Set)>.*</\1>', rb'<\1/>', reply[2], flags=re.S)
        return None if fault and fault['do']!='error' else reply

    def fault(self, call):
        for f in self.faults:
            if f.get('times', 1)<=0 or f.get('call', self.count)!=self.count or f.get('action', call.action)!=call.action: continue
            key = 'skip' if f.get('skip') else 'times'
            f[key] = f.get(key, 1)-1
            if key=='times': return f

    def act(self, call):
        try:
            self.throttled(call)
            self.tick(call.region)
            ours = getattr(self, call.action, None) if call.action[:1].isupper() else None
            if ours and not (call.get('DryRun')=='true' and call.action!='DescribePlacementGroups'): return ours(call)
            with self.unseen(call.region): return self.forward(call)
        except Refused as e: return call.refusal(*e.args)

    def throttled(self, call):
        if call.action not in self.throttle: return
        (size,rate),now = self.throttle[call.action],time.monotonic()
        left,then = self.buckets.get(call.action, (size,now))
        left = min(size, left+(now-then)*rate)
        self.buckets[call.action] = (left-1 if left>=1 else left, now)
        if left<1: raise Refused('RequestLimitExceeded' if call.service=='ec2' else 'ThrottlingException', 'Request limit exceeded.', 503 if call.service=='ec2' else 400)

    # -- instances
    def tick(self, region):
        "Instances whose time has come are running or terminated"
        from moto.ec2.models.instances import InstanceState
        for item in list(self.waiting):
            due,i,state = item
            if time.monotonic()<due: continue
            self.waiting.remove(item)
            if state=='running' and i._state.name!='pending': continue
            i._state = InstanceState(state, dict(running=16, terminated=48)[state])
            if state=='terminated': self.vanish(i)

    def vanish(self, i):
        "Interfaces go with the instance, and addresses become free"
        b = i.ec2_backend
        gone = [e for e in b.enis.values() if e.instance is i]
        for e in gone: del b.enis[e.id]
        for a in b.addresses:
            if a.instance is i or a.eni in gone: a.instance = a.eni = a.association_id = None
        i.nics[0].public_ip = None # moto wants to describe it

    @contextmanager
    def unseen(self, region):
        "Instances too new to be seen are not there while this lasts"
        if not self.hide:
            yield
            return
        b = self.backend(region)
        young = {k for k,t in self.born.items() if time.monotonic()<t+self.hide}
        kept = dict(b.reservations)
        for k in young: b.reservations.pop(k, None)
        try: yield
        finally: b.reservations = type(b.reservations)({**kept, **b.reservations})

    def RunInstances(self, call):
        b,token = self.backend(call.region),call.get('ClientToken', '')
        if len(token)>64: raise Refused('InvalidParameterValue', 'The client token is longer than 64 characters')
        same = {k: v for k,v in call.query.items() if k!='ClientToken'}
        if token in self.tokens:
            first,reply = self.tokens[token]
            if first!=same: raise Refused('IdempotentParameterMismatch', f'The client token {token} has been used with different parameters')
            return reply
        nics = call.many('NetworkInterface')
        self.check_run(call, b, nics)
        for n in range(1, len(nics)+1): call.query[f'NetworkInterface.{n}.DeviceIndex'] = str(n-1) # moto keeps one interface per index
        call.body = urlencode(call.query).encode()
        known = set(b.reservations)
        reply = self.forward(call)
        if reply[0]!=200: return reply
        [r] = [r for k,r in b.reservations.items() if k not in known]
        self.born[r.id] = time.monotonic()
        self.take_capacity(call, len(r.instances))
        for i in r.instances: self.finish(call, i, nics)
        if self.pending: reply = reply[0],reply[1],reply[2].replace(b'<code>16</code><name>running</name>', b'<code>0</code><name>pending</name>')
        if token: self.tokens[token] = same,reply
        return reply

    def CreateVpcEndpoint(self, call):
        key = call.region,call.get('ClientToken', uuid.uuid4().hex)
        if key not in self.tokens: self.tokens[key] = self.forward(call)
        return self.tokens[key]

    def check_run(self, call, b, nics):
        from moto.ec2.models.instance_types import INSTANCE_TYPES
        machine,n = call.get('InstanceType'),int(call.get('MinCount'))
        if n!=int(call.get('MaxCount')): raise Refused('InvalidParameterValue', 'the proxy knows MinCount = MaxCount only')
        if machine not in INSTANCE_TYPES: raise Refused('InvalidParameterValue', f"Invalid value '{machine}' for InstanceType.")
        if call.get('ImageId') not in images: raise Refused('InvalidAMIID.NotFound', f"The image id '[{call.get('ImageId')}]' does not exist")
        key = call.get('KeyName')
        if key and key not in b.key_pairs: raise Refused('InvalidKeyPair.NotFound', f"The key pair '{key}' does not exist")
        group = call.get('Placement.GroupName')
        if group and (call.region,group) not in self.groups: raise Refused('InvalidPlacementGroup.Unknown', f'The Placement Group {group!r} is unknown.')
        if len(base64.b64decode(call.get('UserData', '')))>16384: raise Refused('InvalidParameterValue', 'User data is limited to 16384 bytes')
        if len(nics)>1 and any(o.get('AssociatePublicIpAddress')=='true' for o in nics):
            raise Refused('InvalidParameterCombination', 'The associatePublicIPAddress parameter cannot be specified when launching with multiple network interfaces.')
        cards = INSTANCE_TYPES[machine].get('NetworkInfo', {}).get('MaximumNetworkCards', 1)
        if any(int(o.get('NetworkCardIndex', 0))>=cards for o in nics): raise Refused('InvalidParameterValue', f'{machine} has {cards} network cards')
        efa = [o for o in nics if o.get('InterfaceType','').startswith('efa')]
        if len(efa)>INSTANCE_TYPES[machine].get('NetworkInfo', {}).get('EfaInfo', {}).get('MaximumEfaInterfaces', 0):
            raise Refused('AttachmentLimitExceeded', f'{machine} has not so many EFA interfaces')
        if self.market(call)!='spot' and any(s['ResourceType']=='spot-instances-request' for s in call.many('TagSpecification')):
            raise Refused('InvalidParameterValue', 'spot-instances-request tags need a spot request')
        self.check_quota(call, b, n)
        key = self.capacity_key(call, b)
        if key and self.capacity[key]<n:
            raise Refused('InsufficientInstanceCapacity', f'We currently do not have sufficient {machine} capacity in the Availability Zone you requested ({self.zone(call, b)}). '
                          'Our system will be working on provisioning additional capacity.', 500)

    def market(self, call): return 'spot' if call.get('InstanceMarketOptions.MarketType')=='spot' else 'on-demand'

    def zone(self, call, b):
        s = call.get('SubnetId') or call.get('NetworkInterface.1.SubnetId')
        return b.get_subnet(s).availability_zone if s else call.get('Placement.AvailabilityZone', '*')

    def capacity_key(self, call, b):
        t,z,m = call.get('InstanceType'),self.zone(call, b),self.market(call)
        return next((k for k in (f'{t}/{z}/{m}', f'{t}/{z}/*', f'{t}/*/{m}', f'{t}/*/*', f'*/{z}/{m}', f'*/*/{m}', '*/*/*') if k in self.capacity), None)

    def take_capacity(self, call, n):
        key = self.capacity_key(call, self.backend(call.region))
        if key: self.capacity[key] -= n

    def check_quota(self, call, b, n):
        from moto.ec2.models.instance_types import INSTANCE_TYPES
        code = _quota_code(call.get('InstanceType'), self.market(call))
        cpus = lambda t: INSTANCE_TYPES[t]['VCpuInfo']['DefaultVCpus']
        used = sum(cpus(i.instance_type) for i in b.all_instances() if i._state.name!='terminated' and _quota_code(i.instance_type, i.lifecycle or 'on-demand')==code)
        if used+n*cpus(call.get('InstanceType'))<=self.quota(code): return
        if self.market(call)=='spot': raise Refused('MaxSpotInstanceCountExceeded', 'Max spot instance count exceeded')
        raise Refused('VcpuLimitExceeded', f'You have requested more vCPU capacity than your current vCPU limit of {self.quota(code)} allows for the instance bucket '
                      'that the specified instance type belongs to.')

    def finish(self, call, i, nics):
        "What moto forgets of a new instance"
        from moto.ec2.models.instances import InstanceState
        i._placement.group_name = call.get('Placement.GroupName', '')
        for n,o in enumerate(nics):
            e = i.nics[n]
            e.interface_type,e.card,e.device_index = o.get('InterfaceType', 'interface'),int(o.get('NetworkCardIndex', 0)),int(o.get('DeviceIndex', 0))
        for e in i.nics.values(): e.add_tags(call.tags('network-interface'))
        if self.pending:
            i._state = InstanceState('pending', 0)
            self.waiting.append((time.monotonic()+self.pending, i, 'running'))

    def TerminateInstances(self, call):
        from moto.ec2.models.instances import InstanceState
        b,ids = self.backend(call.region),call.many('InstanceId')
        with self.unseen(call.region):
            asked = {i: i._state.name for i in b.all_instances() if i.id in ids and i._state.name!='terminated'}
            kept = {k: (e,e.public_ip) for k,e in b.enis.items() if e.instance in asked}
            reply = self.forward(call)
        if reply[0]!=200: return reply
        for i,before in asked.items():
            i._state = InstanceState('shutting-down', 32)
            if before!='shutting-down': self.waiting.append((time.monotonic()+self.stopping, i, 'terminated'))
        for k,(e,ip) in kept.items(): # Until the instance is terminated it has them
            b.enis[k],e.public_ip = e,ip
        self.tick(call.region)
        return reply

    # -- placement groups
    def _group_xml(self, name, g):
        return dict(groupName=name, groupId=g['id'], strategy=g['strategy'], state='available', groupArn=f'arn:aws:ec2:{g["region"]}:123456789012:placement-group/{name}',
                    tagSet=[dict(key=k, value=v) for k,v in g['tags'].items()])

    def CreatePlacementGroup(self, call):
        key = call.region,call.get('GroupName')
        if key in self.groups: raise Refused('InvalidPlacementGroup.Duplicate', f"The placement group '{key[1]}' already exists.")
        self.groups[key] = dict(id='pg-'+uuid.uuid4().hex[:17], strategy=call.get('Strategy', 'cluster'), tags=call.tags('placement-group'), region=call.region)
        return call.answer(dict(placementGroup=self._group_xml(key[1], self.groups[key])))

    def DescribePlacementGroups(self, call):
        here,names,ids = {n: g for (r,n),g in self.groups.items() if r==call.region},call.many('GroupName'),call.many('GroupId')
        unknown = [n for n in names if n not in here] + [i for i in ids if i not in {g['id'] for g in here.values()}]
        if unknown: raise Refused('InvalidPlacementGroup.Unknown', f"The Placement Group '{unknown[0]}' is unknown.")
        found = {n: g for n,g in here.items() if (not names or n in names) and (not ids or g['id'] in ids)}
        for n,f in enumerate(call.many('Filter'), 1):
            values,what = call.many(f'Filter.{n}.Value'),f['Name']
            if what.startswith('tag:'): found = {k: g for k,g in found.items() if g['tags'].get(what[4:]) in values}
            elif what=='tag-key': found = {k: g for k,g in found.items() if set(values)&set(g['tags'])}
            elif what=='group-name': found = {k: g for k,g in found.items() if k in values}
            elif what!='state': raise Refused('InvalidParameterValue', f"The filter '{what}' is invalid")
        return call.answer(dict(placementGroupSet=[self._group_xml(k, g) for k,g in found.items()]))

    def DeletePlacementGroup(self, call):
        key = call.region,call.get('GroupName')
        if key not in self.groups: raise Refused('InvalidPlacementGroup.Unknown', f"The Placement Group '{key[1]}' is unknown.")
        if any(i._placement.group_name==key[1] and i._state.name!='terminated' for i in self.backend(call.region).all_instances()):
            raise Refused('InvalidPlacementGroup.InUse', f"The placement group '{key[1]}' is in use and may not be deleted.")
        del self.groups[key]
        return call.answer({'return': 'true'})

    # -- order of deletion
    def refuse_if(self, used, what):
        if used: raise Refused('DependencyViolation', f'{what} has dependencies and cannot be deleted: {used[0]}')

    def DeleteSecurityGroup(self, call):
        b,g = self.backend(call.region),call.get('GroupId')
        self.refuse_if([e.id for e in b.enis.values() if any(g==o.id for o in e.group_set)], f'resource {g}')
        return self.forward(call)

    def DeleteSubnet(self, call):
        s = call.get('SubnetId')
        self.refuse_if([e.id for e in self.backend(call.region).enis.values() if e.subnet.id==s], f"The subnet '{s}'")
        return self.forward(call)

    def DetachInternetGateway(self, call):
        v = call.get('VpcId')
        self.refuse_if([e.public_ip for e in self.backend(call.region).enis.values() if e.subnet.vpc_id==v and e.public_ip], f'Network {v}')
        return self.forward(call)

    def DeleteVpc(self, call):
        b,v = self.backend(call.region),call.get('VpcId')
        endpoints = [e.id for e in b.vpc_end_points.values() if e.vpc_id==v and e.state!='deleted']
        groups = [g.id for g in b.groups.get(v, {}).values() if g.name!='default']
        self.refuse_if([g.id for g in b.internet_gateways.values() if g.vpc and g.vpc.id==v]+endpoints+groups, f"The vpc '{v}'")
        return self.forward(call)

    def DeleteNetworkInterface(self, call):
        e = self.backend(call.region).enis.get(call.get('NetworkInterfaceId'))
        if e and e.instance and e.instance._state.name!='terminated': raise Refused('InvalidNetworkInterface.InUse', f"Network interface '{e.id}' is currently in use.")
        return self.forward(call)

    def ReleaseAddress(self, call):
        a = call.get('AllocationId')
        if any(o.allocation_id==a and (o.instance or o.eni) for o in self.backend(call.region).addresses):
            raise Refused('InvalidIPAddress.InUse', f'The address with allocation id [{a}] is in use and may not be released.')
        return self.forward(call)

    def AllocateAddress(self, call):
        if len(self.backend(call.region).addresses)>=self.quota(_addresses_code):
            raise Refused('AddressLimitExceeded', 'The maximum number of addresses has been reached.')
        return self.forward(call)

    # -- quotas, prices, images
    def quota(self, code): return self.quotas.get(code, 5 if code==_addresses_code else 10000)

    def _quota_json(self, code): return dict(ServiceCode='vpc' if code==_addresses_code else 'ec2', QuotaCode=code, QuotaName=code, Value=self.quota(code), Unit='None', Adjustable=True)

    def GetServiceQuota(self, call):
        if call.json['QuotaCode'] not in (_addresses_code, *_quota_codes.values()): raise Refused('NoSuchResourceException', 'The request failed because the specified service does not exist.')
        return call.answer_json(dict(Quota=self._quota_json(call.json['QuotaCode'])))

    def ListServiceQuotas(self, call): return call.answer_json(dict(Quotas=[self._quota_json(c) for c in _quota_codes.values()]))

    def DescribeSpotPriceHistory(self, call):
        from moto.ec2.models.instances import INSTANCE_TYPE_OFFERINGS
        asked,now = call.many('InstanceType'),time.strftime('%Y-%m-%dT%H:%M:%S.000Z', time.gmtime())
        offers = [(o['InstanceType'],o['Location']) for o in INSTANCE_TYPE_OFFERINGS['availability-zone'].get(call.region, []) if o['InstanceType'] in asked]
        price = lambda t,z: self.spot_prices.get(f'{t}/{z}', _on_demand.get(t, 10)*(.35+.05*(ord(z[-1])-97)))
        return call.answer(dict(spotPriceHistorySet=[dict(instanceType=t, productDescription='Linux/UNIX', spotPrice=f'{price(t,z):.6f}', timestamp=now, availabilityZone=z)
                                                     for t,z in sorted(offers)], nextToken=''))

    def GetProducts(self, call):
        asked = {f['Field']: f['Value'] for f in call.json.get('Filters', [])}
        machine = asked.get('instanceType')
        if machine not in _on_demand: return call.answer_json(dict(FormatVersion='aws_v1', PriceList=[]))
        term = {'A.B': dict(priceDimensions={'A.B.C': dict(unit='Hrs', pricePerUnit=dict(USD=f'{_on_demand[machine]:.10f}'))})}
        return call.answer_json(dict(FormatVersion='aws_v1', PriceList=[json.dumps(dict(product=dict(attributes=asked), terms=dict(OnDemand=term)))]))

    def GetParameter(self, call):
        name = call.json['Name']
        if not name.startswith('/aws/service/deeplearning/ami/x86_64/'): return self.forward(call)
        return call.answer_json(dict(Parameter=dict(Name=name, Type='String', Value=image, Version=7, DataType='text')))

    # -- what there is
    def left(self):
        from moto.backends import get_backend
        self.tick(None)
        out = [f'placement group {r} {n}' for r,n in self.groups]
        for region,b in get_backend('ec2')['123456789012'].items():
            default = {v.id for v in b.vpcs.values() if v.is_default}
            have = {'instance': [i.id for i in b.all_instances() if i._state.name!='terminated'],
                    'volume': list(b.volumes), 'interface': list(b.enis), 'address': [a.allocation_id for a in b.addresses], 'key pair': list(b.key_pairs),
                    'vpc': set(b.vpcs)-default, 'subnet': [s.id for z in b.subnets.values() for s in z.values() if s.vpc_id not in default],
                    'gateway': [g.id for g in b.internet_gateways.values() if not (g.vpc and g.vpc.id in default)],
                    'endpoint': [e.id for e in b.vpc_end_points.values() if e.state!='deleted'],
                    'group': [g.id for gs in b.groups.values() for g in gs.values() if g.name!='default'],
                    'template': list(b.launch_templates), 'fleet': [f.id for f in b.fleets.values() if f.state=='active'], 'spot request': [r.id for r in b.spot_instance_requests.values() if r.state in ('open','active')]}
            out += [f'{k} {region} {i}' for k,ids in have.items() for i in ids]
        for region,b in get_backend('efs')['123456789012'].items():
            out += [f'{k} {region} {i}' for k,ids in (('file system',b.file_systems_by_id), ('mount target',b.mount_targets_by_id)) for i in ids]
        return sorted(out)

def _quota_code(machine, market):
    family = re.match('[a-z]+', machine)[0]
    kind = 'g' if family in ('g','gr','vt') else family if family=='p' else 'other'
    if kind=='p' and market=='spot' and re.match('p[5-9]', machine): kind = 'p5'
    return _quota_codes[kind,market]

class Handler(BaseHTTPRequestHandler):
    protocol_version,disable_nagle_algorithm = 'HTTP/1.1',True
    def log_message(self, *args): pass

    def send(self, status, headers, body):
        self.send_response(status)
        for k,v in {**headers, 'Content-Length': str(len(body))}.items(): self.send_header(k, v)
        self.end_headers()
        self.wfile.write(body)

    def do(self):
        state,body = self.server.state,self.rfile.read(int(self.headers.get('Content-Length') or 0))
        if self.path.startswith('/__'):
            with state.lock:
                out = {'/__log__': lambda: state.log, '/__left__': state.left, '/__reset__': state.reset, '/__save__': state.save, '/__restore__': state.restore,
                       '/__fault__': lambda: state.configure(json.loads(body))}[self.path]()
            return self.send(200, {'Content-Type': 'application/json'}, json.dumps(out).encode())
        reply = state.handle(Call(self.command, self.path, dict(self.headers), body))
        try:
            if reply: return self.send(*reply)
        except OSError: pass # The client had no more patience
        self.close_connection = True
    do_GET = do_POST = do_PUT = do_DELETE = do

class Server(ThreadingHTTPServer):
    daemon_threads,request_queue_size = True,256
    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], ConnectionError): super().handle_error(request, client_address) # A launcher was killed

def serve(port=0):
    "Start moto and the proxy; address of both"
    Call.rest = _rest_actions()
    ami = lambda i,arch: dict(ami_id=i, name=f'Deep Learning OSS Nvidia Driver AMI GPU PyTorch ({arch})', state='available', public=True, owner_id='898082745236', sriov='simple',
                              image_location='amazon/dlami', root_device_type='ebs', root_device_name='/dev/sda1', description='test', image_type='machine', platform=None,
                              architecture=arch, virtualization_type='hvm', hypervisor='xen')
    with tempfile.NamedTemporaryFile('w', suffix='.json') as f:
        json.dump([ami(*o) for o in images.items()], f)
        f.flush()
        os.environ['MOTO_AMIS_PATH'] = f.name # Read when moto is imported: no other images, which would take seconds
        import logging
        logging.getLogger('werkzeug').setLevel(logging.ERROR)
        import moto.ec2.models
    from moto.server import ThreadedMotoServer
    moto = ThreadedMotoServer('127.0.0.1', 0, verbose=False)
    moto.start()
    host,state = moto.get_host_and_port(),State()
    def forward(call):
        c = http.client.HTTPConnection(*host, timeout=60)
        try:
            c.request(call.method, call.path, call.body, {k: v for k,v in call.headers.items() if k.lower() not in ('connection','content-length','host')})
            r = c.getresponse()
            return r.status, {k: v for k,v in r.getheaders() if k.lower() in ('content-type','x-amzn-errortype','smithy-protocol')}, r.read()
        finally: c.close()
    state.forward = forward
    state.reset()
    server = Server(('127.0.0.1', port), Handler)
    server.state = state
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f'http://127.0.0.1:{server.server_address[1]}', f'http://{host[0]}:{host[1]}'

class Aws:
    "The proxy in a process of its own; `close` ends it"
    def __init__(self):
        self.process = subprocess.Popen([sys.executable, __file__, '--watch'], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        line = self.process.stdout.readline()
        if not line: raise RuntimeError('the test server did not start')
        self.url,self.moto = line.split()
        self.env = dict(AWS_ENDPOINT_URL=self.url, AWS_ACCESS_KEY_ID='test', AWS_SECRET_ACCESS_KEY='test', AWS_DEFAULT_REGION='us-east-1',
                        AWS_EC2_METADATA_DISABLED='true', AWS_CONFIG_FILE=os.devnull, AWS_SHARED_CREDENTIALS_FILE=os.devnull)

    def ask(self, method, path, data=None):
        c = http.client.HTTPConnection(self.url.removeprefix('http://'), timeout=60)
        try:
            c.request(method, path, None if data is None else json.dumps(data))
            return json.loads(c.getresponse().read())
        finally: c.close()

    def reset(self): self.ask('POST', '/__reset__')
    def save(self): self.ask('POST', '/__save__')
    def restore(self): self.ask('POST', '/__restore__')
    def set(self, **settings): self.ask('POST', '/__fault__', settings) # Those of `State.settings`
    def log(self)->list: return self.ask('GET', '/__log__')
    def actions(self)->Counter: return Counter(o['action'] for o in self.log())
    def left(self)->list: return self.ask('GET', '/__left__')

    def session(self, region='us-east-1'):
        import boto3
        return boto3.Session('test', 'test', region_name=region)

    def close(self):
        self.process.stdin.close()
        self.process.wait(20)

if __name__=='__main__':
    print(*serve(), flush=True)
    if sys.argv[1:]==['--watch']: sys.stdin.read() # Ends with the process that started it
    else: signal.pause()
