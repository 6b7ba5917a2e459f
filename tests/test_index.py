"The index: what is read again, where it lies, odd names, formats, damage, pixels in a common file, size of ImageNet"
import io, os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
import numpy as np, pytest
from PIL import Image
from fastai.data.transforms import get_image_files
from fastai_fastimagenet import index
from fastai_fastimagenet.decode import JPEG, OTHER, PROGRESSIVE, RAW
from fastai_fastimagenet.index import ImageIndex, ImageInfo, image_infos, index_folder
from fastai_fastimagenet.table import index_dtype, open_index, save_index
from fastai_fastimagenet.pool import WorkerPool

pytestmark = pytest.mark.filterwarnings('ignore')
name = '.fastimagenet_index.npy'

@pytest.fixture(autouse=True)
def home(tmp_path_factory, monkeypatch):
    "No file of a test leaves its folders"
    home = tmp_path_factory.mktemp('home')
    monkeypatch.setenv('XDG_CACHE_HOME', str(home/'cache'))
    monkeypatch.setattr('tempfile.tempdir', str(home))
    return home

@pytest.fixture
def reads(monkeypatch):
    "Names of the files whose content was read by this process"
    names,head = [],index._head
    monkeypatch.setattr(index, '_head', lambda path, check: names.append(os.path.basename(path)) or head(path, check))
    return names

def image(w=30, h=20, mode='RGB'): return Image.fromarray(np.random.default_rng(0).integers(0, 255, (h,w,3), np.uint8)).convert(mode)

