"The training script as a user runs it: what it leaves, what it says about bad input, and that it learns"
import csv, json, shutil, signal, subprocess, sys
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from fastai_fastimagenet.models import resnet_small
from fastai_fastimagenet.phase import Phase
from fastai_fastimagenet.schedule import Schedule
from fastai_fastimagenet.loader import class_of, find_images
from fastai_fastimagenet.train import main

exe = Path(sys.executable).parent/'fastimagenet-train'

def run(*args, ok=True):
    r = subprocess.run([exe, *map(str, args)], capture_output=True, text=True)
    assert (r.returncode==0)==ok, r.stdout+r.stderr
    return r

def says(*args):
    "The one line with which the script ends on bad input"
    with pytest.raises(SystemExit) as e: main(**{k.lstrip('-').replace('-','_'): v for k,v in zip(args[::2], args[1::2])})
    assert e.value.code.startswith('fastimagenet-train: ') and len(e.value.code.splitlines())==1
    return e.value.code

def table(path, *phases):
    Schedule(list(phases)).save(path)
    return path

def folder(path, classes=('a','b'), n=6, splits=('train','val')):
    rng = np.random.default_rng(0)
    for split in splits:
        for c in classes:
            (path/split/c).mkdir(parents=True)
            for i in range(n): Image.fromarray(rng.integers(0,255,(40,56,3),np.uint8)).save(path/split/c/f'{i}.jpg')
    return path

quick = Phase(1, size=32, bs=4, lr=.01)

def test_learns_and_leaves_everything(small_photos, tmp_path):
    sched = table(tmp_path/'s.json', Phase(4, size=32, bs=16, lr=(.01,.05), min_scale=.5), Phase(6, bs=20, lr=(.06,.02)),
                  Phase(2, size=48, bs=16, lr=(.02,0), rect=True))
    r = run('--data', small_photos, '--schedule', sched, '--arch', 'resnet_small', '--workers', 0, '--out', tmp_path/'run')
    out = tmp_path/'run'
    rows = list(csv.DictReader((out/'history.csv').open()))
    assert [(int(o['size']),int(o['bs'])) for o in rows]==[(32,16)]*4+[(32,20)]*6+[(48,16)]*2
    assert float(rows[-1]['top5'])>.4, 'chance is .25'
    assert float(rows[-1]['train_loss'])<float(rows[0]['train_loss'])
    assert Schedule.load(out/'schedule.json')==Schedule.load(sched)
    res = json.loads((out/'result.json').read_text())
    assert res['top1']==pytest.approx(float(rows[-1]['top1'])) and {'rect_top1','centre_top1'} <= res.keys()
    saved = torch.load(out/'model.pth')
    assert resnet_small(len(saved['classes'])).load_state_dict(saved['model'])
    header,*lines = [l for l in r.stdout.splitlines() if l.startswith('     ')]
    assert header.split()==['epoch','size','bs','lr','train_loss','valid_loss','top1','top5','images_s','lost','minutes'] and len(lines)==12
    assert r.stdout.splitlines()[-1].startswith('final top-1 ') and '\r' not in r.stdout
    assert 'Warning' not in r.stderr

def test_same_seed_same_result(tmp_path):
    data,sched = folder(tmp_path/'d'),table(tmp_path/'s.json', quick)
    losses = []
    for seed,out in ((0,'a'), (0,'b'), (1,'c')):
        run('--data', data, '--schedule', sched, '--arch', 'resnet_small', '--workers', 0, '--seed', seed, '--out', tmp_path/out)
        losses.append((tmp_path/out/'history.csv').read_text().splitlines()[1].split(',')[4])
    assert losses[0]==losses[1]!=losses[2]

