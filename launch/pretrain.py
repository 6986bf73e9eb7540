"""Pretrain MLO-MAE or plain MAE on any number of GPUs, or on CPU.

    deepspeed [--hostfile H] launch/pretrain.py --recipe R.yaml --deepspeed_config D.json \\
        [--init_from PATH] [--resume] [key.subkey=value ...]
"""

import sys

from mlomae.pretraining.program import PretrainingProgram
from mlomae.training.command_line import run_program

if __name__ == "__main__":
    sys.exit(run_program(PretrainingProgram(), __doc__))
