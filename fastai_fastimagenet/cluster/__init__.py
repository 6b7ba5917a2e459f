"Machines for a run: these here, those reached over ssh, those rented from AWS"
from importlib import import_module

_where = dict(Task='task', Process='task', Cluster='task', HostError='task', HostDead='task', ClusterError='task', SSHCluster='ssh', LocalCluster='local',
              AWSCluster='aws', Job='job', JobError='torchrun', Run='run', Board='board', run_many='many')
__all__ = list(_where)

def __getattr__(name):
    "Modules are loaded when they are needed first: the command line has no time to wait for all"
    if name not in _where: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    for m in ('run','board'): import_module(f'{__name__}.{m}') # They teach `Cluster` to run jobs and to show curves
    return getattr(import_module(f'{__name__}.{_where[name]}'), name)
