"""How long a checkpoint stops training: python benchmarks/checkpoint.py

ResNet-50 with SGD and momentum (weights and momentum together 204 MB) on tiny pictures, so that memory is what counts. A checkpoint is asked for
after each step by SIGUSR1, as Slurm does. While the file is written training goes on; it stops for a copy in memory, and when the file before is not
written yet. Beside it, in the same run: the time of one step, of one copy of that many bytes, and of `torch.save` to the same disk.
Figures are medians of wall times, in milliseconds."""
import os
os.environ['OMP_NUM_THREADS'] = '1'
import argparse, signal, statistics, tempfile, time, warnings
warnings.simplefilter('ignore')
import torchvision
from fastai.vision.all import *
from fastai_fastimagenet.all import *
from setting import setting_line

class Ask(Callback):
    "Ask for a checkpoint every `every` steps, note how long each step and each checkpoint took"
    order = 70
    def __init__(self, every): self.gap = every
    def before_fit(self): self.steps,self.saves,self.n,self.before = [],[],0,0.
    def before_batch(self): self.began = time.perf_counter()
    def after_batch(self):
        if not self.training: return
        self.steps.append(time.perf_counter()-self.began)
        stopped = self.learn.checkpoint.stopped
        if stopped>self.before: self.saves.append(stopped-self.before)
        self.before = stopped
        self.n += 1
        if self.n%self.gap==0: os.kill(os.getpid(), signal.SIGUSR1)

def timed(f):
    began = time.perf_counter()
    f()
    return time.perf_counter()-began

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--saves', type=int, default=15)
    p.add_argument('--every', type=int, default=8, help='steps between two checkpoints')
    args = p.parse_args()
    items = [(TensorImage(torch.randn(3,32,32)), torch.tensor(i%10)) for i in range(2*args.every*(args.saves+1))]
    dls = DataLoaders(TfmdDL(items, bs=2, drop_last=True, num_workers=0), TfmdDL(items[:2], bs=2, num_workers=0))
    learn = Learner(dls, torchvision.models.resnet50(num_classes=10), nn.CrossEntropyLoss(), opt_func=partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9))
    ask = Ask(args.every)
    with tempfile.TemporaryDirectory() as folder:
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3, cbs=[Checkpoint(folder, minutes=60), ask])
        tensors = [p.detach() for p in learn.model.parameters()]*2
        copies,writes = [],[]
        for i in range(args.saves):
            copies.append(timed(lambda: [t.clone() for t in tensors]))
            writes.append(timed(lambda: torch.save([t.clone() for t in tensors], f'{folder}/plain')))
    step,save,copy,write = [1000*statistics.median(o) for o in (ask.steps, ask.saves, copies, writes)]
    print(f'step {step:.0f} ms, checkpoint stops training for {save:.0f} ms ({1000*max(ask.saves):.0f} at most of {len(ask.saves)}), plain copy {copy:.0f} ms, torch.save {write:.0f} ms: '
          f'{save/copy:.1f} copies, {save/write:.2f} of torch.save, {save/step:.1f} steps; {setting_line()}')
