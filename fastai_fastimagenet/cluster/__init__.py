"Machines for a run: these here, those reached over ssh, those rented from AWS"
from .task import Task, Process, Cluster, HostError, HostDead, ClusterError
from .ssh import SSHCluster
from .local import LocalCluster
from .aws import AWSCluster
from .job import Job
from .torchrun import JobError
from .run import Run
from .board import Board
from .many import run_many
