import os
os.environ.setdefault('MPLBACKEND', 'agg')
os.environ['OMP_NUM_THREADS'] = '1' # Small models: threads of two processes on two cores only wait for each other
import pytest
from hypothesis import settings

settings.register_profile('repeatable', derandomize=True, deadline=None)
settings.load_profile('repeatable')

@pytest.fixture(scope='session')
def small_photos(tmp_path_factory):
    "400 training and 100 validation photos, 64 pixels short"
    from fastai_fastimagenet.photos import photos
    return photos(400, 100, short=64, path=tmp_path_factory.mktemp('data'))
