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

@pytest.fixture(scope='session')
def aws_server():
    "moto behind a proxy that is as difficult as AWS, in a process of its own"
    from aws_proxy import Aws
    server = Aws()
    yield server
    server.close()

@pytest.fixture
def aws(aws_server, monkeypatch, tmp_path):
    "Nothing there yet, and boto3 goes there; the launcher's files are in a folder of the test. What is called must be in the policy for launchers"
    aws_server.reset()
    for k,v in {**aws_server.env, 'FASTIMAGENET_HOME': str(tmp_path/'home')}.items(): monkeypatch.setenv(k, v)
    for k in ('AWS_PROFILE','AWS_SESSION_TOKEN'): monkeypatch.delenv(k, raising=False)
    yield aws_server
    from iam_policy import not_allowed
    new = not_allowed(aws_server.log())
    assert not new, f'nbs/iam_policy.json does not allow {new}: run python tests/iam_policy.py'