def save(path, *args, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    image(*args).save(path, **kwargs)
    return path

def names(idx): return [str(idx.path(i).relative_to(idx.root)) for i in range(len(idx))]

def sizes(idx): return dict(zip(names(idx), zip(*(o.tolist() for o in idx.sizes()))))

def later(path):
    "A time of change that differs, also where the clock of files is coarse"
    st = path.stat()
    os.utime(path, ns=(st.st_atime_ns, st.st_mtime_ns+1))

def test_only_what_changed_is_read(tmp_path, reads):
    for k in 'abc': save(tmp_path/k/f'{k}.jpg')
    idx = index_folder(tmp_path)
    assert idx.file==tmp_path/name and sizes(idx)=={f'{k}/{k}.jpg': (30,20) for k in 'abc'} and sorted(reads)==['a.jpg','b.jpg','c.jpg']
    written = idx.file.stat().st_mtime_ns
    reads.clear()
    assert names(index_folder(tmp_path))==names(idx) and not reads and idx.file.stat().st_mtime_ns==written
    save(tmp_path/'b/b.jpg', 33, 20)
    later(tmp_path/'b/b.jpg')
    save(tmp_path/'b/a new one.png', 7, 9)
    (tmp_path/'a/a.jpg').unlink()
    assert sizes(index_folder(tmp_path))=={'b/a new one.png': (7,9), 'b/b.jpg': (33,20), 'c/c.jpg': (30,20)}
    assert sorted(reads)==['a new one.png','b.jpg']
    assert sizes(idx)['a/a.jpg']==(30,20), 'a table that is in use stays as it is'
    (tmp_path/'b/b.jpg').unlink()
    reads.clear()
    assert names(index_folder(tmp_path))==['b/a new one.png','c/c.jpg'] and not reads
    assert list(open_index(tmp_path/name)['name'])==[b'b/a new one.png',b'c/c.jpg']

def test_same_size_and_another_time_is_read_again(tmp_path, reads):
    a = save(tmp_path/'a.bmp', 30, 20)
    index_folder(tmp_path)
    save(a, 20, 30)
    later(a)
    assert sizes(index_folder(tmp_path))=={'a.bmp': (20,30)} and reads==['a.bmp']*2

def test_check_is_done_once(tmp_path, reads):
    for k in 'ab': save(tmp_path/f'{k}.jpg')
    assert not index_folder(tmp_path).table['checked'].any()
    assert index_folder(tmp_path, check=True).table['checked'].all() and len(reads)==4
    assert index_folder(tmp_path, check=True).table['checked'].all() and index_folder(tmp_path).table['checked'].all() and len(reads)==4
    save(tmp_path/'b.jpg', 31)
    later(tmp_path/'b.jpg')
    assert index_folder(tmp_path).table['checked'].tolist()==[True,False]
    assert index_folder(tmp_path, check=True).table['checked'].all() and reads[4:]==['b.jpg','b.jpg']

def test_damage_is_told_in_one_line_and_tried_again(tmp_path):
    data = save(tmp_path/'good.jpg', 90, 60).read_bytes()
    k = len(data)//2
    (tmp_path/'cut.jpg').write_bytes(data[:k])
    (tmp_path/'hit.jpg').write_bytes(data[:k]+b'\xff\xc4\x00\x00'+data[k+4:])
    (tmp_path/'header.jpg').write_bytes(data[:100])
    (tmp_path/'empty.jpg').touch()
    (tmp_path/'link.jpg').symlink_to('nowhere')
    (tmp_path/'text.png').write_text('no image\n'*100)
    os.mkfifo(tmp_path/'pipe.jpg')
    broken = ['empty.jpg','header.jpg','link.jpg','pipe.jpg','text.png']
    assert [p.name for p,_ in index_folder(tmp_path).bad]==broken
    idx = index_folder(tmp_path, check=True)
    assert names(idx)==['good.jpg'] and [p for p,_ in idx.bad]==sorted(tmp_path/n for n in [*broken,'cut.jpg','hit.jpg'])
    for p,why in idx.bad: assert why.split(': ')[0].endswith('Error') and '\n' not in why and len(why)<=300, (p, why)
    assert dict(idx.bad)[tmp_path/'link.jpg']=='FileNotFoundError: No such file or directory'
    (tmp_path/'cut.jpg').write_bytes(data)
    assert names(index_folder(tmp_path, check=True))==['cut.jpg','good.jpg']

def test_formats(tmp_path):
    rgb = image(90, 40)
    deep = Image.fromarray(np.zeros((40,90), np.uint16))
    others = ('cmyk.jpeg','png.JPEG','deep.png','a.gif','a.bmp','a.webp','a.tif','palette.png')
    kinds = {'a.jpg':JPEG, 'gray.jpg':JPEG, 'progressive.JPG':PROGRESSIVE, **{n: OTHER for n in others}}
    saves = {'gray.jpg':(rgb.convert('L'),{}), 'progressive.JPG':(rgb,dict(progressive=True)), 'cmyk.jpeg':(rgb.convert('CMYK'),{}),
             'png.JPEG':(rgb,dict(format='PNG')), 'deep.png':(deep,{}), 'palette.png':(rgb.convert('P'),{})}
    for n in kinds:
        im,kw = saves.get(n, (rgb,{}))
        im.save(tmp_path/n, **kw)
    for check in (False,True):
        idx = index_folder(tmp_path, check)
        assert not idx.bad and set(sizes(idx).values())=={(90,40)}
        assert dict(zip(names(idx), idx.table['kind']))==kinds

def test_orientation_is_recorded_also_after_a_long_comment(tmp_path):
    exif = Image.Exif()
    for o in range(1, 9):
        exif[0x0112] = o
        save(tmp_path/f'{o}.jpg', exif=exif)
        save(tmp_path/f'{o}.png', exif=exif)
    out = io.BytesIO()
    image().save(out, 'jpeg', exif=exif)
    data = out.getvalue()
    (tmp_path/'comment.jpg').write_bytes(data[:2]+b'\xff\xfe\xea\x60'+b'.'*59998+data[2:])
    idx = index_folder(tmp_path)
    assert idx.table['orientation'].tolist()==[1,1,2,2,3,3,4,4,5,5,6,6,7,7,8,8,8]
    w,h = idx.sizes(exif=True)
    assert set(sizes(idx).values())=={(30,20)} and w.tolist()==[30]*8+[20]*9 and h.tolist()==[20]*8+[30]*9

odd = [b'a b.jpg', 'ä €.jpg'.encode(), b'\xff\xfe.jpg', b'x'*251+b'.jpg', b'new\nline.jpg', b'%s"\'\\.jpg', b'trailing .jpg', b'UP.JPEG']
def test_odd_names_and_the_order_of_bytes(tmp_path):
    for folder in (b'a/b/c/d', b'a.b', b'a', b'a-b', b'\xc3'):
        for n in odd:
            p = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), folder, n)))
            p.parent.mkdir(parents=True, exist_ok=True)
            image().save(p.open('wb'), 'jpeg')
    idx = index_folder(tmp_path)
    found = [idx.path(i) for i in range(len(idx))]
    assert idx.table['name'].tolist()==sorted(folder+b'/'+n for folder in (b'a/b/c/d', b'a.b', b'a', b'a-b', b'\xc3') for n in odd)
    assert all(p.is_file() for p in found) and sorted(found)==sorted(get_image_files(tmp_path))
    assert image_infos(found)==[ImageInfo(30,20)]*40 and names(index_folder(tmp_path))==names(idx)

