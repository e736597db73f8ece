"""What multiprocessing's fork server imports once, for the ranks and processes that tests fork from it."""

import os

os.environ["DS_ACCELERATOR"] = "cpu"  # read when DeepSpeed is imported

import simclr_dali.model.vision
import simclr_dali.train.loop
from tests.zygote import import_libraries

import_libraries()
