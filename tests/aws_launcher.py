"""A launcher that is killed: each line on standard input, a JSON dict, is done by a process of its own, which dies at once after the call it
says. It answers with 'killed' or 'ended'. The processes are forks, as importing boto3 anew takes longer than making a cluster"""
import json, os, signal, sys
from aws_proxy import Aws
from aws_quick import order, quick

def do(server, session, what, **call):
    server.set(faults=[dict(call, do='kill-after', pid=os.getpid())])
    c = order(session)
    c.create() if what=='create' else c.down()

if __name__=='__main__':
    import boto3
    quick()
    server = Aws.__new__(Aws)
    server.url = os.environ['AWS_ENDPOINT_URL']
    session = boto3.Session(region_name='us-east-1')
    for s in ('ec2','efs','ssm','pricing','service-quotas'): session.client(s) # Reads their descriptions, for all forks
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            try: do(server, session, **json.loads(line))
            finally: os._exit(0)
        _,status = os.waitpid(pid, 0)
        print('killed' if os.WIFSIGNALED(status) and os.WTERMSIG(status)==signal.SIGKILL else 'ended', flush=True)
