"""Images/s of one core from files to batches, of loaders side by side: python benchmarks/loader.py --json loader.json

Work: training (random resized crop of .08 to 1 of the area, horizontal flip) and validation (centre crop, .875), at 128 and 224 px, 64 a batch.
Sources: the original files, the copies that `presize` makes of them (short side 160, 352), and its raw copies (160). Loaders:
  fastai           `ImageDataLoaders.from_folder` with RandomResizedCrop and FlipItem; the batch is made float and normalised on the CPU
  fastai uint8     the same, stopped before that; so are all that follow
  torchvision PIL  `ImageFolder` as it is (Pillow), v2 transforms; torchvision: `decode_jpeg` and antialiased v2 transforms on uint8 tensors
  timm             `create_dataset`, `create_loader` without colour jitter; the loader inside its prefetcher, which would normalise
  FFCV             its crop decoders; the copies are written into its format as they are (JPEG of quality 90; raw), the originals
                   as JPEG with a long side of 500 or less ("500") and half of them raw ("500 half raw", FFCV's own recipe)
  ours, ours float `imagenet_dls`: its uint8 batches; the float batches of its `train` and `valid`
  limit            the libjpeg-turbo and the resize kernel of torch alone: files in memory, crops drawn and files cut below them beforehand,
                   decoded at 1/2, 1/4 or 1/8 where the crop stays large enough; for raw copies the resize alone. The share of the limit
                   is of that for the same files; FFCV's files of the originals are others
One process on one core, no workers, one thread, files in the page cache. Figures are images per second of CPU time of this process, medians over
rounds. In a round all loaders take turns on the same pictures, in random order; ratios are medians of the ratios of each round. The 160 copies
are for 128 px only. Then ours and fastai with 1 and 2 workers, on all cores: wall time, counted after the first batches of an epoch.

Pictures are those of `--data DIR` (DIR/train/CLASS/*, DIR/val/CLASS/*), or rendered once (jpegs.py). timm and FFCV take part where they are
installed. FFCV 1.0.2 has to be compiled; on Debian 12 with Python 3.11, in an environment that has torch, torchvision, matplotlib, psutil and tqdm:
  apt-get install g++ pkg-config libturbojpeg0-dev libopencv-dev
  pip install --no-deps timm numba llvmlite opencv-python-headless pytorch-pfn-extras fastargs terminaltables assertpy
  pip install --no-deps --no-build-isolation ffcv==1.0.2"""
import os
os.environ |= dict(OMP_NUM_THREADS='1', TQDM_DISABLE='1', NUMBA_THREADING_LAYER='workqueue') # numba's other layer, of TBB, hangs at exit
import argparse, itertools, json, random, shutil, statistics, sys, tempfile, time, warnings
from importlib.util import find_spec
warnings.simplefilter('ignore')
sys.unraisablehook = lambda o: None # numba complains when the pipelines that FFCV compiled are collected
import simplejpeg, torchvision
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2
from fastai.vision.all import *
from fastai_fastimagenet.loader import imagenet_dls
from fastai_fastimagenet.presize import presize
import jpegs
from setting import setting

def split(train): return 'train' if train else 'val'

def fastai(path, size, train, workers=0):
    dls = ImageDataLoaders.from_folder(path, valid='val', bs=args.bs, num_workers=workers, item_tfms=[RandomResizedCrop(size), FlipItem()],
                                       batch_tfms=Normalize.from_stats(*imagenet_stats))
    return dls.train if train else dls.valid

def fastai_uint8(path, size, train, workers=0):
    dl = fastai(path, size, train, workers)
    dl.after_batch = noop
    return dl

def read(f):
    data = torch.frombuffer(bytearray(Path(f).read_bytes()), dtype=torch.uint8)
    try: return decode_jpeg(data, mode=ImageReadMode.RGB)
    except RuntimeError: return v2.functional.pil_to_tensor(Image.open(f).convert('RGB'))

def torch_loader(path, size, train, read=read, last=()):
    tfms = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()] if train else [v2.Resize(round(size/.875)), v2.CenterCrop(size)]
    ds = torchvision.datasets.ImageFolder(path/split(train), v2.Compose([*tfms, *last]), loader=read)
    return torch.utils.data.DataLoader(ds, args.bs, shuffle=train)

torch_pil = partial(torch_loader, read=torchvision.datasets.folder.default_loader, last=(v2.PILToTensor(),))

