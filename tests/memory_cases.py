"Two processes with memories of different sizes: prints what each found and trained, as JSON"
import json, sys, warnings
from pathlib import Path
warnings.simplefilter('ignore')
from fastai.vision.all import *
from fastai_fastimagenet.all import *
from fastai_fastimagenet.group import digest, gather

class Limited(nn.Module):
    "A model with memory for `n` images"
    def __init__(self, n):
        super().__init__()
        self.n,self.model = n,nn.Sequential(Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    def forward(self, x):
        if len(x)>self.n: raise torch.OutOfMemoryError('CUDA out of memory')
        return self.model(x)

def learner(n):
    set_seed(0)
    items = [(torch.randn(3,2,2).double(), torch.tensor(i%4)) for i in range(256)]
    dls = DataLoaders.from_dsets(items, items[:8], bs=16, shuffle=False, drop_last=True, num_workers=0, device='cpu')
    return Learner(dls, Limited(n), CrossEntropyLossFlat(), opt_func=partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9), lr=.1)

def fit(n, cbs):
    learn = learner(n)
    with learn.ddp(timeout=.5), learn.no_bar(), learn.no_logging(): learn.fit(2, cbs=cbs)
    return learn

if __name__=='__main__':
    rank = rank_distrib()
    whole,parts = fit(10**6, []),fit(6 if rank else 10**6, [AutoMicroBatch()])
    auto = fit(30+10*rank, [DynamicBatchSize('auto')])
    res = dict(weights=max(float((a-b).abs().max()) for a,b in zip(whole.model.parameters(), parts.model.parameters())), steps=len(auto.recorder.lrs),
               lr=auto.recorder.lrs[0], sum=digest([p.tolist() for p in auto.model.parameters()]))
    res = gather(res)
    if not rank: Path(sys.argv[1]).write_text(json.dumps(res))
