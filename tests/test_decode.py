"Pixels of random boxes against a full decode by Pillow; the EXIF orientations"
import io, math
from collections import defaultdict
import numpy as np, pytest, torch
from PIL import Image, ImageOps
from fastai_fastimagenet import decode as decode_module
from fastai_fastimagenet.decode import dct_scale, decode, decode_strictly, resizer, snap
from fastai_fastimagenet.photos import render

def saved(im, **kwargs):
    out = io.BytesIO()
    im.save(out, 'JPEG', **kwargs)
    return out.getvalue()

def psnr(a, b):
    mse = np.square(np.asarray(a, float)-np.asarray(b, float)).mean()
    return 10*math.log10(255**2/mse) if mse else math.inf

def photos(n, seed):
    "JPEG data of `n` photos of odd sizes, many qualities, some gray, some progressive"
    rng,ims = np.random.default_rng(seed),[render(i, short=375)[0] for i in range(12)]
    for k in range(n):
        im = ims[k%len(ims)]
        im = im.crop((0,0,*(np.array(im.size)-rng.integers(0, 16, 2)).tolist()))
        gray = rng.random()<.15
        kwargs = {} if gray else dict(subsampling=('4:4:4','4:2:0')[k//len(ims)%2])
        yield saved(im.convert('L') if gray else im, quality=int(rng.integers(75, 97)), progressive=bool(rng.random()<.2), **kwargs)

def boxes(size, n, rng):
    "Random boxes and the shapes that they become"
    w,h = size
    for _ in range(n):
        area,ratio = w*h*rng.uniform(.08, 1),math.exp(rng.uniform(math.log(3/4), math.log(4/3)))
        bw,bh = min(w, round(math.sqrt(area*ratio))),min(h, round(math.sqrt(area/ratio)))
        side = int(rng.choice([32,64,128,160,224]))
        yield (int(rng.integers(w-bw+1)),int(rng.integers(h-bh+1)),bw,bh),(side,int(side*rng.choice([1,.75])))

def reference(im, box, shape):
    "A resize of the same pixels of the whole image"
    scale = dct_scale(box, shape)
    x0,y0,x1,y1 = (8//scale*o for o in snap(box, scale))
    return np.asarray(im.resize(shape[::-1], Image.BILINEAR, box=(x0,y0,min(x1, im.width),min(y1, im.height))))

@pytest.fixture(scope='module')
def found():
    "Decibels by (exact, scale) and for all scales, and how often the pixels of bytes and a bytearray differ"
    rng,res,differ = np.random.default_rng(0),defaultdict(list),0
    for b in photos(96, 0):
        im = Image.open(io.BytesIO(b)).convert('RGB')
        for box,shape in boxes(im.size, 4, rng):
            ref = reference(im, box, shape)
            for exact in (True,False):
                t = decode(bytearray(b), box, shape, exact)
                differ += not t.equal(decode(b, box, shape, exact))
                for k in (dct_scale(box, shape),'all'): res[exact,k].append(psnr(t, ref))
    return res,differ

def test_close_to_a_full_decode(found):
    res = found[0]
    print({k: (len(v), f'mean {np.mean(v):.1f}', f'min {min(v):.1f}') for k,v in res.items()})
    assert all(len(res[True,s])>10 for s in (1,2,4,8)), 'every scale is tried'
    for exact,scale,mean,least in ((True,'all',50,30), (True,8,60,45), (False,'all',43,30), (False,8,43,34)):
        v = res[exact,scale]
        assert np.mean(v)>=mean and min(v)>=least, (exact, scale, np.mean(v), min(v))

def test_all_processes_resize_alike(monkeypatch):
    "The kind of CPU decides, not which function won a race"
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: 'DEFAULT')
    for machine,name in (('x86_64','_resize_torch'), ('AMD64','_resize_torch'), ('aarch64','_resize_pillow'), ('arm64','_resize_pillow')):
        monkeypatch.setattr(decode_module.platform, 'machine', lambda: machine)
        assert resizer.__wrapped__().__name__==name

def test_fewer_rows_change_no_pixel(found): assert found[1]==0

def exif(o):
    e = Image.Exif()
    e[0x0112] = o
    return e

@pytest.mark.parametrize('o', range(1, 9))
@pytest.mark.parametrize('kwargs', [dict(subsampling='4:4:4'), dict(subsampling='4:2:0'), dict(progressive=True)])
def test_orientations_are_those_of_pillow(o, kwargs):
    im = render(3, short=120)[0].crop((0,0,117,95))
    b = saved(im, quality=92, exif=exif(o), **kwargs)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(b)))
    assert psnr(decode(bytearray(b), exact=True, orientation=o), upright)>50
    assert psnr(decode(bytearray(b), orientation=o), upright)>32
    w,h = upright.size
    box = (w//5,h//7,w//2,h//2)
    crop = upright.crop((box[0],box[1],box[0]+box[2],box[1]+box[3]))
    assert psnr(decode(bytearray(b), box, exact=True, orientation=o), crop)>50
    shape = (box[3]-9,box[2]-5)
    assert psnr(decode(bytearray(b), box, shape, True, o), crop.resize(shape[::-1], Image.BILINEAR))>45
    small = (20,24)
    assert psnr(decode(bytearray(b), None, small, True, o), upright.resize(small[::-1], Image.BILINEAR))>30

def test_a_decoder_that_lost_its_place_is_noticed():
    "libjpeg calls what it skipped extraneous; a few such bytes are harmless"
    b = io.BytesIO()
    render(3, short=375)[0].save(b, 'JPEG', quality=95)
    data = b.getvalue()
    decode_strictly(data[:-2]+bytes(9)+data[-2:])
    with pytest.raises(ValueError, match='extraneous'): decode_strictly(data[:-2]+bytes(900)+data[-2:])

def test_boxes_may_be_fractions():
    b = io.BytesIO()
    render(3, short=200)[0].save(b, 'JPEG')
    crops = [decode(kind(b.getvalue()), (3.2,4.5,90.3,80.1), (40,40)) for kind in (bytes,bytearray)]
    assert torch.equal(*crops)
