"Copies of images: complete, alike however they came about, and nothing is done twice"
import fcntl, hashlib, io, json, os, shutil, signal, subprocess, sys, time, zlib
from collections import namedtuple
from pathlib import Path
import numpy as np, pandas as pd, pytest
from PIL import Image
from fastai_fastimagenet import copies, presize as module
from fastai_fastimagenet.decode import JPEG, RAW, read_header, decode_strictly
from fastai_fastimagenet.index import index_folder
from fastai_fastimagenet.photos import render
from fastai_fastimagenet.presize import presize
from procs import run

here = Path(__file__).parent
command = [sys.executable, '-m', 'fastai_fastimagenet.presize']

def photo(file, i, short=100, **kwargs):
    file.parent.mkdir(parents=True, exist_ok=True)
    render(i, short=short)[0].save(file, quality=90, **kwargs)

def content(d):
    "Name -> hash of all files below `d`"
    return {str(f.relative_to(d)): hashlib.sha1(f.read_bytes()).hexdigest() for f in sorted(d.rglob('*')) if f.is_file()}

def times(d): return {str(f): f.stat().st_mtime_ns for f in sorted(d.rglob('*'))}

def manifest(d): return pd.read_csv(d/'manifest.csv', keep_default_na=False).set_index('name')

@pytest.fixture(scope='module')
def src(tmp_path_factory):
    "240 small photos, some smaller than the copies, three files that are none"
    d = tmp_path_factory.mktemp('presize')/'src'
    for i in range(240): photo(d/('train' if i%4 else 'val')/f'c{i%3}'/f'{i}.JPEG', i, 200 if i%9 else 40)
    for name,b in (('cut',(d/'train/c1/1.JPEG').read_bytes()[:1500]), ('empty',b''), ('text',b'no image')): (d/f'train/c0/{name}.JPEG').write_bytes(b)
    return d

@pytest.fixture
def small(src, tmp_path):
    "20 of them, to be changed"
    d = tmp_path/'small'
    for i in range(20): photo(d/f'train/c{i%3}/{i}.JPEG', i, 60)
    return d

@pytest.mark.parametrize('format', ('jpeg','raw'))
def test_killed_runs_go_on(src, tmp_path, format):
    args = ['--short', '48,96', '--format', format, '--workers', 2]
    r = run(*command, src, tmp_path/'a', *args)
    assert '243 images, 240 of them copied now' in r.stdout and 'failures: 3, see' in r.stdout
    killed = run(sys.executable, here/'presize_kills.py', 7, src, tmp_path/'b', *map(str, args)).stdout
    counts = [int(o) for o in killed.split() if o.isdigit()]
    assert len(counts)==10 and counts==sorted(counts) and 0<counts[5]<counts[-1]<241
    last = run(*command, src, tmp_path/'b', *args).stdout
    n = int(last.split(' images, ')[1].split()[0])
    assert 0<n<=241-counts[-1] # What was in the journal is not made again
    assert content(tmp_path/'a')==content(tmp_path/'b')
    presize(src, tmp_path/'c', (48,96), format, workers=0)
    assert content(tmp_path/'a')==content(tmp_path/'c')

@pytest.mark.parametrize('format', ('jpeg','raw'))
def test_second_run_changes_nothing(src, tmp_path, format):
    presize(src, tmp_path, (48,96), format, workers=0)
    before = times(tmp_path)
    failures = presize(src, tmp_path, (48,96), format, workers=0)
    assert times(tmp_path)==before
    assert [f.name for f,_ in failures]==['cut.JPEG','empty.JPEG','text.JPEG']

