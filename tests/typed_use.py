"For mypy: right uses of the public API, and wrong ones, each of which it must find (an `ignore` that is not needed is an error)"
from fastai_fastimagenet.machines import profiles
from fastai_fastimagenet.measured import measured_run, plan_measured
from fastai_fastimagenet.phase import Phase
from fastai_fastimagenet.planner import Plan, plan
from fastai_fastimagenet.recipes import find_schedule, recipes
from fastai_fastimagenet.schedule import Schedule
from fastai_fastimagenet.whatif import options, scaling

sched: Schedule = Schedule([Phase(1, size=64, bs=32, lr=(.02,.1)), Phase(2, lr=.1, rect=True)])
longer: Schedule = sched.scale_epochs(6).for_world(8)
rate: float = longer.at(2.5).lr
predicted: Plan = plan(find_schedule('imagenet18_1'), 'p4d.24xlarge', nodes=2, price=2.)
minutes: float = predicted.minutes
again: Plan = plan_measured(Schedule.load('mine.json'), measured_run('runs/mine'))
cheapest: str = options(deadline=30)[0].plan.machine
shares: list = scaling(recipes['imagenet18_1'], 'p5.48xlarge', (1,2)).efficiency()
gpus: int = profiles['p5.48xlarge'].gpus
text: str = predicted.schedule.to_json()
defaults: list = [Phase(1, size=None), plan(sched, 'p4d.24xlarge', price=None), options(budget=None)] # None says: by default

Schedule('photos') # type: ignore[arg-type]
sched.scale_epoch(6) # type: ignore[attr-defined]
Phase('1', size=64) # type: ignore[arg-type]
plan(sched, 'p4d.24xlarge', nodes='2') # type: ignore[arg-type]
plan('imagenet18_1', 'p4d.24xlarge') # type: ignore[arg-type]
wrong: str = sched.at(1).size # type: ignore[assignment]
plan_measured(sched, 'runs/mine') # type: ignore[arg-type]
