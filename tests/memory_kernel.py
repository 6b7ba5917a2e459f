"The largest batch under a real limit of memory: prints it, and how training with it went"
import resource, warnings
warnings.simplefilter('ignore')
from fastai.vision.all import *
from fastai_fastimagenet.all import *
from fastai_fastimagenet.memory import largest_batch

torch.set_num_threads(1)
items = [(torch.zeros(3,64,64), torch.tensor(0))]*1024
dls = DataLoaders.from_dsets(items, items[:8], bs=8, shuffle=False, num_workers=0, device='cpu')
learn = Learner(dls, nn.Sequential(nn.Conv2d(3,64,3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), Flatten(), nn.Linear(64,10)), CrossEntropyLossFlat())
with learn.no_bar(), learn.no_logging():
    learn.fit(0)
    used = int(Path('/proc/self/statm').read_text().split()[0])*resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used+4*10**8, resource.RLIM_INFINITY))
    found = largest_batch(learn)
    for dl in dls.loaders: dl.bs = min(4*found, 1024) # Too large: the callback must help
    learn.fit(1, cbs=AutoMicroBatch())
print('found', found, 'trained', len(learn.recorder.losses))