def test_copies(src, tmp_path, capsys):
    presize(src, tmp_path, (48,96), workers=0)
    assert '243 images, 240 of them copied now' in capsys.readouterr().out
    for short in (48,96):
        d = tmp_path/str(short)
        m = manifest(d)
        assert len(m)==243 and list(m.index)==sorted(m.index) and sum(m.error!='')==3
        for name,r in m[m.error==''].iterrows():
            f,b = src/name,(d/name).read_bytes()
            h = read_header(d/name)
            w,_,_ = sides = read_header(f)[1],read_header(f)[2],min(read_header(f)[1:3])
            assert (h.width,h.height)==(r.width,r.height) and min(h.width,h.height)==min(short, sides[2])
            assert abs(h.width/h.height-sides[0]/sides[1])<.51*max(sides[:2])/sides[2]/min(h[1:3])*2
            assert (r.bytes,r.sha1)==(len(b),hashlib.sha1(b).hexdigest()) and h.orientation==1
            assert r.source_size==f.stat().st_size and r.source_mtime==f.stat().st_mtime_ns==(d/name).stat().st_mtime_ns
            if sides[2]<=short: assert b==f.read_bytes()
        before = times(d)
        index = index_folder(d, check=True)
        assert len(index)==240 and index.table['checked'].all() and set(index.table['kind'])=={JPEG} and not index.bad
        assert times(d)==before # The index was right
        assert sum(f.is_file() for f in d.rglob('*'))==242

def psnr(a, b): return 10*np.log10(255**2/max(1e-3, np.mean((np.asarray(a, float)-np.asarray(b, float))**2)))

def test_pixels(src, tmp_path):
    presize(src, tmp_path/'jpeg', (48,96), workers=0, quality=95)
    presize(src, tmp_path/'raw', (48,96), 'raw', workers=0)
    for short in (48,96):
        index,pixels = index_folder(tmp_path/f'raw/{short}'),np.memmap(tmp_path/f'raw/{short}/pixels-000.raw', mode='r')
        assert len(index)==240 and set(index.table['kind'])=={RAW} and len(manifest(tmp_path/f'raw/{short}'))==243
        for i in range(0, 240, 7):
            r = index.table[i]
            raw = pixels[r['offset']:][:r['size']].reshape(r['height'], r['width'], 3)
            want = Image.open(src/os.fsdecode(r['name'])).resize((r['width'],r['height']), Image.BICUBIC)
            assert psnr(raw, want)>28
            assert psnr(raw, Image.open(tmp_path/f'jpeg/{short}'/os.fsdecode(r['name'])))>22 # Colours at half the size

def test_places_do_not_overlap(src, tmp_path, monkeypatch):
    monkeypatch.setattr(copies, '_largest', 100_000)
    presize(src, tmp_path, 48, 'raw', workers=0)
    t = index_folder(tmp_path/'48').table
    assert len(set(t['file']))>10
    for n in set(t['file']):
        o = np.sort(t[t['file']==n], order='offset')
        assert (o['offset'][1:]>=o['offset'][:-1]+o['size'][:-1]).all() and o['offset'][-1]+o['size'][-1]<=100_000

def test_odd_files(tmp_path):
    d = tmp_path/'src'
    d.mkdir()
    im,exif = render(3, short=90)[0],Image.Exif()
    exif[0x0112] = 6
    im.convert('CMYK').save(d/'cmyk.jpg')
    im.convert('L').save(d/'gray.jpg')
    im.save(d/'progressive.jpg', progressive=True)
    im.save(d/'png.JPEG', 'PNG')
    im.convert('P').save(d/'palette.png')
    im.save(d/'turned.jpg', exif=exif)
    im.resize((40,30)).save(d/'turned_small.jpg', exif=exif)
    im.resize((40,30)).save(d/'small.png')
    Image.fromarray((np.asarray(im.convert('L'), np.uint16)*257)).save(d/'deep.png')
    (d/'sub').mkdir()
    im.save(d/'sub/\xe9 a,"b".jpg')
    Image.new('RGB', (2000,3)).save(d/'line.png')
    failures = [presize(d, tmp_path/f'{format}-{exif}', 48, format, workers=0, exif=exif) for format in ('jpeg','raw') for exif in (False,True)]
    assert failures==[[]]*4
    for exif in (False,True):
        out = tmp_path/f'jpeg-{exif}/48'
        for name in ('cmyk.jpg','gray.jpg','progressive.jpg','png.JPEG','palette.png','deep.png','sub/\xe9 a,"b".jpg'):
            h = read_header(out/name)
            assert h[0]==JPEG and h.orientation==1 and min(h[1:3])==48
            want = im.convert('L').convert('RGB') if name in ('gray.jpg','deep.png') else im
            assert psnr(Image.open(out/name), want.resize(h[1:3], Image.BICUBIC))>(20 if name in ('cmyk.jpg','palette.png') else 24), name
        assert read_header(out/'line.png')[:3]==(JPEG,2000,3) and read_header(out/'small.png')[:3]==(JPEG,40,30)
        size = im.size[::-1] if exif else im.size
        turned,small = Image.open(out/'turned.jpg'),Image.open(out/'turned_small.jpg')
        assert (turned.width>turned.height)==(size[0]>size[1]) and small.size==((30,40) if exif else (40,30))
        assert not turned.getexif() and not small.getexif()
        want = im.transpose(Image.ROTATE_270) if exif else im
        assert psnr(turned, want.resize(turned.size, Image.BICUBIC))>24
        raw = index_folder(tmp_path/f'raw-{exif}/48')
        jpeg = index_folder(out)
        assert (raw.table['name']==jpeg.table['name']).all() and (raw.table['width']==jpeg.table['width']).all() and (raw.table['orientation']==1).all()

