"Everything a notebook needs: `from fastai_fastimagenet.all import *`"
from .core import FitCallback, ScaleLR
from .phase import Phase
from .schedule import Schedule
from .recipes import recipes
from .machines import profiles
from .photos import photos
from .rect import RectCrop
from .models import to_any_size, zero_init_residual, resnet_small
from .loader import imagenet_dls
from .group import rank0_first
from .distributed import DDPTrainer
from .memory import AutoMicroBatch, find_batch_size
from .data import PhaseData
from .resize import ProgressiveResize
from .batchsize import DynamicBatchSize
from .warmup import LRWarmup, PhaseLR
from .weight_decay import BNWeightDecayExclusion
from .rectval import RectValidation, rect_dl, centre_dl
from .recttrain import RectTraining
from .fixres import find_test_size, hold_out
from .ema import WeightEMA
from .live import LiveView
from .monitor import EpochLog, TimeToAccuracy, FiniteLoss
from .tensorboard import TensorBoard
from .checkpoint import Checkpoint
from .precision import BF16
from .fit import check_model
from .planner import plan
from .measured import measured_run, plan_measured
from .whatif import options, scaling
from .measure import measure
from .autotune import auto_schedule, range_test, suggest_lr
from .launch import launch
