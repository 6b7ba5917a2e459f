"The largest batch that fits, and steps that run out of memory"
import json, random, re, sys
import pytest, torch
from torch import nn
import math
from functools import partial
from fastai.vision.all import Callback, DataLoaders, GradientAccumulation, Learner, MSELossFlat, OptimWrapper, set_seed
from fastai_fastimagenet.all import *
from fastai_fastimagenet import memory
from procs import here, launcher, run

class Limited(nn.Module):
    "A model with memory for `n` images, twice as many in evaluation"
    def __init__(self, n, bn=False): super().__init__(); self.n,self.model = n,nn.Sequential(nn.Linear(4,4), *[nn.BatchNorm1d(4)]*bn, nn.Linear(4,1))
    def forward(self, x):
        if len(x)>self.n*(1 if self.training else 2): raise torch.OutOfMemoryError('CUDA out of memory')
        return self.model(x)

class BackwardLimit(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, n): ctx.n = n; return x.clone()
    @staticmethod
    def backward(ctx, g):
        if len(g)>ctx.n: raise torch.OutOfMemoryError('CUDA out of memory')
        return g,None

class InBackward(Limited):
    def forward(self, x): return self.model[-1](BackwardLimit.apply(self.model[0](x), self.n))

def fit(model, *cbs, n=32, bs=8, epochs=2, **kwargs):
    set_seed(0)
    items = [(torch.randn(4), torch.randn(1)) for _ in range(n)]
    dls = DataLoaders.from_dsets(items, items[:8], bs=bs, shuffle=False, drop_last=True, num_workers=0, device='cpu')
    torch.manual_seed(1)
    for m in model.modules():
        if isinstance(m, nn.Linear): m.reset_parameters()
    learn = Learner(dls, model, MSELossFlat(), lr=.1, opt_func=partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9), **kwargs)
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, cbs=cbs)
    return learn