def damaged(b, at=.5): return b[:int(len(b)*at)]+b'\xff\xd3'+b[int(len(b)*at)+2:]

def test_strict(small, tmp_path):
    f = small/'train/c1/4.JPEG'
    f.write_bytes(damaged(f.read_bytes()))
    for workers in (0,2):
        with pytest.raises(ValueError, match='4.JPEG cannot be used'): presize(small, tmp_path/f'{workers}', 32, workers=workers, strict=True)
    [(name,why)] = presize(small, tmp_path/'0', 32, workers=0)
    assert name==f and why and manifest(tmp_path/'0/32').error.loc['train/c1/4.JPEG']==why
    with pytest.raises(ValueError, match='4.JPEG cannot be used'): presize(small, tmp_path/'0', 32, workers=0, strict=True)

@pytest.mark.parametrize('format', ('jpeg','raw'))
def test_sources_change(small, tmp_path, capsys, format):
    out = tmp_path/'out'
    presize(small, out, (24,32), format, workers=0)
    before = times(out/'32') if format=='jpeg' else None
    photo(small/'train/c3/new.JPEG', 50, 60)
    photo(small/'train/c0/0.JPEG', 51, 70) # Another size
    (small/'train/c1/1.JPEG').unlink()
    f = small/'train/c2/2.JPEG'
    good = f.read_bytes()
    f.write_bytes(damaged(good))
    g = small/'train/c0/3.JPEG'
    g.write_bytes(b'nothing')
    failures = presize(small, out, (24,32), format, workers=0)
    assert [p for p,_ in failures]==[g,f]
    assert capsys.readouterr().out.splitlines()[-1].startswith('20 images, 2 of them copied now')
    def check(n_bad):
        for s in (24,32):
            m,names = manifest(out/f'{s}'),{str(p.relative_to(small)) for p in small.rglob('*.JPEG')}
            assert set(m.index)==names and sum(m.error!='')==n_bad
            index = index_folder(out/f'{s}')
            assert {os.fsdecode(n) for n in index.table['name']}==set(m.index[m.error==''])
            if format=='jpeg': assert {str(p.relative_to(out/f'{s}')) for p in (out/f'{s}').rglob('*.JPEG')}==set(m.index[m.error==''])
            else:
                pixels = np.memmap(out/f'{s}/pixels-000.raw', mode='r')
                for r in index.table:
                    raw = pixels[r['offset']:][:r['size']].reshape(r['height'], r['width'], 3)
                    assert psnr(raw, Image.open(small/os.fsdecode(r['name'])).resize((r['width'],r['height']), Image.BICUBIC))>26
    check(2)
    if format=='jpeg':
        now = times(out/'32')
        changed = {Path(k).name for k in now if now[k]!=before.get(k)}
        assert changed-{'manifest.csv','.fastimagenet_index.npy','32','train','c0','c1','c2','c3'}=={'new.JPEG','0.JPEG'}
    f.write_bytes(good) # Mended
    g.unlink()
    assert presize(small, out, (24,32), format, workers=0)==[]
    check(0)
    if format=='jpeg':
        presize(small, tmp_path/'again', (24,32), format, workers=0)
        assert content(out)==content(tmp_path/'again')

def test_lost_copies_are_made_again(small, tmp_path):
    for format,lost in (('jpeg',['train/c0/0.JPEG','train/c1/1.JPEG']), ('raw',['pixels-000.raw'])):
        out = tmp_path/format
        presize(small, out, 32, format, workers=0)
        before = content(out)
        for n in (*lost, '.fastimagenet_index.npy'): (out/'32'/n).unlink()
        presize(small, out, 32, format, workers=0)
        assert content(out)==before

