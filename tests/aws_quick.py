"Clusters in tests: a small one of a type with all there is, and no waiting"
from contextlib import ExitStack
from unittest.mock import patch

def order(session, nodes=2, **kwargs):
    "Cluster `im` with several network cards, so with an address of its own; one zone"
    from fastai_fastimagenet.cluster.aws import AWSCluster
    said = []
    c = AWSCluster('im', nodes, **{**dict(zone='us-east-1a', region='us-east-1', ssh_from='203.0.113.7/32', say=said.append), **kwargs})
    c.session,c.said = session,said
    return c

def quick():
    "Look often, and let botocore repeat at once; returns what undoes it"
    from botocore.retries import adaptive, standard
    from fastai_fastimagenet.cluster import network, rent, teardown
    stack = ExitStack()
    for o,name,value in ((teardown,'_poll',.02), (teardown,'_second_look',.15), (teardown,'_stuck',2), (teardown,'_ending',20), (rent,'_poll',.02), (rent,'_pause',.01), (network,'_again',.02),
                         (standard.ExponentialBackoff,'delay_amount',lambda self, context: 0),
                         (adaptive.ClientRateLimiter,'on_receiving_response',lambda self, **kwargs: None)): stack.enter_context(patch.object(o, name, value))
    return stack
