"Bytes that this machine sends per training step, counted at its interface: `ddp_bytes.py OUT`"
import json, sys
from pathlib import Path
from fastai.vision.all import *
from fastai_fastimagenet.distributed import *

def sent():
    "Bytes that eth0 has sent"
    line = first(l for l in Path('/proc/net/dev').read_text().splitlines() if l.strip().startswith('eth0:'))
    return int(line.split(':')[1].split()[8])

class Count(Callback):
    order = 70
    def after_batch(self):
        if not self.training: return
        if self.iter==0: self.start = sent()
        self.per_step = (sent()-self.start)/max(1, self.iter)

model = nn.Sequential(nn.Linear(100,2000), nn.ReLU(), nn.Linear(2000,1000), nn.ReLU(), nn.Linear(1000,1))
dls = DataLoaders(TfmdDL([(torch.rand(100),torch.rand(1)) for _ in range(84)], bs=2, num_workers=0, shuffle=True, drop_last=True),
                  TfmdDL([(torch.rand(100),torch.rand(1))]*2, bs=2, num_workers=0))
res = dict(params=sum(p.numel() for p in model.parameters()))
for name in ('fp32','fp16','bf16'):
    learn,count = Learner(dls, model, nn.MSELoss(), lr=.01),Count()
    with learn.ddp(compress=None if name=='fp32' else name, timeout=1), learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=count)
    res[name] = count.per_step
if not rank_distrib(): Path(sys.argv[1]).write_text(json.dumps(res))
