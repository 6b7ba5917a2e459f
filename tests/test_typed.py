"What a type checker makes of the public API"
import subprocess, sys
from pathlib import Path

here = Path(__file__).parent

def test_uses(tmp_path):
    "mypy finds the wrong uses and no others; what it says of the package's own code does not reach users"
    r = subprocess.run([sys.executable,'-m','mypy','--warn-unused-ignores','--ignore-missing-imports','--follow-imports','silent','--cache-dir',tmp_path,here/'typed_use.py'], capture_output=True, text=True)
    assert r.returncode==0 and 'Success' in r.stdout, r.stdout+r.stderr

def test_stub(tmp_path):
    "The stub of `schedule` says what the module holds"
    (tmp_path/'allow').write_text('fastai_fastimagenet.schedule.Schedule.__repr__\n')
    r = subprocess.run([sys.executable,'-m','mypy.stubtest','--ignore-missing-stub','--ignore-unused-allowlist','--allowlist',tmp_path/'allow','fastai_fastimagenet.schedule'], capture_output=True, text=True, cwd=tmp_path)
    assert r.returncode==0, r.stdout+r.stderr