def test_target_and_epochs(tmp_path):
    "Random images of 8 classes: top-5 of .2 is reached at once, top-1 of .99 never"
    data,sched = folder(tmp_path/'d', 'abcdefgh', n=3),table(tmp_path/'s.json', quick)
    args = '--data', data, '--schedule', sched, '--arch', 'resnet_small', '--workers', 0
    r = run(*args, '--epochs', 3, '--target-top5', .2, '--out', tmp_path/'a')
    assert r.stdout.splitlines()[-1].startswith('reached top5 0.2 in ') and ', 1 epochs; final' in r.stdout.splitlines()[-1]
    r = subprocess.run([sys.executable, '-m', 'fastai_fastimagenet.train', *map(str, args), '--epochs', '2', '--target-top1', '.99',
                        '--out', str(tmp_path/'b')], capture_output=True, text=True, check=True)
    assert r.stdout.splitlines()[-1].startswith('top1 0.99 not reached; final') and r.stdout.count('final') == 1
    assert json.loads((tmp_path/'b/result.json').read_text())['epochs']==2==Schedule.load(tmp_path/'b/schedule.json').n_epoch
    assert 'earlier run' in says(*args, '--out', tmp_path/'a')

def test_smoothing_and_rectangles(small_photos, tmp_path):
    "The options change the run, are kept for resuming, and settings of a version that did not know them do too"
    sched = table(tmp_path/'s.json', Phase(2, size=32, bs=16, lr=.05))
    args = '--data', small_photos, '--schedule', sched, '--arch', 'resnet_small', '--workers', 0
    lines = []
    for out,more in (('plain',()), ('smooth',('--label-smoothing', .1)), ('rect',('--rect-train',))):
        run(*args, *more, '--out', tmp_path/out)
        lines.append(list(csv.DictReader((tmp_path/out/'history.csv').open())))
    plain,smooth,rect = [[float(r['train_loss']) for r in rows] for rows in lines]
    assert smooth!=plain!=rect
    file = tmp_path/'rect/settings.json'
    settings = json.loads(file.read_text())
    assert settings['rect_train'] is True and settings['label_smoothing']==0
    file.write_text(json.dumps({k: v for k,v in settings.items() if k!='label_smoothing'}))
    with_result = run('--resume', tmp_path/'rect', ok=False)
    assert 'is finished, its result is in result.json' in with_result.stderr
    for f in (*(tmp_path/'rect/checkpoints').glob('0001*'),tmp_path/'rect/result.json'): f.unlink() # As if it had been killed in the second epoch
    assert 'Resumed from' in run('--resume', tmp_path/'rect').stdout
    again = list(csv.DictReader((tmp_path/'rect/history.csv').open()))
    assert [r['train_loss'] for r in again]==[r['train_loss'] for r in lines[2]]

def test_interrupt(tmp_path):
    "Ctrl-C in the middle: one line, and history, table and model up to there"
    data,sched = folder(tmp_path/'d'),table(tmp_path/'s.json', Phase(10_000, size=32, bs=4, lr=.01))
    p = subprocess.Popen([exe, '--data', data, '--schedule', sched, '--arch', 'resnet_small', '--workers', '0', '--out', tmp_path/'o'],
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                         preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) # Shells start jobs in the background with Ctrl-C ignored
    try:
        while not p.stdout.readline().startswith('         1 '): assert p.poll() is None
        for _ in range(6): # A bare `except:` in fastai's Recorder swallows it in 2 of 800 cases
            p.send_signal(signal.SIGINT)
            try: err = p.communicate(timeout=20)[1]
            except subprocess.TimeoutExpired: continue
            break
    finally: p.kill()
    assert p.returncode==1 and err=='fastimagenet-train: interrupted\n'
    assert {f.name for f in (tmp_path/'o').iterdir()}=={'.lock','history.csv','schedule.json','settings.json','machines.json','checkpoints','tensorboard','model.pth'}

