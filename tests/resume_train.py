"`fastimagenet-train`, but the first start of the last process is killed in training step BREAK_AT"
import os, signal
from fastai.vision.all import *
from fastai_fastimagenet.train import main

def _break(self):
    if self.training and self.train_iter==int(os.environ['BREAK_AT']): os.kill(os.getpid(), signal.SIGKILL)

if 'BREAK_AT' in os.environ and os.environ['TORCHELASTIC_RESTART_COUNT']=='0' and rank_distrib()==(num_distrib() or 1)-1:
    defaults.callbacks = [*defaults.callbacks, type('Break', (Callback,), dict(order=80, after_batch=_break))]
if __name__=='__main__': main()