def test_the_files_are_those_of_fastai(tmp_path):
    for n in ('x/a.jpg','x/.hidden.jpg','.git/a.jpg','x/a.txt','x/a.PNG','x/.b/c.jpg','a.jpg.txt','elsewhere/cls/a.webp'):
        save(tmp_path/n, format='png')
    (tmp_path/'linked').symlink_to('elsewhere/cls')
    idx = index_folder(tmp_path)
    assert names(idx)==['elsewhere/cls/a.webp','linked/a.webp','x/a.PNG','x/a.jpg']
    assert sorted(idx.path(i) for i in range(len(idx)))==sorted(get_image_files(tmp_path))
    (tmp_path/'x/up').symlink_to('..')
    assert names(index_folder(tmp_path))==names(idx), 'a link back up is not followed for ever'

def test_only_some_folders(tmp_path):
    for n in ('train/a/x.jpg','val/a/x.jpg','other/x.jpg','x.jpg'): save(tmp_path/n)
    assert names(index_folder(tmp_path, only=['train','val']))==['train/a/x.jpg','val/a/x.jpg']

def test_empty_folder_and_no_folder(tmp_path):
    idx = index_folder(tmp_path)
    assert len(idx)==0 and not idx.bad and [len(o) for o in idx.sizes(exif=True)]==[0,0] and len(index_folder(tmp_path))==0
    assert image_infos([])==[]
    save(tmp_path/'a.jpg')
    assert names(index_folder(tmp_path))==['a.jpg']
    for bad in (tmp_path/'none', tmp_path/'a.jpg'):
        with pytest.raises(ValueError, match='is no folder: give one'): index_folder(bad)

def test_a_list_and_its_folder_share_the_table(tmp_path, reads):
    files = [save(tmp_path/k/'x.jpg', 20+i) for i,k in enumerate('abcd')]
    assert [i.width for i in image_infos(files[::-1])]==[23,22,21,20]
    assert len(index_folder(tmp_path))==4 and len(reads)==4
    save(files[0], 99)
    later(files[0])
    files[3].unlink()
    assert [i.width for i in image_infos([files[1], files[0], files[1]])]==[21,99,21] and reads[4:]==['x.jpg']
    assert list(open_index(tmp_path/name)['name'])==[b'a/x.jpg',b'b/x.jpg',b'c/x.jpg']
    assert len(index_folder(tmp_path))==3 and len(reads)==5
    assert [i.checked for i in image_infos(files[:2], check=True)]==[True]*2
    assert open_index(tmp_path/name)['checked'].tolist()==[True,True,False]
    assert image_infos([files[3], tmp_path])==[ImageInfo(0, 0, error='FileNotFoundError: No such file or directory'),
                                               ImageInfo(0, 0, error='OSError: this is no file')]