def test_odd_files(tmp_path):
    "Gray, CMYK, RGBA and one-channel images train; damaged ones are counted and listed"
    d = folder(tmp_path/'d', splits=('train','validation'))
    im = Image.open(d/'train/a/0.jpg').copy()
    im.convert('L').save(d/'train/a/gray.jpg')
    im.convert('CMYK').save(d/'train/a/cmyk.jpg')
    im.convert('RGBA').save(d/'train/b/rgba.png')
    (d/'train/b/png_in_disguise.jpg').write_bytes((d/'train/b/rgba.png').read_bytes())
    (d/'train/a/notes.txt').write_text('no image')
    data = (d/'train/a/0.jpg').read_bytes()
    (d/'train/a/cut.jpg').write_bytes(data[:len(data)//2])
    (d/'train/b/empty.jpg').write_bytes(b'')
    (d/'validation/b/text.jpg').write_text('hello')
    r = run('--data', d, '--schedule', table(tmp_path/'s.json', quick), '--arch', 'resnet_small', '--workers', 2, '--out', tmp_path/'o')
    assert '16 training and 12 validation images of 2 classes' in r.stdout and '3 files left out' in r.stdout
    assert {Path(l.split('\t')[0]).name for l in (tmp_path/'o/skipped.txt').read_text().splitlines()}=={'cut.jpg','empty.jpg','text.jpg'}

def test_bad_input(tmp_path):
    d,sched = folder(tmp_path/'d'),table(tmp_path/'s.json', quick)
    ok = '--data', d, '--schedule', sched, '--arch', 'resnet_small', '--out', tmp_path/'o'
    r = run('--data', tmp_path/'none', ok=False)
    assert r.stderr.startswith('fastimagenet-train: ') and 'is no folder' in r.stderr and len(r.stderr.splitlines())==1
    assert 'is no folder' in says('--data', tmp_path/'none')
    (tmp_path/'empty').mkdir()
    assert 'has no folder train' in says('--data', tmp_path/'empty', '--schedule', sched)
    assert 'has one class, a' in says('--data', folder(tmp_path/'one', ('a',)), '--schedule', sched)
    assert 'has no folder val or validation' in says('--data', folder(tmp_path/'noval', splits=('train',)), '--schedule', sched)
    folder(tmp_path/'nopics', n=0)
    assert 'has no class folder with images' in says('--data', tmp_path/'nopics', '--schedule', sched)
    other = folder(tmp_path/'other')
    shutil.move(other/'val/b', other/'val/c')
    assert 'has classes of which' in says('--data', other, '--schedule', sched)
    assert '--schedule' in says('--data', d)
    assert 'Nearest: imagenet18_8' in says('--data', d, '--schedule', 'imagenet18-8')
    assert 'Cannot read a schedule' in says('--data', d, '--schedule', tmp_path/'none.json')
    (tmp_path/'bad.json').write_text('{"phases": [{"n_epoch": 1, "size": 32, "bs": 0, "lr": 1}]}')
    assert '`bs` must be' in says('--data', d, '--schedule', tmp_path/'bad.json')
    assert 'fewer than one batch of 512' in says('--data', d, '--schedule', 'imagenet18_1')
    assert 'No model is called' in says(*ok[:4], '--arch', 'resnet5', '--out', tmp_path/'o')
    assert 'auxiliary outputs' in says(*ok[:4], '--arch', 'googlenet', '--out', tmp_path/'o')
    assert 'top-5 says nothing' in says(*ok, '--target-top5', .5)
    assert '`top1` must be' in says(*ok, '--target-top1', 0)
    assert '`label_smoothing` must be' in says(*ok, '--label-smoothing', 1)
    (tmp_path/'file').write_text('')
    assert 'file' in says(*ok[:6], '--out', tmp_path/'file')
    assert 'e.g. .93 for 93 %' in says(*ok, '--target-top5', 93)
    assert 'needs an epoch' in says('--data', d, '--schedule', 'imagenette_5', '--epochs', 2)
    assert not (tmp_path/'o').exists()

def test_a_table_for_many_gpus_is_scaled(tmp_path):
    "A 1000-class, 8-process table on 2 classes and one process: the model gets 2 outputs, the lr follows the batch"
    d = folder(tmp_path/'d')
    Schedule([Phase(1, size=32, bs=4, lr=.8)], world=8).save(tmp_path/'s.json')
    run('--data', d, '--schedule', tmp_path/'s.json', '--arch', 'resnet_small', '--workers', 0, '--out', tmp_path/'o')
    done = Schedule.load(tmp_path/'o/schedule.json')
    assert done.world==1 and done.at(0).lr==pytest.approx(.1) and 'linear scaling' in done.notes[0]

def test_class_is_the_folder_below_train(tmp_path):
    d = folder(tmp_path/'d')
    (d/'train/a/deep').mkdir()
    shutil.move(d/'train/a/0.jpg', d/'train/a/deep/0.jpg')
    shutil.copy(d/'train/b/0.jpg', d/'train/loose.jpg')
    train_files,_,classes,bad = find_images(d)
    assert classes==['a','b'] and not bad and len(train_files)==12 and class_of(d, d/'train/a/deep/0.jpg')=='a'
