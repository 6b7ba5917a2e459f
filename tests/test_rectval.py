"Rectangular validation: shapes, order, formats, EXIF, cache, data sources"
import os, struct
import numpy as np, pandas as pd, pytest, torch
from PIL import Image, ImageOps
from hypothesis import given, strategies as st
from fastai.vision.all import (CategoryBlock, CrossEntropyLossFlat, DataBlock, FuncSplitter, ImageBlock, MaskBlock, PointBlock, ImageDataLoaders, IndexSplitter, Learner,
    PILImage, ProgressCallback, Resize, TransformBlock, accuracy, get_image_files, noop, parent_label)
from fastai_fastimagenet.all import *
from fastai_fastimagenet.index import ImageInfo, image_infos, read_info
from fastai_fastimagenet.table import open_index
from fastai_fastimagenet.rect import crop_box, rect_shape
from fastai_fastimagenet.rectval import aspect_ratios

pytestmark = pytest.mark.filterwarnings('ignore')
sides = st.integers(1, 5000)

@given(st.lists(st.floats(.1, 10), min_size=1), st.integers(8, 512), st.integers(1, 64))
def test_shape(aspects, size, multiple):
    h,w = rect_shape(aspects, size, multiple)
    assert min(h,w)==size and (max(h,w)==size or max(h,w)%multiple==0)
    a = sorted(aspects)
    lo,hi = a[(len(a)-1)//2],a[len(a)//2]
    if h!=w: assert (w>h)==((lo+hi)/2>=1)

@given(sides, sides, st.tuples(sides, sides), st.floats(.1, 1))
def test_crop_is_inside_centred_and_undistorted(w, h, shape, pct):
    l,t,r,b = crop_box(w, h, shape, pct)
    assert -1e-9<=l<=r<=w+1e-9 and -1e-9<=t<=b<=h+1e-9
    assert l==pytest.approx(w-r, abs=1e-6) and t==pytest.approx(h-b, abs=1e-6)
    assert (r-l)*shape[0]==pytest.approx((b-t)*shape[1], rel=1e-6)
    assert max((r-l)/w, (b-t)/h)==pytest.approx(pct, rel=1e-6)

def learner(dls):
    learn = Learner(dls, resnet_small(dls.c, 4), CrossEntropyLossFlat(), metrics=accuracy)
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

@pytest.mark.parametrize('workers', [0,2])
@pytest.mark.parametrize('bs', [1,7,64,1000])
def test_every_picture_once_in_order(small_photos, workers, bs):
    dls = ImageDataLoaders.from_folder(small_photos, valid='val', item_tfms=Resize(48), bs=16, num_workers=workers)
    learn,dl = learner(dls),rect_dl(dls, bs=bs)
    preds,targs = learn.get_preds(dl=dl)
    assert targs.tolist()==[dls.valid_ds[i][1].item() for i in range(len(dls.valid_ds))]
    assert learn.validate(dl=dl)[1]==pytest.approx(float((preds.argmax(1)==targs).float().mean()))
    n = [len(b[1]) for b in dl]
    assert sum(n)==100 and len(n)==len(dl)==-(-100//bs)
    aspects = [dl.aspects[i] for i in dl.get_idxs()]
    assert aspects==sorted(aspects)

def test_square_pictures_give_the_centre_crop(tmp_path):
    "On square images rectangles change nothing"
    rng = np.random.default_rng(0)
    for split in ('train','val'):
        for c in 'ab':
            (tmp_path/split/c).mkdir(parents=True)
            for i in range(3): Image.fromarray(rng.integers(0,255,(64,64,3),np.uint8)).save(tmp_path/split/c/f'{i}.png')
    dls = ImageDataLoaders.from_folder(tmp_path, valid='val', item_tfms=RectCrop(32), bs=2, num_workers=0)
    a,b = [torch.cat([x for x,_ in dl]) for dl in (dls.valid, rect_dl(dls))]
    assert torch.equal(a, b)

def test_formats(tmp_path):
    "Gray, CMYK, RGBA, palette, 16 bit, WebP, progressive: the header says what the pixels are"
    rgb = Image.fromarray(np.random.default_rng(0).integers(0,255,(40,90,3),np.uint8))
    saves = dict(gray=(rgb.convert('L'),'jpg',{}), cmyk=(rgb.convert('CMYK'),'jpg',{}), rgba=(rgb.convert('RGBA'),'png',{}),
                 palette=(rgb.convert('P'),'png',{}), deep=(Image.fromarray(np.zeros((40,90),np.uint16)),'png',{}),
                 webp=(rgb,'webp',{}), progressive=(rgb,'jpg',dict(progressive=True)), gif=(rgb.convert('P'),'gif',{}))
    for split in ('train','val'):
        (tmp_path/split/'x').mkdir(parents=True)
        (tmp_path/split/'y').mkdir()
        for k,(im,ext,kw) in saves.items():
            im.save(tmp_path/split/'x'/f'{k}.{ext}', **kw)
            im.rotate(90, expand=True).save(tmp_path/split/'y'/f'{k}.{ext}', **kw)
    dls = ImageDataLoaders.from_folder(tmp_path, valid='val', item_tfms=Resize(32), bs=8, num_workers=0)
    assert aspect_ratios(dls.valid_ds)==[PILImage.create(f).size[0]/PILImage.create(f).size[1] for f in dls.valid_ds.items]
    assert [tuple(b[0].shape) for b in rect_dl(dls)]==[(8,3,64,32),(8,3,32,64)]
    assert all(i.error is None and i.checked for i in image_infos(dls.valid_ds.items, check=True))

def upright(f): return PILImage.create(ImageOps.exif_transpose(Image.open(f)).convert('RGB'))

@pytest.mark.parametrize('turns', [False,True])
def test_exif_orientation_is_counted_as_the_pixels_are(tmp_path, turns):
    exif = Image.Exif()
    for i in range(8):
        d = tmp_path/'ab'[i%2]
        d.mkdir(exist_ok=True)
        exif[0x0112] = (1,6,8,3,5,1,1,1)[i]
        Image.new('RGB', (90,60)).save(d/f'{i}.jpg', exif=exif)
    im = TransformBlock(type_tfms=upright) if turns else ImageBlock()
    dls = DataBlock((im, CategoryBlock()), get_items=get_image_files, get_y=parent_label, item_tfms=Resize(32),
                    splitter=FuncSplitter(lambda f: f.stem<'6')).dataloaders(tmp_path, bs=3, num_workers=0)
    want = [2/3 if turns and f.stem in '124' else 1.5 for f in dls.valid_ds.items]
    assert aspect_ratios(dls.valid_ds)==want and (2/3 in want)==turns

def test_items_from_a_dataframe_and_from_arrays(small_photos):
    files = sorted((small_photos/'val').rglob('*.jpg'))[:30]
    df = pd.DataFrame(dict(name=[str(f.relative_to(small_photos)) for f in files], label=[f.parent.name for f in files]))
    dls = ImageDataLoaders.from_df(df, small_photos, valid_pct=.5, item_tfms=Resize(32), bs=4, num_workers=0, seed=0)
    sizes = [Image.open(small_photos/n).size for n in dls.valid_ds.items['name']]
    assert aspect_ratios(dls.valid_ds)==[w/h for w,h in sizes]
    arrays = [np.asarray(Image.open(f)) for f in files]
    dls = DataBlock((ImageBlock, CategoryBlock), get_items=lambda o: range(30), get_x=lambda i: arrays[i], get_y=lambda i: i%2,
                    splitter=IndexSplitter(range(10)), item_tfms=Resize(32)).dataloaders(None, bs=4, num_workers=0)
    assert aspect_ratios(dls.valid_ds)==[a.shape[1]/a.shape[0] for a in arrays[:10]]
    assert sum(len(b[0]) for b in rect_dl(dls))==10

def test_test_dl_gets_its_own_aspects(small_photos):
    dls = ImageDataLoaders.from_folder(small_photos, valid='val', item_tfms=Resize(32), bs=8, num_workers=0)
    dls.loaders[1] = rect_dl(dls)
    files = sorted((small_photos/'train').rglob('*.jpg'))[:13]
    dl = dls.test_dl(files)
    assert len(dl.aspects)==13 and len(learner(dls).get_preds(dl=dl)[0])==13

def test_cache_is_checked_against_the_folder(tmp_path):
    def save(name, w, h): Image.new('RGB', (w,h)).save(tmp_path/name)
    save('a.png', 30, 20)
    save('b.png', 20, 40)
    files = [tmp_path/'a.png', tmp_path/'b.png']
    assert [(i.width,i.height) for i in image_infos(files)]==[(30,20),(20,40)]
    cache = tmp_path/'.fastimagenet_index.npy'
    stamp = cache.stat().st_mtime_ns
    image_infos(files)
    assert cache.stat().st_mtime_ns==stamp, 'nothing changed, nothing written'
    old = (tmp_path/'a.png').stat()
    save('a.png', 31, 20)
    os.utime(tmp_path/'a.png', ns=(old.st_atime_ns, old.st_mtime_ns+1))
    assert image_infos(files)[0].width==31
    cache.write_text('{ broken')
    assert image_infos(files)[1].height==40
    np.save(cache, np.zeros(3))
    assert image_infos(files)[1].height==40 and list(open_index(cache)['name'])==[b'a.png',b'b.png']
    assert 'No such file' in image_infos([tmp_path/'none.png'])[0].error

def test_cache_elsewhere_when_the_folder_is_read_only(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache'))
    (tmp_path/'pics/.fastimagenet_index.npy').mkdir(parents=True) # Root may write into any folder, but not over this one
    Image.new('RGB', (30,20)).save(tmp_path/'pics/a.png')
    assert image_infos([tmp_path/'pics/a.png'])==[ImageInfo(30,20)]
    assert len(list((tmp_path/'cache').rglob('*.npy')))==1 and len(list((tmp_path/'pics').iterdir()))==2

def test_unreadable_picture_is_named(tmp_path, small_photos):
    dls = ImageDataLoaders.from_folder(small_photos, valid='val', item_tfms=Resize(32), bs=8, num_workers=0)
    (tmp_path/'bad.jpg').write_text('x')
    dls.valid_ds.tls[0].items = [*dls.valid_ds.items[:-1], tmp_path/'bad.jpg']
    with pytest.raises(ValueError, match='bad.jpg cannot be read.*no image that Pillow knows'): rect_dl(dls)

def test_odd_but_sound_files_are_not_refused(tmp_path):
    "Text where the EXIF orientation should be, stray bytes between segments"
    rgb = Image.fromarray(np.random.default_rng(0).integers(0,255,(40,90,3),np.uint8))
    text = b'Exif\0\0II*\0\x08\0\0\0\x01\0' + struct.pack('<HHI4sI', 0x0112, 2, 4, b'top', 0) # One entry, of type text
    rgb.save(tmp_path/'exif.jpg', exif=text)
    assert Image.open(tmp_path/'exif.jpg').getexif()[0x0112]=='top'
    rgb.save(tmp_path/'plain.jpg')
    data = (tmp_path/'plain.jpg').read_bytes()
    k = data.index(b'\xff\xda')
    (tmp_path/'stray.jpg').write_bytes(data[:k]+b'\x00\x00'+data[k:])
    infos = [read_info(tmp_path/f'{n}.jpg', check=True) for n in ('exif','stray')]
    assert infos==[ImageInfo(90,40,1,True)]*2

def test_files_that_only_the_data_set_can_open(tmp_path):
    for i in range(8): np.save(tmp_path/f'{i}.npy', np.zeros((20,20+10*i,3), np.uint8))
    dls = DataBlock((TransformBlock(type_tfms=lambda f: PILImage.create(np.load(f))), CategoryBlock), get_items=lambda p: sorted(p.glob('*.npy')),
                    get_y=lambda f: int(f.stem)%2, splitter=FuncSplitter(lambda f: f.stem<'4'), item_tfms=Resize(16)).dataloaders(tmp_path, bs=2, num_workers=0)
    assert aspect_ratios(dls.valid_ds)==[1,1.5,2,2.5]

@pytest.mark.parametrize('tfms,share', [(Resize(32),1.), ([Resize(40),RectCrop(32)],.875), (RectCrop(32,crop_pct=.7),.7)])
def test_rectangles_keep_the_margin_of_the_loader(small_photos, tmp_path, tfms, share):
    "Nothing that the square crop shows is lost"
    dls = ImageDataLoaders.from_folder(small_photos, valid='val', item_tfms=tfms, bs=8, num_workers=0)
    crop = [f for f in rect_dl(dls).after_item.fs if isinstance(f, RectCrop)]
    assert [c.crop_pct for c in crop]==[share]

@pytest.mark.parametrize('kwargs', [dict(multiple=0), dict(multiple=True), dict(multiple=32.), dict(crop_pct=0), dict(crop_pct=1.5), dict(crop_pct='all')])
def test_bad_arguments_are_refused_before_the_fit(kwargs):
    with pytest.raises(ValueError, match=f'`{[*kwargs][0]}` must be'): RectValidation(**kwargs)

def test_points_are_refused_and_masks_keep_their_values(small_photos):
    files = sorted((small_photos/'val').rglob('*.jpg'))[:8]
    points = DataBlock((ImageBlock, PointBlock), get_items=lambda o: files, get_y=lambda f: torch.zeros(1,2), splitter=IndexSplitter(range(4)),
                       item_tfms=Resize(32)).dataloaders(None, bs=2, num_workers=0)
    with pytest.raises(ValueError, match='Points and boxes'): rect_dl(points)
    mask = lambda f: (np.asarray(Image.open(f).convert('L'))>128).astype(np.uint8)*2
    masks = DataBlock((ImageBlock, MaskBlock), get_items=lambda o: files, get_y=mask, splitter=IndexSplitter(range(4)),
                      item_tfms=Resize(32)).dataloaders(None, bs=2, num_workers=0)
    for x,y in rect_dl(masks): assert x.shape[-2:]==y.shape[-2:] and set(y.unique().tolist())=={0,2}

def test_training_pictures_too(small_photos):
    dls = ImageDataLoaders.from_folder(small_photos, valid='val', item_tfms=Resize(32), bs=50, num_workers=0)
    assert sum(len(b[0]) for b in rect_dl(dls.train))==400
    assert len(learner(dls).tta(dl=rect_dl(dls), n=1)[0])==100

def test_damaged_jpeg_is_found(small_photos, tmp_path):
    "Cut short, or with bytes changed in the middle, where Pillow returns garbage without a word"
    data = next((small_photos/'val').rglob('*.jpg')).read_bytes()
    (tmp_path/'cut.jpg').write_bytes(data[:len(data)*2//3])
    k = len(data)//2
    (tmp_path/'hit.jpg').write_bytes(data[:k]+b'\xff\xc4\x00\x00'+data[k+4:])
    for n in ('cut','hit'):
        assert read_info(tmp_path/f'{n}.jpg').error is None
        assert read_info(tmp_path/f'{n}.jpg', check=True).error
