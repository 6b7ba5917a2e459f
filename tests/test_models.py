"Any image size for real architectures, same output at the old size"
import pytest, torch, torchvision
import torch.nn.functional as F
from torch import nn
from fastai_fastimagenet.models import to_any_size, zero_init_residual, resnet_small

pytestmark = pytest.mark.filterwarnings('ignore')

class OldAlexNet(nn.Module):
    "Without an adaptive pool, as published: flatten and a linear layer that counts pixels"
    def __init__(self):
        super().__init__()
        net = torchvision.models.alexnet(num_classes=5)
        self.features,self.classifier = net.features,net.classifier
    def forward(self, x): return self.classifier(torch.flatten(self.features(x), 1))

class SharedPool(nn.Module):
    "One pooling layer that runs three times"
    def __init__(self):
        super().__init__()
        self.a,self.b,self.pool,self.head = nn.Conv2d(3,8,3,padding=1),nn.Conv2d(8,8,3,padding=1),nn.AvgPool2d(2),nn.Linear(8*4*4,5)
    def forward(self, x): return self.head(self.pool(self.pool(self.b(self.pool(self.a(x)))).relu()).flatten(1))

class FunctionalPool(nn.Module):
    "The usual ResNet head for CIFAR: a functional pool of fixed size"
    def __init__(self):
        super().__init__()
        self.conv,self.head = nn.Conv2d(3,8,3,8,1),nn.Linear(8,5)
    def forward(self, x): return self.head(F.avg_pool2d(self.conv(x), 4).flatten(1))

class TwoBranches(nn.Module):
    "Two feature maps joined before one linear layer"
    def __init__(self):
        super().__init__()
        self.a,self.b,self.head = nn.Conv2d(3,4,3,2,1),nn.Conv2d(3,4,5,2,2),nn.Linear(2*4*16*16,5)
    def forward(self, x): return self.head(torch.cat([self.a(x).flatten(1), self.b(x).flatten(1)], 1))

class Squeeze(nn.Module):
    "Squeeze and excite: linear layers in the middle"
    def __init__(self):
        super().__init__()
        self.conv,self.pool,self.a,self.b,self.head = nn.Conv2d(3,8,3,2,1),nn.AdaptiveAvgPool2d(1),nn.Linear(8,2),nn.Linear(2,8),nn.Linear(8*16*16,5)
    def forward(self, x):
        x = self.conv(x)
        return self.head((x*self.b(self.a(self.pool(x).flatten(1))).sigmoid()[...,None,None]).flatten(1))

def old_resnet():
    net = torchvision.models.resnet18(num_classes=5)
    net.avgpool = nn.AvgPool2d(7)
    return net

def plain_sequential():
    return nn.Sequential(nn.Conv2d(3,8,3,2,1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8*16*16,5))

def fully_convolutional(): return nn.Sequential(nn.Conv2d(3,5,3,8,1), nn.AvgPool2d(4), nn.Flatten())

cases = dict(squeeze=(Squeeze,32), convnext=(lambda: torchvision.models.convnext_tiny(num_classes=5),64), functional=(FunctionalPool,32), conv_only=(fully_convolutional,32),
             alexnet=(OldAlexNet,224), resnet=(old_resnet,224), shared=(SharedPool,32), sequential=(plain_sequential,64),
             mobilenet=(lambda: torchvision.models.mobilenet_v3_small(num_classes=5),224),
             squeezenet=(lambda: torchvision.models.squeezenet1_1(num_classes=5),224),
             densenet=(lambda: torchvision.models.densenet121(num_classes=5),224), small=(lambda: resnet_small(5),128))

