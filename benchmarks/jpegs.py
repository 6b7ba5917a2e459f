"""JPEGs to measure loaders with, in ImageNet's layout: python benchmarks/jpegs.py

Pictures of this package's renderer, saved as the files of ImageNet are: about 500x375 and 110 KB in the mean, half with a short side of 375,
a third upright, 3 of 5 with quality 96 and full colour (4:4:4), the others with 85 to 90 and 4:2:0; 2 % progressive, 1 % gray, a few CMYK.
They are softened as by a lens and given detail at all scales, so that copies with short sides of 160 and 352 take 11 and 45 KB at quality 90,
about what those of photos take: their size decides how fast they are decoded."""
import multiprocessing, os, statistics, tempfile
from functools import partial
from pathlib import Path
import numpy as np, simplejpeg
from PIL import Image, ImageFilter
from fastai_fastimagenet.photos import classes, render

cache = Path('~/.cache/fastai_fastimagenet/bench').expanduser()

def detail(img, rng, sd=16, power=1.1):
    "Add texture that falls with the frequency to the `power`, as that of photos does, with a standard deviation of `sd` levels"
    w,h = img.size
    freq = np.hypot(np.fft.fftfreq(h)[:,None], np.fft.rfftfreq(w))
    freq[0,0] = 1
    texture = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((h,w)))/freq**power, (h,w))
    return Image.fromarray((np.asarray(img)+sd/texture.std()*texture[...,None]).clip(0,255).astype(np.uint8))

def save(i, root, split):
    rng = np.random.default_rng([96, i, split=='val'])
    short = 375 if rng.uniform()<.5 else round(np.clip(375*np.exp(.3*rng.normal()), 150, 1000))
    img,cls = render(i, split, short=short)
    img = detail(img.filter(ImageFilter.GaussianBlur(1.2)), rng)
    if i%100==3: img = img.convert('L')
    if i%500==7: img = img.convert('CMYK')
    fine = rng.uniform()<.6
    img.save(root/split/classes[cls]/f'{i:05d}.jpg', quality=96 if fine else int(rng.integers(85,91)), subsampling=0 if fine else 2,
             progressive=i%50==1)

def make(n_train=1500, n_valid=300, path=cache):
    "Folder of the pictures; it appears when it is complete"
    dest = path/f'jpegs_v1_{n_train}_{n_valid}'
    if dest.exists(): return dest
    path.mkdir(parents=True, exist_ok=True)
    print(f'Rendering {n_train+n_valid} pictures of about 500x375')
    with tempfile.TemporaryDirectory(dir=path) as tmp, multiprocessing.get_context('spawn').Pool() as pool:
        root = Path(tmp)/'jpegs'
        for split,n in (('train',n_train), ('val',n_valid)):
            for c in classes[:n]: (root/split/c).mkdir(parents=True)
            pool.map(partial(save, root=root, split=split), range(n), chunksize=8)
        try: root.rename(dest)
        except OSError: # Another process was faster
            if not dest.exists(): raise
    return dest

def describe(files):
    "What kind of files these are, in a dict"
    imgs = [Image.open(f) for f in files]
    sides = np.array([o.size for o in imgs])
    share = lambda f: round(sum(map(f, imgs))/len(imgs), 4)
    return dict(n=len(files), mean_kb=round(statistics.mean(os.path.getsize(f) for f in files)/1000, 1),
                mean_long=round(float(sides.max(1).mean()), 1), mean_short=round(float(sides.min(1).mean()), 1),
                upright=share(lambda o: o.height>o.width), progressive=share(lambda o: bool(o.info.get('progressive'))),
                full_colour=share(lambda o: o.format=='JPEG' and o.mode=='RGB' and o.layer[0][1:3]==(1,1)), gray=share(lambda o: o.mode=='L'),
                cmyk=share(lambda o: o.mode=='CMYK'))

def cut(data, height):
    "The file `data` with `height` as its height, where that is allowed (baseline files)"
    data,i = bytearray(data),2
    while data[i+1] not in (0xC0,0xC1,0xC2): i += 2+int.from_bytes(data[i+2:i+4], 'big')
    if data[i+1]!=0xC2: data[i+5:i+7] = height.to_bytes(2, 'big')
    return bytes(data)

def rgb_bytes(f):
    "The file, or where simplejpeg does not know its kind (some CMYK), the picture as the usual JPEG"
    data = f.read_bytes()
    try: simplejpeg.decode_jpeg(data)
    except ValueError: return simplejpeg.encode_jpeg(np.array(Image.open(f).convert('RGB')), quality=90, colorsubsampling='420')
    return data

if __name__=='__main__':
    path = make()
    for split in ('train','val'): print(path/split, describe(sorted((path/split).rglob('*.jpg'))))
