"A learner with an injected memory limit; as a program in two processes with different limits: prints each one's table and what is left of it, as JSON"
import json, sys, time, warnings
from pathlib import Path
warnings.simplefilter('ignore')
from fastai.vision.all import *
from fastai_fastimagenet.all import *
from fastai_fastimagenet.group import digest, gather

class Limited(nn.Module):
    "A model with memory for `limit` pixels in training, that takes `seconds` for a step whatever its size"
    def __init__(self, model, limit=10**9, seconds=0):
        super().__init__()
        self.model,self.limit,self.seconds = model,limit,seconds

    def forward(self, x):
        if self.training and len(x)*x.shape[-1]*x.shape[-2]>self.limit: raise torch.OutOfMemoryError('CUDA out of memory')
        if self.training: time.sleep(self.seconds)
        return self.model(x)

def small(dls): return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), Flatten(), nn.Linear(8, dls.c))

def learner(path, size=48, bs=16, **kwargs):
    set_seed(0)
    dls = imagenet_dls(path, size, bs, min_scale=.5, workers=0)
    return Learner(dls, Limited(small(dls), **kwargs), CrossEntropyLossFlat(), metrics=[accuracy, F1Score(average='macro')])

if __name__=='__main__':
    learn = learner(sys.argv[1], limit=10*48*48*(1+rank_distrib()))
    rank0_first(noop)
    before = digest([p.tolist() for p in learn.model.parameters()])
    sched = auto_schedule(learn, .5)
    res = gather(dict(table=sched.to_json(), same=before==digest([p.tolist() for p in learn.model.parameters()])))
    with learn.ddp(), learn.no_bar(), learn.no_logging(): learn.fit_phases(sched.scale_epochs(3))
    if not rank_distrib(): Path(sys.argv[2]).write_text(json.dumps(res))