def test_many_files_in_processes(tmp_path):
    data = save(tmp_path/'0/0.jpg').read_bytes()
    for i in range(1, 100):
        (tmp_path/f'{i%7}').mkdir(exist_ok=True)
        (tmp_path/f'{i%7}/{i}.jpg').write_bytes(data[:len(data)//2] if i==70 else data)
    idx = index_folder(tmp_path, check=True, workers=2)
    assert len(idx)==99 and idx.table['checked'].all() and [p.name for p,_ in idx.bad]==['70.jpg']
    assert sizes(idx)=={n: (30,20) for n in names(idx)}

def test_another_place_when_the_folder_cannot_be_written(tmp_path, home, reads):
    save(tmp_path/'a.jpg')
    (tmp_path/name).mkdir() # Root may write into any folder, but not over this one
    file = index_folder(tmp_path).file
    assert file.parent==home/'cache/fastai_fastimagenet' and index_folder(tmp_path).file==file and reads==['a.jpg']
    file.unlink()
    file.parent.rmdir()
    file.parent.touch()
    file = index_folder(tmp_path).file
    assert file.parent==home and index_folder(tmp_path).file==file and reads==['a.jpg']*2
    file.unlink()
    file.mkdir()
    assert names(index_folder(tmp_path))==['a.jpg'] and index_folder(tmp_path).file is None
    with pytest.raises(OSError, match='cannot be written to any of'): save_index(tmp_path, np.zeros(0, index_dtype(1)))
    assert not list(home.rglob('*.npy.*')) and len(list(tmp_path.iterdir()))==2, 'nothing is left of a failed attempt'

@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid()==0, reason='root may write anywhere')
def test_read_only_folder(tmp_path, home):
    save(tmp_path/'a.jpg')
    tmp_path.chmod(0o555)
    assert index_folder(tmp_path).file.parent==home/'cache/fastai_fastimagenet'
    tmp_path.chmod(0o755)

def test_what_is_no_index_is_named_and_made_again(tmp_path):
    save(tmp_path/'a.jpg')
    index_folder(tmp_path)
    whole = (tmp_path/name).read_bytes()
    out = io.BytesIO()
    np.save(out, np.zeros(2, index_dtype(5).descr[:-1]))
    numbers = io.BytesIO()
    np.save(numbers, np.zeros(3))
    for data in (b'', b'{ broken', whole[:50], whole[:-1], out.getvalue(), numbers.getvalue()):
        (tmp_path/name).write_bytes(data)
        with pytest.raises(ValueError, match=name): open_index(tmp_path/name)
        assert names(index_folder(tmp_path))==['a.jpg'] and (tmp_path/name).read_bytes()==whole
    with pytest.raises(FileNotFoundError): open_index(tmp_path/'none.npy')

def test_rows_are_sorted_when_they_are_saved(tmp_path):
    rows = np.zeros(4, index_dtype(9))
    rows['name'],rows['width'] = [b'b/a',b'b',b'b.a',b'a'],range(4)
    table = open_index(save_index(tmp_path, rows))
    assert table['name'].tolist()==[b'a',b'b',b'b.a',b'b/a'] and table['width'].tolist()==[3,1,2,0] and not table.flags.writeable

def test_nobody_reads_half_a_table(tmp_path):
    tables = [np.full(n, np.zeros(1, index_dtype(20))[0]) for n in (10,50_000)]
    save_index(tmp_path, tables[0])
    def write(t):
        for _ in range(20): save_index(tmp_path, t)
    with ThreadPoolExecutor(2) as threads:
        jobs = [threads.submit(write, t) for t in tables]
        while not all(j.done() for j in jobs): assert len(open_index(tmp_path/name)) in (10,50_000)
        for j in jobs: j.result()
    assert [p.name for p in tmp_path.iterdir()]==[name]

def test_pixels_in_a_common_file(tmp_path):
    rows = np.zeros(3, index_dtype(9))
    rows['name'],rows['width'],rows['height'],rows['kind'],rows['orientation'] = [b'a/x.jpg',b'a/y.jpg',b'b/z.jpg'],[4,5,6],[7,8,9],RAW,1
    rows['file'],rows['offset'] = [0,0,1],[0,84,0]
    save_index(tmp_path, rows)
    with pytest.raises(ValueError, match='pixels-000.raw is missing'): index_folder(tmp_path)
    (tmp_path/'pixels-000.raw').write_bytes(bytes(204))
    (tmp_path/'pixels-001.raw').write_bytes(bytes(161))
    with pytest.raises(ValueError, match='pixels-001.raw is missing or shorter than the 162 bytes'): index_folder(tmp_path)
    (tmp_path/'pixels-001.raw').write_bytes(bytes(162))
    save(tmp_path/'other.jpg')
    assert sizes(index_folder(tmp_path, check=True))=={'a/x.jpg': (4,7), 'a/y.jpg': (5,8), 'b/z.jpg': (6,9)}
    assert image_infos([tmp_path/'other.jpg'])==[ImageInfo(30,20)] and len(index_folder(tmp_path))==3, 'a list of files does not replace it'

def private_memory():
    "Bytes that only this process has"
    kb = [int(l.split()[1]) for l in open('/proc/self/smaps_rollup') if l.startswith(('Private_Clean','Private_Dirty'))]
    return 1024*sum(kb)

def use(idx):
    "What a loader does with an index; the growth of memory, and proofs"
    before = private_memory()
    w,h = idx.sizes()
    paths = [idx.path(i) for i in range(0, len(idx), 1000)]
    return private_memory()-before,int(w.sum()+h.sum()),paths[-1].name,int(idx.table['size'].sum())

@pytest.mark.skipif(not os.path.exists('/proc/self/smaps_rollup'), reason='Linux only')
def test_as_many_as_imagenet(tmp_path):
    n = 1_300_000
    rows = np.zeros(n, index_dtype(40))
    rows['name'] = np.char.mod('train/n%08d.JPEG', np.arange(n))
    rows['size'],rows['width'],rows['height'] = 110_000,500,375
    file = save_index(tmp_path, rows)
    idx = ImageIndex(tmp_path, open_index(file), file, [])
    assert idx.table['kind'].max()==0 # This process has all pages of the file, so that those of the workers count as shared
    for grown,*rest in WorkerPool(partial(use, idx), 2).run([(), ()]):
        assert grown<50e6, f'{grown/1e6:.0f} MB'
        assert rest==[n*875, 'n01299000.JPEG', n*110_000]

def test_folders_that_are_not_asked_for_stay(tmp_path):
    for d in ('train/a','test'):
        (tmp_path/d).mkdir(parents=True)
        for i in range(3): Image.new('RGB', (20+i,10)).save(tmp_path/d/f'{i}.png')
    assert len(index_folder(tmp_path))==6
    before = (tmp_path/'.fastimagenet_index.npy').stat().st_ino
    assert len(index_folder(tmp_path, only=['train']))==6 and (tmp_path/'.fastimagenet_index.npy').stat().st_ino==before
    (tmp_path/'train/a/0.png').unlink()
    assert len(index_folder(tmp_path, only=['train']))==5
    assert len(index_folder(tmp_path))==5

def test_links_that_lead_in_a_circle(tmp_path):
    for a,b in ('ab','ba'):
        (tmp_path/a).mkdir()
        Image.new('RGB', (20,10)).save(tmp_path/a/'0.png')
        (tmp_path/a/'link').symlink_to(tmp_path/b)
    names = index_folder(tmp_path).table['name'].tolist()
    assert names==[b'a/0.png', b'a/link/0.png', b'b/0.png', b'b/link/0.png']