def test_another_size_later(small, tmp_path, capsys):
    presize(small, tmp_path/'a', 24, workers=0)
    before = times(tmp_path/'a/24')
    presize(small, tmp_path/'a', (24,32), workers=0)
    after = times(tmp_path/'a/24')
    assert {k: v for k,v in after.items() if 'JPEG' in k}=={k: v for k,v in before.items() if 'JPEG' in k} and len(index_folder(tmp_path/'a/32'))==20
    presize(small, tmp_path/'b', (24,32), workers=0)
    assert content(tmp_path/'a/32')==content(tmp_path/'b/32')

def test_unreadable_files_are_tried_again(small, tmp_path, monkeypatch):
    def fails(path):
        if str(path).endswith('/5.JPEG'): raise OSError(5, 'Input/output error')
        return read_file(path)
    read_file = module.read_file
    with monkeypatch.context() as m:
        m.setattr(module, 'read_file', fails)
        [(f,why)] = presize(small, tmp_path/'a', 32, workers=0)
    assert f.name=='5.JPEG' and 'Input/output error' in why and manifest(tmp_path/'a/32').error.loc['train/c2/5.JPEG']==why
    assert presize(small, tmp_path/'a', 32, workers=0)==[]
    presize(small, tmp_path/'b', 32, workers=0)
    assert content(tmp_path/'a')==content(tmp_path/'b')

@pytest.mark.parametrize('format', ('jpeg','raw'))
def test_disk_too_small(small, tmp_path, monkeypatch, format):
    usage = namedtuple('usage', 'total used free')
    monkeypatch.setattr(shutil, 'disk_usage', lambda p: usage(10**9, 10**9-5000, 5000))
    with pytest.raises(ValueError, match='need .* MB, .* has 0.0 MB free. Make room'): presize(small, tmp_path/'out', 32, format, workers=0)
    assert not (tmp_path/'out/32').exists()
    monkeypatch.undo()
    presize(small, tmp_path/'out', 32, format, workers=0)
    monkeypatch.setattr(shutil, 'disk_usage', lambda p: usage(10**9, 10**9, 0))
    presize(small, tmp_path/'out', 32, format, workers=0) # Nothing more is needed

def test_full_disk_while_writing(small, tmp_path, monkeypatch):
    def fails(*args): raise OSError(28, 'No space left on device')
    with monkeypatch.context() as m:
        m.setattr(module, 'write_file', fails)
        with pytest.raises(OSError, match='No space'): presize(small, tmp_path/'out', 32, workers=0)
    assert presize(small, tmp_path/'out', 32, workers=0)==[]

def test_one_run_at_a_time(small, tmp_path, monkeypatch):
    out = tmp_path/'out'
    (out/'.presize').mkdir(parents=True)
    with open(out/'.presize/lock', 'a') as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        began = time.monotonic()
        monkeypatch.setattr(module, 'time', type('t', (), dict(sleep=time.sleep, monotonic=lambda: 20*time.monotonic(), time=time.time)))
        with pytest.raises(ValueError, match='Another run is writing'): presize(small, out, 32, workers=0)
        assert time.monotonic()-began>.4
    assert presize(small, out, 32, workers=0)==[]

def test_leftovers_are_removed(small, tmp_path):
    presize(small, tmp_path/'a', 32, workers=0)
    before = content(tmp_path/'a')
    (tmp_path/'a/32/.fastimagenet_index.npy.ab12').write_bytes(b'half')
    (tmp_path/'a/32/train/c0/0.JPEG').rename(tmp_path/f'a/32/train/c0/.{zlib.crc32(b"0.JPEG"):08x}.part')
    photo(small/f'train/c0/{"x"*250}.JPEG', 30, 60) # As long as a name can be
    presize(small, tmp_path/'b', 32, workers=0)
    before = content(tmp_path/'b')
    presize(small, tmp_path/'a', 32, workers=0)
    assert content(tmp_path/'a')==before