def timm_loader(path, size, train):
    from timm.data import create_dataset, create_loader
    ds = create_dataset('', root=path/split(train))
    return create_loader(ds, size, args.bs, is_training=train, color_jitter=None, interpolation='bilinear', crop_pct=.875, num_workers=0,
                         device=torch.device('cpu')).loader

def write_ffcv(file, path, **kwargs):
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter
    fields = {'image': RGBImageField(**kwargs), 'label': IntField()}
    DatasetWriter(file, fields, num_workers=2).from_indexed_dataset(torchvision.datasets.ImageFolder(path))

def ffcv_loader(path, size, train, write_mode='jpg', **kwargs):
    from ffcv.fields.decoders import CenterCropRGBImageDecoder, IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, Squeeze, ToTensor, ToTorchImage
    file = path.parent/f'{path.name}_{split(train)}_{write_mode}.beton'
    if not file.exists(): write_ffcv(file, path/split(train), write_mode=write_mode, **kwargs)
    image = [RandomResizedCropRGBImageDecoder((size,size)), RandomHorizontalFlip()] if train else [CenterCropRGBImageDecoder((size,size), .875)]
    return Loader(str(file), args.bs, num_workers=1, os_cache=True, order=OrderOption.RANDOM if train else OrderOption.SEQUENTIAL,
                  pipelines=dict(image=image+[ToTensor(), ToTorchImage()], label=[IntDecoder(), ToTensor(), Squeeze()]))

def ours_float(path, size, train, workers=0):
    dls = imagenet_dls(path, size, args.bs, workers=workers)
    return dls.train if train else dls.valid

class ours:
    def __init__(self, *args, **kwargs): self.dl = ours_float(*args, **kwargs)
    def __iter__(self): return self.dl.raw_batches()