def test_largest_in_random_cases():
    rng = random.Random(1)
    for _ in range(200):
        most = rng.choice([1,2,7,100,1024])
        limit,holes,tried = rng.randrange(most+1),{rng.randrange(most+1) for _ in range(rng.choice([0,3,most//2]))},[]
        def fits(n):
            tried.append(n)
            return n<=limit and n not in holes
        n = memory.largest(fits, most)
        assert len(tried)<=math.log2(most)+2 and (n==0 or n<=limit and n not in holes)
        if not holes: assert n==limit

def test_nothing_is_left_of_trials():
    learn = fit(Limited(10**6))
    before = [t.clone() for t in learn.model.state_dict().values()],[s['momentum_buffer'].clone() for s in learn.opt.opt.state.values()],torch.get_rng_state()
    learn.model.n = 20
    assert memory.largest_batch(learn)==20 and memory.largest_batch(learn, 9)==9
    after = list(learn.model.state_dict().values()),list(learn.opt.opt.state.values()),torch.get_rng_state()
    assert all(a.equal(b) for a,b in zip(before[0], after[0])) and before[2].equal(after[2])
    assert all(a.equal(b['momentum_buffer']) for a,b in zip(before[1], after[1]))
    learn.model.n = 0
    with pytest.raises(ValueError, match='Not even one image'): memory.largest_batch(learn)

def test_other_errors_are_not_swallowed():
    class Wrong(nn.Linear):
        def forward(self, x): raise RuntimeError('shapes cannot be multiplied')
    with pytest.raises(RuntimeError, match='shapes'): fit(Wrong(4,1), AutoMicroBatch())
    with pytest.raises(RuntimeError, match='shapes'): memory.largest_batch(fit(Wrong(4,1), epochs=0))

@pytest.mark.parametrize('model', [Limited,InBackward])
@pytest.mark.parametrize('half', [False,True])
def test_split_steps_are_the_same(model, half, capsys):
    cbs = [BF16()] if half else []
    whole,parts = fit(model(8), *cbs),fit(model(3), AutoMicroBatch(), *cbs)
    for a,b in zip(whole.model.parameters(), parts.model.parameters()): torch.testing.assert_close(a, b, atol=2e-2 if half else 1e-6, rtol=0)
    assert len(parts.recorder.losses)==8 and capsys.readouterr().out.count('Out of memory')==1+(model is Limited) # Evaluation too
    assert not {'forward','_do_one_batch'} & (vars(parts.model).keys()|vars(parts).keys())

def test_an_averaged_model_is_split_too(capsys):
    "Evaluation with a model that is not the one in training"
    ema = WeightEMA()
    whole,parts = fit(Limited(8), WeightEMA()),fit(Limited(3), ema, AutoMicroBatch())
    assert whole.recorder.values[-1][1]==pytest.approx(parts.recorder.values[-1][1], rel=1e-5)
    assert capsys.readouterr().out.count('Out of memory')==2
    assert not any('forward' in vars(m) for m in (parts.model,ema.average.module))

def test_batch_norm_counts_each_part_once():
    learn = fit(Limited(3, True), AutoMicroBatch(), epochs=1)
    assert learn.model.model[1].num_batches_tracked==4*4 and learn.model.model[1].momentum==.1 # 8 images are 4 parts of 2

def test_several_inputs():
    class Two(Limited):
        def forward(self, a, b): return super().forward(a)+b
    items = [(torch.randn(4), torch.randn(1), torch.randn(1)) for _ in range(16)]
    dls = DataLoaders.from_dsets(items, [], bs=8, num_workers=0, device='cpu')
    dls.n_inp = 2
    learn = Learner(dls, Two(3), MSELossFlat())
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=[AutoMicroBatch(), LiveView()])
    assert len(learn.recorder.losses)==2 and memory.largest_batch(learn)==3

def test_methods_of_the_instance_come_back():
    model = Limited(3)
    mine = model.forward = model.forward
    learn = fit(model, AutoMicroBatch())
    assert vars(model)['forward'] is mine and '_do_one_batch' not in vars(learn)

def test_what_cannot_be_split():
    with pytest.raises(ValueError, match='even one by one'): fit(Limited(0), AutoMicroBatch())
    with pytest.raises(RuntimeError, match='gradient accumulation'): fit(InBackward(3), AutoMicroBatch(), GradientAccumulation(16))

def test_the_batch_of_data_without_a_size(capsys):
    fit(Limited(6), DynamicBatchSize('auto'))
    assert 'Largest batch: 6 images per process' in capsys.readouterr().out

class Break(Callback):
    def after_batch(self):
        if self.learn.train_iter==5: raise RuntimeError('broken on purpose')

def test_a_resumed_run_keeps_the_batch_it_found(tmp_path):
    with pytest.raises(RuntimeError, match='on purpose'): fit(Limited(6), DynamicBatchSize('auto'), Checkpoint(tmp_path, minutes=1e-9), Break(), epochs=2)
    model,sizes = Limited(6),[]
    model.register_forward_pre_hook(lambda m, x: sizes.append((len(x[0]), m.training)))
    learn = fit(model, DynamicBatchSize('auto'), Checkpoint(tmp_path, resume=True), epochs=2)
    whole = fit(Limited(6), DynamicBatchSize('auto'), Checkpoint(tmp_path/'2'), epochs=2)
    assert [float(o) for o in learn.recorder.losses]==[float(o) for o in whole.recorder.losses]
    assert all(a.equal(b) for a,b in zip(learn.model.parameters(), whole.model.parameters()))

@pytest.mark.skipif(sys.platform!='linux', reason='Memory is limited by the kernel')
def test_memory_of_the_kernel():
    "Real allocations that fail"
    out = run(sys.executable, here/'memory_kernel.py').stdout
    assert 8<int(re.search(r'found (\d+)', out)[1])<1024 and 'are computed in' in out and re.search(r'trained [1-9]', out)

def test_processes_agree(tmp_path):
    run(*launcher, '--nproc', 2, here/'memory_cases.py', tmp_path/'out.json')
    res = json.loads((tmp_path/'out.json').read_text())
    assert len(res)==2 and res[0]['sum']==res[1]['sum']
    for r in res: assert r['weights']<1e-13 and r['steps']==2*(128//30) and r['lr']==pytest.approx(.1*30/16) # The smaller memory has room for 30
