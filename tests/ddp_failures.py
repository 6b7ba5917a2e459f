"Rank 1 does something that must end all processes: `ddp_failures.py WHAT FOLDER`"
import signal, sys, time
from ddp_cases import *

class Misbehave(Callback):
    order = 70
    def __init__(self, what): self.what = what
    def after_batch(self):
        if rank!=1 or not self.training or self.iter!=1: return
        if self.what=='caught, then raise':
            try:
                with self.learn.ddp(compress='zip'): pass
            except ValueError: raise KeyError('rank one is broken')
        if self.what=='raise': raise KeyError('rank one is broken')
        if self.what=='exit': sys.exit('rank one leaves')
        if self.what=='kill': os.kill(os.getpid(), signal.SIGKILL)
        if self.what=='hang': time.sleep(600)
        if self.what=='diverge': raise CancelTrainException
        if self.what=='drift':
            with torch.no_grad(): next(self.learn.model.parameters())[0,0,0,0] += 1e-7

if __name__=='__main__':
    what,folder = sys.argv[1],Path(sys.argv[2])
    files = sorted((folder/'images').glob('*.jpg'))[:40]
    if what=='other files' and rank==1: files = files[::-1]
    n_valid = 9 if what=='fewer' and rank==1 else 10
    block = DataBlock((ImageBlock, CategoryBlock(vocab=list(classes))), get_items=lambda o: files[:30+n_valid], get_y=label,
                      splitter=IndexSplitter(range(30, 30+n_valid)), item_tfms=Resize(32))
    learn = Learner(block.dataloaders(folder, bs=4, num_workers=0), resnet_small(4), CrossEntropyLossFlat(), cbs=Misbehave(what), path=folder)
    print('  the last line that all have said', file=sys.stderr, flush=True)
    with learn.ddp(timeout=.1 if what in ('hang','diverge') else 1): learn.fit(1)
    print('came through')
