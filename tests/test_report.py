"One page about real runs"
import html.parser, io, json, subprocess, sys
from pathlib import Path
import pandas as pd, pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from fastai.vision.all import ImageDataLoaders, Learner, Resize, accuracy
from fastai.callback.tensorboard import TensorBoardCallback
from fastai_fastimagenet.all import TensorBoard, resnet_small
from fastai_fastimagenet.phase import Phase
from fastai_fastimagenet.schedule import Schedule
from procs import run

bin = Path(sys.executable).parent

@pytest.fixture(scope='module')
def runs(small_photos, tmp_path_factory):
    "Two runs by the script"
    d = tmp_path_factory.mktemp('runs')
    Schedule([Phase(1, size=32, bs=20, lr=(.02,.1), min_scale=.5), Phase(1, size=48, lr=(.1,0), rect=True)]).save(d/'s.json')
    for name,seed in (('first',0),('a <b>|c',1)):
        run(bin/'fastimagenet-train', '--data', small_photos, '--schedule', d/'s.json', '--arch', 'resnet_small', '--workers', 0, '--seed', seed,
            '--target-top1', '.99', '--out', d/name)
    return d/'first',d/'a <b>|c'

class Page(html.parser.HTMLParser):
    "What a browser would fetch, and the text"
    def __init__(self, text):
        super().__init__()
        self.fetched,self.words,self.open = [],[],[]
        self.feed(text)
    def handle_starttag(self, tag, attrs):
        if tag in ('script','link','img','iframe','object'): self.fetched.append((tag,attrs))
        self.fetched += [(tag,k,v) for k,v in attrs if k in ('src','href','xlink:href') and not v.startswith('#')]
    def handle_data(self, text): self.words.append(text)

def test_tensorboard_has_every_tag(runs):
    events = EventAccumulator(str(runs[0]/'tensorboard')).Reload()
    tags = set(events.Tags()['scalars'])
    assert {'losses/xent','losses/train_1','losses/train_5','losses/test_1','losses/test_5','sizes/lr','sizes/batch','sizes/image','sizes/world','times/step',
            'times/data','times/eval_sec','net/recv_gbit','net/transmit_gbit','memory/rss_gb','epoch','times/images_s','stalls/data','stalls/compute',
            'times/minutes','times/minutes_predicted'} <= tags
    rows = pd.read_csv(runs[0]/'history.csv')
    assert [e.value for e in events.Scalars('losses/test_1')]==pytest.approx(list(100*rows.top1), abs=1e-4)
    assert [e.step for e in events.Scalars('losses/test_1')]==[400,800] and events.Scalars('sizes/image')[-1].value==48
    assert events.Scalars('times/minutes_predicted')[-1].value==pytest.approx(rows.minutes.iloc[-1], rel=.01) # At the end nothing is left

def test_beside_the_tensorboard_of_fastai(small_photos, tmp_path):
    "Two writers, two folders: each has its own tags"
    dls = ImageDataLoaders.from_folder(small_photos, valid='val', bs=40, item_tfms=Resize(32), num_workers=0)
    learn = Learner(dls, resnet_small(20, 4), metrics=accuracy)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=[TensorBoard(tmp_path/'ours', every=5), TensorBoardCallback(tmp_path/'theirs', trace_model=False, log_preds=False)])
    ours,theirs = [set(EventAccumulator(str(tmp_path/d)).Reload().Tags()['scalars']) for d in ('ours','theirs')]
    assert {'losses/xent','losses/test_1'} <= ours and {'train_loss','accuracy'} <= theirs and not ours & theirs

def test_parts_are_the_time(runs):
    rows = pd.read_csv(runs[0]/'history.csv')
    parts = rows[['compute_s','data_s','eval_s','switch_s','other_s']]
    assert (parts>=0).all().all() and list(parts.sum(axis=1).cumsum()/60)==pytest.approx(list(rows.minutes), rel=.01)
    assert list(rows.lost)==pytest.approx(list(1-(rows.compute_s+rows.eval_s)/parts.sum(axis=1)), abs=1e-6)

def test_page(runs, tmp_path):
    r = run(bin/'fastimagenet-report', ','.join(map(str, runs)), '--price', '3.5', '--predicted', '1', '--vs-dawn', '--to', tmp_path)
    assert 'report.html' in r.stdout
    page = Page((tmp_path/'report.html').read_text())
    assert not page.fetched # Complete in itself
    words,rows = ' '.join(page.words),pd.read_csv(runs[0]/'history.csv')
    for text in ('first', 'a <b>|c', f'top-1 {100*rows.top1.iloc[-1]:.2f} %', f'${3.5*rows.minutes.iloc[-1]/60:.2f} at $3.5', 'not reached', 'predicted', 'fastai_16xp3.16xlarge',
                 '--target-top1 .99', 'torch ', '0 files', 'waiting for data', 'Gbit/s in'): assert text in words, text
    text = (tmp_path/'report.md').read_text()
    assert text.count('\n|')>=10 and all(l.replace(r'\|', '').count('|')==4 for l in text.splitlines() if l.startswith('|'))

def test_dawn_files(runs):
    run(bin/'fastimagenet-report', runs[0], '--price', '98')
    lines = (runs[0]/'dawn.tsv').read_text().splitlines()
    assert lines[0]=='epoch\thours\ttop1Accuracy\ttop5Accuracy' and len(lines)==3
    rows = [l.split('\t') for l in lines[1:]]
    assert [int(r[0]) for r in rows]==[1,2] and all(len(r)==4 for r in rows)
    hours = [float(r[1]) for r in rows]
    assert hours==sorted(hours) and all(0<=float(v)<=100 for r in rows for v in r[2:])
    history = pd.read_csv(runs[0]/'history.csv')
    assert hours==pytest.approx(list(history.minutes/60), rel=.01) and [float(r[2]) for r in rows]==pytest.approx(list(100*history.top1), abs=1e-3)
    entry = json.loads((runs[0]/'dawn.json').read_text())
    assert {'version','author','authorEmail','framework','codeURL','model','hardware','costPerHour','timestamp','misc'} <= entry.keys() and entry['costPerHour']==98

def test_wrong_folder(tmp_path):
    assert 'holds no run: it has no history.csv' in run(bin/'fastimagenet-report', tmp_path, ok=False).stderr