def test_killed_while_finishing(small, tmp_path, monkeypatch):
    "The index of the second size is there, its manifest is not; then neither is"
    presize(small, tmp_path/'a', (24,32), workers=0)
    def until(fails):
        def f(file, *args):
            if str(fails) in str(file): raise KeyboardInterrupt
            return real(file, *args)
        return f
    for name,fails in (('write_file','b/32/manifest'), ('save_index','b/32'), ('write_file','b/24/manifest')):
        real = getattr(copies, name)
        with monkeypatch.context() as m:
            m.setattr(copies, name, until(fails))
            with pytest.raises(KeyboardInterrupt): presize(small, tmp_path/'b', (24,32), workers=0)
        presize(small, tmp_path/'b', (24,32), workers=0)
        assert content(tmp_path/'a')==content(tmp_path/'b')
        photo(small/f'train/c0/{name}.JPEG', 30, 60)
        presize(small, tmp_path/'a', (24,32), workers=0)

def test_torn_journal(small, tmp_path):
    presize(small, tmp_path/'a', 32, workers=0)
    before = content(tmp_path/'a')
    (tmp_path/'a/32/manifest.csv').unlink()
    (tmp_path/'a/.presize/journal').write_bytes(b'\n["train/c0/0.JPEG", {"32": [12, 1')
    presize(small, tmp_path/'a', 32, workers=0)
    assert content(tmp_path/'a')==before

def test_bad_input(small, tmp_path):
    for message,kwargs in (('is no folder', dict(src=tmp_path/'none')), ('must not be', dict(dst=small)), ('must not be', dict(dst=small/'x')), ('`short`', dict(short='160,a')),
                           ('must not be', dict(src=small/'train', dst=small, short=32)) if (small/'32').exists() else ('`short`', dict(short=7)), ('`short`', dict(short=())),
                           ('`short`', dict(short=12.5)), ('`format`', dict(format='png')), ('`quality`', dict(quality=0)), ('`quality`', dict(quality=101)), ('`workers`', dict(workers=-1))):
        with pytest.raises(ValueError, match=message): presize(**{**dict(src=small, dst=tmp_path/'out', short=32), **kwargs})
    assert not (tmp_path/'out').exists()
    (tmp_path/'empty').mkdir()
    with pytest.raises(ValueError, match='holds no images'): presize(tmp_path/'empty', tmp_path/'deep/out', 32)
    assert not (tmp_path/'deep').exists() and not list((tmp_path/'empty').iterdir()), 'nothing is left of a run that was refused'
    (tmp_path/'own/32').mkdir(parents=True)
    with pytest.raises(ValueError, match='was there before'): presize(small, tmp_path/'own', 32)
    assert [f.name for f in (tmp_path/'own').iterdir()]==['32']
    presize(small, tmp_path/'done', 32, workers=0)
    for kwargs in (dict(quality=80), dict(format='raw'), dict(exif=True), dict(src=small/'train')):
        with pytest.raises(ValueError, match='were made with'): presize(**{**dict(src=small, dst=tmp_path/'done', short=32), **kwargs})

def test_time_left_may_be_days(): assert [module._clock(s) for s in (59.9, 3661, 26*3600)]==['00:00:59','01:01:01','26:00:00']

def test_command_line(small, tmp_path):
    r = run(*command, tmp_path/'none', ok=False)
    assert r.stderr.startswith('fastimagenet-presize: ') and 'Traceback' not in r.stderr and len(r.stderr.splitlines())==1 and r.returncode==1
    (small/'train/c0/bad.JPEG').write_bytes(b'x')
    r = run(*command, small, '--short', '32', '--workers', '1', '--exif', '--quality', '80')
    assert '21 images, 20 of them copied now' in r.stdout and 'failures: 1, see manifest.csv' in r.stdout and r.stderr==''
    assert len(index_folder(small.with_name('small-sz')/'32'))==20

def test_interrupted(src, tmp_path):
    p = subprocess.Popen([*map(str, command), src, tmp_path/'out', '--short', '64', '--workers', '2'], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
    until = time.time()+60
    while not (tmp_path/'out/.presize/journal').exists() and time.time()<until: time.sleep(.005)
    os.killpg(p.pid, signal.SIGINT)
    out,err = p.communicate(timeout=60)
    assert p.returncode==1 and err.strip()=='fastimagenet-presize: interrupted; the same command goes on'
    presize(src, tmp_path/'out', 64, workers=0)
    presize(src, tmp_path/'b', 64, workers=0)
    assert content(tmp_path/'out')==content(tmp_path/'b')