class limit:
    def __init__(self, path, size, train, raw=False):
        self.size,self.raw = size,raw
        self.todo = [self.prepare(jpegs.rgb_bytes(f), train) for f in get_image_files(path/split(train))]
        self.out = torch.empty(args.bs, 3, size, size, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)

    def prepare(self, data, train):
        "What to decode, the size it is decoded to, and the crop in that"
        h,w,*_ = simplejpeg.decode_jpeg_header(data)
        if train: i,j,ch,cw = torchvision.transforms.RandomResizedCrop.get_params(torch.empty(1, h, w, device='meta'), (.08,1), (3/4,4/3))
        else:
            ch = cw = round(.875*min(h,w))
            i,j = (h-ch)//2,(w-cw)//2
        m = 8 if self.raw else next((o for o in (1,2,4) if min(ch,cw)*o>=8*self.size), 8)
        box = slice(i*m//8, (i+ch)*m//8),slice(j*m//8, (j+cw)*m//8)
        if self.raw: return simplejpeg.decode_jpeg(data), 0, 0, box
        data = jpegs.cut(data, i+ch)
        h,w,*_ = simplejpeg.decode_jpeg_header(data)
        return data, math.ceil(h*m/8), math.ceil(w*m/8), box

    def __iter__(self):
        resize = torch.ops.aten._upsample_bilinear2d_aa.out
        for k,(data,h,w,box) in enumerate(self.todo):
            x = data if self.raw else simplejpeg.decode_jpeg(data, min_height=h, min_width=w, strict=False)
            x = torch.from_numpy(x)[box].permute(2,0,1)[None].contiguous(memory_format=torch.channels_last)
            resize(x, (self.size,self.size), False, None, None, out=self.out[k%args.bs:k%args.bs+1])
            if (k+1)%args.bs==0: yield self.out,None

files = {'fastai':fastai, 'fastai uint8':fastai_uint8, 'torchvision PIL':torch_pil, 'torchvision':torch_loader, 'timm':timm_loader,
         'ours':ours, 'ours float':ours_float, 'limit':limit}
sizes = {'originals':(128,224), '160':(128,), '352':(128,224), 'raw 160':(128,)} # Source: sizes of the crops it is for

def loaders(root, source):
    "Name: function of size and whether to train, which makes the loader"
    path = root/'originals' if source=='originals' else root/'jpeg'/source.removeprefix('raw ')
    if source=='raw 160':
        res = {'ours': partial(ours, root/'raw/160'), 'ours float': partial(ours_float, root/'raw/160'),
               'FFCV': partial(ffcv_loader, path, write_mode='raw'), 'limit': partial(limit, path, raw=True)}
    else: res = {k: partial(f, path) for k,f in files.items()}
    if source=='originals':
        res['FFCV 500'] = partial(ffcv_loader, path, max_resolution=500)
        res['FFCV 500 half raw'] = partial(ffcv_loader, path, write_mode='proportion', max_resolution=500)
    elif source!='raw 160': res['FFCV'] = partial(ffcv_loader, path)
    missing = [o for o in ('timm','FFCV') if not find_spec(o.lower())]
    return {k: f for k,f in res.items() if k.split()[0] not in missing}

def wanted(*key): return all(o in ' '.join(map(str, key)) for o in args.only)

def prepare(data, root):
    "Copy the pictures to measure with, a round of the classes at a time, and make ours of them"
    classes = sorted(o.name for o in (data/'val').iterdir() if o.is_dir())[:20]
    for part,n in (('train',args.n), ('val',args.n_val)):
        of_class = [sorted(get_image_files(data/part/c)) for c in classes]
        for o in of_class: random.Random(0).shuffle(o)
        found = [f for row in itertools.zip_longest(*of_class) for f in row if f]
        if len(found)<n: raise SystemExit(f'{data/part} has {len(found)} pictures in 20 classes, --n and --n-val ask for {n}')
        for f in found[:n]:
            dest = root/'originals'/part/f.parent.name
            dest.mkdir(parents=True, exist_ok=True)
            shutil.copy(f, dest)
    presize(root/'originals', root/'jpeg', short=(160,352), format='jpeg', workers=2)
    presize(root/'originals', root/'raw', short=(160,), format='raw', workers=2)

def check(key, dl, n):
    "Warm up, and see that the batches are what is measured"
    seen = 0
    for x,_ in dl:
        if x.shape[1:]!=(3,key[1],key[1]) or (x.dtype==torch.uint8)==(key[3] in ('fastai','ours float')):
            raise ValueError(f'{key}: a batch is {x.dtype} of {tuple(x.shape)}')
        seen += len(x)
    if seen!=n: raise ValueError(f'{key}: {seen} pictures were loaded, not {n}')

def cpu_rate(dl, least):
    "Images/s of CPU time, of whole epochs until `least` seconds are used"
    n,began = 0,time.process_time()
    while not n or time.process_time()-began<least:
        for x,_ in dl: n += len(x)
    return n/(time.process_time()-began)

def wall_rate(dl, least, warm=4):
    "Images/s of wall time, without the first `warm` batches of an epoch"
    n = seconds = 0
    while seconds<least:
        batches = iter(dl)
        for _ in range(warm): next(batches)
        began = time.perf_counter()
        for x,_ in batches: n += len(x)
        seconds += time.perf_counter()-began
    return n/seconds

def take_turns(dls, rounds, rate):
    "Rates of every loader, one a round"
    rates = {k: [] for k in dls}
    for i in range(rounds):
        for k in random.Random(i).sample(list(dls), len(dls)): rates[k].append(rate(dls[k]))
    return rates

def one_core(root, work, size):
    train = work=='train'
    dls = {key: f(size, train) for source in sizes if size in sizes[source] for k,f in loaders(root, source).items()
           if wanted(*(key := (work,size,source,k)))}
    for key,dl in dls.items(): check(key, dl, args.n if train else args.n_val)
    return take_turns(dls, args.rounds, partial(cpu_rate, least=args.least))

def with_workers(root):
    dls = {key: f(size, True, workers=n) for source,size in (('originals',128), ('160',128), ('352',224))
           for k,f in loaders(root, source).items() for n in (1,2)
           if k in ('fastai','fastai uint8','ours') and wanted(*(key := ('workers',size,source,k,n)))}
    return take_turns(dls, args.rounds, partial(wall_rate, least=4*args.least))

def ratio(rates, a, b):
    "Median of the ratios of each round, None where one was not measured"
    if a in rates and b in rates: return statistics.median(x/y for x,y in zip(rates[a], rates[b]))

def row(rates, key):
    work,size,source,name = key
    same = source.removeprefix('raw ') # fastai reads the JPEG copies
    against = {'fastai': ('originals','fastai'), 'same_fastai': (same,'fastai'), 'same_uint8': (same,'fastai uint8'), 'limit': (source,'limit')}
    if name.startswith('FFCV 500'): del against['limit'] # It does not decode the originals
    return dict(work=work, size=size, source=source, loader=name, median=statistics.median(rates[key]), low=min(rates[key]), high=max(rates[key]),
                **{k: ratio(rates, key, (work,size,*o)) for k,o in against.items()})

def show(rows):
    cell = lambda o, form: f'{"-":>8}' if o is None else f'{o:8{form}}'
    for (work,size),group in itertools.groupby(rows, lambda o: (o['work'],o['size'])):
        print(f'\n{work:6}{size} px                 images/CPU-s (range)      /fastai   same files: /fastai  /uint8  of limit')
        for o in group:
            print(f'{o["source"]:10}{o["loader"]:18}{o["median"]:9.0f} ({o["low"]:.0f} to {o["high"]:.0f})'.ljust(56)+cell(o['fastai'], '.2f')
                  +' '*12+cell(o['same_fastai'], '.2f')+cell(o['same_uint8'], '.2f')+cell(o.get('limit'), '.0%'))

def show_peers(rates):
    print('\nours against the others, uint8 batches of the same files')
    for key in rates:
        peers = [k for k in rates if k[:3]==key[:3] and k[3] not in ('ours','ours float','limit')]
        if key[3]=='ours': print(f'{" ".join(map(str, key[:3])):22}', ', '.join(f'{k[3]} {ratio(rates, key, k):.2f}' for k in peers))

def show_workers(rates):
    print('\nworkers, training: images/s of wall time with 1, with 2, two/one')
    for key in rates:
        two = (*key[:4],2)
        if key[4]==1 and two in rates:
            print(f'{key[1]} px {key[2]:10}{key[3]:13}{statistics.median(rates[key]):8.0f}{statistics.median(rates[two]):8.0f}{ratio(rates, two, key):8.2f}')

def describe(data, root):
    "What was measured: the originals, and the size of the copies"
    res = {part: jpegs.describe(get_image_files(root/'originals'/part)) for part in ('train','val')}
    res['copies_mean_kb'] = {o: jpegs.describe(get_image_files(root/'jpeg'/o/'train'))['mean_kb'] for o in ('160','352')}
    return dict(source=str(data) if args.data else 'rendered by benchmarks/jpegs.py', **res)

def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', type=Path, help='folder in the layout of ImageNet; by default pictures are rendered')
    p.add_argument('--n', type=int, default=768, help='training pictures')
    p.add_argument('--n-val', type=int, default=256, help='validation pictures')
    p.add_argument('--bs', type=int, default=64)
    p.add_argument('--rounds', type=int, default=7)
    p.add_argument('--least', type=float, default=.5, help='CPU seconds that each loader is measured for in a round, or an epoch if that is longer')
    p.add_argument('--only', nargs='*', default=[], help='measure what has all of these words, of: train val workers, 128 224, originals 160 352 raw, the loader')
    p.add_argument('--json', type=Path, help='file to write everything to')
    p.add_argument('--quick', action='store_true', help='one round of few pictures, to see that all works')
    args = p.parse_args()
    if args.quick: args.n,args.n_val,args.bs,args.rounds,args.least = 128,32,16,1,.05
    if args.n%args.bs or args.n_val%args.bs: p.error('--n and --n-val must be multiples of --bs')
    return args

def main():
    sys.stdout.reconfigure(line_buffering=True)
    default_device(False)
    torch.set_num_threads(1)
    jpegs.cache.mkdir(parents=True, exist_ok=True)
    data = args.data or jpegs.make()
    with tempfile.TemporaryDirectory(dir=jpegs.cache) as root:
        root = Path(root)
        prepare(data, root)
        res = dict(setting=setting(), data=describe(data, root))
        for o in res.values(): print(*(f'{k}: {v}' for k,v in o.items()), sep='\n')
        workers = with_workers(root)
        if workers: show_workers(workers)
        if hasattr(os, 'sched_setaffinity'): os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        rates = {}
        for work,size in itertools.product(('train','val'), (128,224)):
            rates |= (new := one_core(root, work, size))
            show([row(new, key) for key in new])
        if rates: show_peers(rates)
        if args.json:
            res |= dict(rows=[row(rates, key) for key in rates], rates=[(*k,v) for k,v in (rates|workers).items()])
            args.json.write_text(json.dumps(res, indent=1))

if __name__=='__main__':
    args = arguments()
    main()
