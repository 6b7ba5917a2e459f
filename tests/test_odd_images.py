"A folder of broken and odd images trains through, and all of them are named in the report"
import html.parser, io, math, os, shutil, time
from types import SimpleNamespace
import numpy as np, pytest
from PIL import Image, ImageOps
from fastai_fastimagenet.batch import CentreView, make_batch
from fastai_fastimagenet.index import index_folder
from fastai_fastimagenet.table import index_dtype
from fastai_fastimagenet.loader import find_images
from fastai_fastimagenet.phase import Phase
from fastai_fastimagenet.photos import render
from fastai_fastimagenet.presize import presize
from fastai_fastimagenet.report import report
from fastai_fastimagenet.schedule import Schedule
from fastai_fastimagenet.train import main, odd_files, train
import odd_images

def write(folder, name, data):
    with open(os.path.join(os.fsencode(folder), os.fsencode(name)), 'wb') as f: f.write(data)

@pytest.fixture(scope='module')
def made():
    "Broken files, and odd ones that can be decoded"
    return odd_images.broken_files(),odd_images.odd_files()

@pytest.fixture(scope='module')
def data(made, tmp_path_factory):
    "A folder with all of them, half of the broken ones for validation, and 8 good images for each class and split"
    d = tmp_path_factory.mktemp('odd')
    for split in ('train','val'):
        for c in 'ab':
            (d/split/c).mkdir(parents=True)
            for i in range(8): render(i, split, short=64)[0].save(d/split/c/f'good {i}.jpg')
    for i,(name,b) in enumerate(made[0].items()): write(d/('train','val')[i%2]/'ab'[i//2%2], name, b)
    for i,(name,(b,_)) in enumerate(made[1].items()): write(d/'train'/'ab'[i%2], name, b)
    for f in [*d.glob('train/*/turned ?.jpg'), *d.glob('train/*/a.gif')]: shutil.copy(f, d/'val/b')
    (d/'train/a/broken link.jpg').symlink_to('nowhere')
    (d/'train/a/loop.jpg').symlink_to('loop.jpg')
    (d/'train/a/linked.jpg').symlink_to('good 0.jpg')
    (d/'train/b/folder.jpg').mkdir()
    os.mkfifo(d/'val/a/pipe.jpg')
    return d

def escaped(name):
    "A name as it stands in a list: one line, no tab"
    name = os.fsdecode(name)
    return ''.join(c if c.isprintable() else repr(c)[1:-1] for c in name)

def listed(file): return [l.split('\t') for l in file.read_text(encoding='utf-8').splitlines()]

class Words(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.words,self.tags = [],set()
        self.feed(text)
    def handle_data(self, text): self.words.append(text)
    def handle_starttag(self, tag, attrs): self.tags.add(tag)

@pytest.mark.parametrize('workers', [0,1])
def test_trains_and_names_them_all(made, data, tmp_path, workers, capfd):
    broken,odd = made
    assert len(broken)>=30 and sum(bool(what) for _,what in odd.values())>=30
    sched = Schedule([Phase(1, size=32, bs=16, lr=.01, min_scale=.5), Phase(1, size=48, lr=(.01,0), rect=True)])
    out = tmp_path/'out'
    res = train(data=str(data), schedule=sched.to_json(), arch='resnet_small', workers=workers, out=str(out))
    bad = {escaped(n) for n in broken}|{'broken link.jpg','loop.jpg','pipe.jpg'}
    assert res['epochs']==2 and math.isfinite(res['top1']) and res['skipped']==len(bad)
    skipped,odds = listed(out/'skipped.txt'),listed(out/'odd.txt')
    assert all(len(o)==2 and o[1] for o in skipped+odds)
    assert sorted(f.rpartition('/')[2] for f,_ in skipped)==sorted(bad)
    assert not any('0x' in why.lower() and 'object' in why for _,why in skipped), 'a place in memory says nothing'
    assert {f.rpartition('/')[2]: what for f,what in odds}=={escaped(n): what for n,(_,what) in odd.items() if what}
    assert len(odds)-len({f.rpartition('/')[2] for f,_ in odds})==8, 'those of the validation set'
    said = capfd.readouterr()
    assert f'{len(bad)} files left out' in said.out and f'{len(odds)} files load slowly' in said.out
    report(str(out))
    page,text = Words((out/'report.html').read_text(encoding='utf-8')),(out/'report.md').read_text(encoding='utf-8')
    assert {'details','summary'} <= page.tags and not page.tags&{'i','b'}
    words,lines = set(page.words),set(text.splitlines())
    for f,why in skipped+odds:
        assert f in words and why in words
        cells = [o.replace('|', r'\|').replace('<', '&lt;') for o in (f,why)]
        assert f'|{cells[0]}|{cells[1]}|' in lines
    assert f'{len(bad)} files that cannot be decoded' in words and any(o.startswith(f'{len(odds)} files that load slowly', 5) for o in words)

def test_strict_names_one(data, tmp_path):
    with pytest.raises(ValueError, match=r'files cannot be decoded: .*/train/a/.* Remove them'):
        train(data=str(data), schedule=Schedule([Phase(1, size=32, bs=4, lr=.01)]).to_json(), arch='resnet_small', workers=0, strict=True, out=str(tmp_path/'out'))
    assert not (tmp_path/'out').exists()
    with pytest.raises(SystemExit) as e:
        main(data=str(data), schedule=Schedule([Phase(1, size=32, bs=4, lr=.01)]).to_json(), arch='resnet_small', workers=0, strict=True, out=str(tmp_path/'out'))
    assert 'files cannot be decoded' in e.value.code and len(e.value.code.splitlines())==1

def test_copies_leave_out_the_same(made, data, tmp_path):
    bad = presize(data, tmp_path/'copies', [32], workers=0)
    assert [f for f,_ in bad]==[f for f,_ in index_folder(data, check=True).bad]
    train_files,valid_files,_,skipped = find_images(tmp_path/'copies/32')
    assert not skipped and len(train_files)+len(valid_files)==sum(map(len, find_images(data)[:2]))
    assert not odd_files(train_files), 'a copy is a plain JPEG'

def reference(name, b, exif):
    "What Pillow makes of a file, (H,W,3) uint8"
    with Image.open(io.BytesIO(b)) as im:
        im.load()
        if exif and 'bad exif' not in str(name): im = ImageOps.exif_transpose(im)
        if str(name).startswith('deep') and 'rgb' not in str(name): # 16 bits in one channel: Pillow would clip
            im = Image.fromarray((np.asarray(im)/257).round().astype(np.uint8))
        return im.convert('RGB')

def psnr(a, b):
    mse = np.square(np.asarray(a, float)-np.asarray(b, float)).mean()
    return 10*math.log10(255**2/mse) if mse else math.inf

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('exif', [False,True])
def test_batch_is_what_pillow_decodes(made, data, exif):
    odd = {os.fsencode(n): b for n,(b,_) in made[1].items()}
    images = find_images(data, exif)[0]
    view,names = CentreView((48,48)),[os.path.basename(os.fsencode(f)) for f in images]
    x = make_batch(images.source, images.rows.tobytes(), images.labels.tobytes(), view)[0].permute(0,2,3,1).numpy()
    w,h = (o[images.rows] for o in images.index.sizes(exif))
    boxes,_ = view.boxes(images.rows, w, h)
    assert odd.keys() <= set(names)
    for got,name,(x0,y0,bw,bh) in zip(x, names, boxes.tolist()):
        if name not in odd: continue
        im = reference(os.fsdecode(name), odd[name], exif)
        ref = im.crop((x0,y0,x0+bw,y0+bh)).resize((48,48), Image.BILINEAR)
        least = 25 if odd[name][:2]==b'\xff\xd8' else 55
        assert psnr(got, ref)>least, (name, psnr(got, ref))
        if name.startswith(b'deep'): assert got.std()>20 and (got==255).mean()<.1, 'scaled, not clipped'

def test_the_page_stays_usable(tmp_path):
    "Of a thousand files the first 200 are named, and where the others are"
    out = tmp_path/'run'
    out.mkdir()
    (out/'history.csv').write_text('epoch,size,bs,lr,train_loss,valid_loss,top1,top5,images_s,minutes\n0,32,4,.1,1,1,.5,.9,10,1\n')
    (out/'skipped.txt').write_text(''.join(f'/d/{i:04}.jpg\tOSError: cut\n' for i in range(1000)))
    report(str(out))
    for name in ('report.html','report.md'):
        text = (out/name).read_text()
        assert '0199.jpg' in text and '0200.jpg' not in text and 'and 800 more, see skipped.txt' in text and 'load slowly' not in text

def test_lists_are_quick(tmp_path):
    "Half a million odd files take a few seconds, and so does their report"
    t = np.zeros(500_000, index_dtype(40))
    t['name'],t['kind'],t['orientation'] = b'train/n01440764/n01440764_10026.JPEG',np.arange(len(t))%3+1,np.arange(len(t))%8+1
    began = time.process_time()
    found = odd_files(SimpleNamespace(index=SimpleNamespace(table=t), rows=np.arange(len(t)), source=SimpleNamespace(root='/d', exif=True)))
    assert len(found)==len(t)-((t['kind']==1)&(t['orientation']==1)).sum() and time.process_time()-began<5
    assert found[0]==('/d/train/n01440764/n01440764_10026.JPEG','progressive JPEG and EXIF orientation 2, applied')
