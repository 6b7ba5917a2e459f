"The built-in photos: the same everywhere, rectangular, siblings that differ in a detail"
import hashlib
from collections import Counter
import numpy as np, pytest
from fastai_fastimagenet.photos import classes, photos, render

def test_same_bytes_however_it_is_made(tmp_path):
    a,b = [photos(40, 20, short=48, path=tmp_path/n) for n in 'ab']
    digest = lambda p: {f.relative_to(p): hashlib.sha1(f.read_bytes()).hexdigest() for f in p.rglob('*.jpg')}
    assert digest(a)==digest(b) and len(set(digest(a).values()))==60
    assert not set(digest(photos(40, 20, short=48, seed=1, path=tmp_path/'a')).values()) & set(digest(a).values())

def test_shapes():
    shapes = [render(i, short=48)[0].size for i in range(300)]
    assert all(min(s)==48 for s in shapes)
    landscape,portrait = sum(w>h for w,h in shapes),sum(w<h for w,h in shapes)
    assert landscape>portrait>40 and 250<landscape+portrait<300

def test_classes_are_balanced(tmp_path):
    p = photos(200, 100, short=32, path=tmp_path)
    for split,n in (('train',10), ('val',5)):
        assert Counter(f.parent.name for f in (p/split).rglob('*.jpg'))=={c: n for c in classes}

def test_splits_and_seeds_differ():
    px = lambda *a, **k: np.asarray(render(*a, short=48, **k)[0]).tobytes()
    assert len({px(3), px(3,'val'), px(3, seed=1), px(23)})==4

@pytest.mark.parametrize('kw', [dict(n_train=0), dict(n_valid=-1), dict(short=1.5), dict(n_train=True), dict(seed=-1)])
def test_bad_arguments(kw, tmp_path):
    with pytest.raises(ValueError, match=next(iter(kw))): photos(path=tmp_path, **kw)

def test_the_split_is_checked():
    with pytest.raises(ValueError, match="`split` must be 'train' or 'val', got 'valid'"): render(0, 'valid')

def full_disk(i, **kwargs):
    if i>10: raise OSError('no space')

def test_no_half_data_set(tmp_path, monkeypatch):
    "A rendering that dies leaves nothing that looks complete"
    import fastai_fastimagenet.photos as ph
    monkeypatch.setattr(ph, '_write', full_disk)
    with pytest.raises(OSError, match='no space'): photos(20, 20, short=32, path=tmp_path)
    assert not list(tmp_path.iterdir())