@pytest.mark.parametrize('name', cases)
def test_any_size(name):
    make,size = cases[name]
    torch.manual_seed(0)
    model = make().eval()
    keys,x = list(model.state_dict()),torch.randn(2,3,size,size)
    with torch.no_grad():
        before = model(x)
        assert to_any_size(model, size) is model and not model.training
        assert torch.allclose(model(x), before, rtol=1e-4, atol=1e-5)
        for h,w in ((size,size*3//2), (size*3//2,size), (size*9//7,size*9//7)): assert model(torch.randn(2,3,h,w)).shape==(2,5)
    assert list(model.state_dict())==keys
    assert model.load_state_dict(make().state_dict())

def test_the_whole_map_counts():
    "At a larger size every corner of the image changes the output; `AvgPool2d(7)` saw one corner only"
    torch.manual_seed(0)
    model = to_any_size(old_resnet()).eval()
    x = torch.randn(1,3,320,320)
    y = x.clone()
    y[...,-40:,-40:] += 5
    with torch.no_grad(): assert not torch.allclose(model(x), model(y))

def test_state_of_training_is_kept():
    model = plain_sequential().train()
    model[1].eval()
    mean = model[1].running_mean.clone()
    to_any_size(model, 64)
    assert model.training and not model[1].training and torch.equal(model[1].running_mean, mean)

def test_survives_copy_and_pickle(tmp_path):
    import copy
    model = to_any_size(plain_sequential(), 64).eval()
    torch.save(model, tmp_path/'m.pth')
    x = torch.randn(1,3,96,80)
    with torch.no_grad():
        for m in (copy.deepcopy(model), torch.load(tmp_path/'m.pth', weights_only=False)): assert torch.equal(m(x), model(x))

@pytest.mark.parametrize('model,words', [(torchvision.models.vit_b_16(num_classes=5), 'convolutional models'),
    (nn.Sequential(nn.Flatten(), nn.Linear(3*224*224,2)), 'convolutional models'), (plain_sequential(), 'Pass the `size`')])
def test_refused(model, words):
    with pytest.raises(ValueError, match='AdaptiveAvgPool2d'): to_any_size(TwoBranches(), 32)
    with pytest.raises(ValueError, match=words): to_any_size(model)

class Noisy(FunctionalPool):
    "Another output each time; with a layer that pools, or a function that does"
    def __init__(self, layer):
        super().__init__()
        self.pool = nn.AvgPool2d(4) if layer else lambda x: F.avg_pool2d(x, 4)
    def forward(self, x): return self.head(self.pool(self.conv(x)).flatten(1))+torch.rand(5)

class PoolBeside(TwoBranches):
    "The last map comes from a fixed pool, but two others are flattened"
    def __init__(self):
        super().__init__()
        self.pool,self.head = nn.AvgPool2d(16),nn.Linear(2*4*16*16+4,5)
    def forward(self, x):
        a,b = self.a(x),self.b(x)
        return self.head(torch.cat([o.flatten(1) for o in (a,b,self.pool(b))], 1))

@pytest.mark.parametrize('make,words', [(lambda: Noisy(True), 'another output for the same images'), (lambda: Noisy(False), 'another output'), (PoolBeside, 'no single feature map')])
def test_a_refused_model_is_as_it_was(make, words):
    model = make()
    before = [(type(m), len(m._forward_hooks), m.training) for m in model.modules()]
    with pytest.raises(ValueError, match=words): to_any_size(model, 32)
    assert [(type(m), len(m._forward_hooks), m.training) for m in model.modules()]==before

def test_random_numbers_stay():
    model,state = plain_sequential(),torch.get_rng_state()
    to_any_size(model, 64)
    assert torch.get_rng_state().equal(state)

@pytest.mark.parametrize('make,born,n', [(torchvision.models.resnet18,0,8), (torchvision.models.resnet50,0,16), (lambda: resnet_small(5),8,8)])
def test_zero_init_residual(make, born, n):
    torch.manual_seed(0)
    model = make()
    zeros = lambda: sum(float(m.weight.abs().sum())==0 for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert zeros()==born
    zero_init_residual(model)
    assert zeros()==n

class Plain(nn.Module):
    "Two batch norms in a row, no residual block"
    def __init__(self):
        super().__init__()
        self.conv1,self.bn1,self.conv2,self.bn2 = nn.Conv2d(3,4,3),nn.BatchNorm2d(4),nn.Conv2d(4,4,3),nn.BatchNorm2d(4)

def test_zero_init_needs_residual_blocks():
    with pytest.raises(ValueError, match='no residual block'): zero_init_residual(Plain())
