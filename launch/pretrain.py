"""Pretrain MLO-MAE or plain MAE on any number of GPUs, or on CPU.

    deepspeed [--hostfile H] launch/pretrain.py --recipe R.yaml --deepspeed_config D.json \\
        [--init_from PATH] [--resume] [key.subkey=value ...]
"""

import sys

from mlomae.program import run_program
from mlomae.train import PretrainingProgram

if __name__ == "__main__":
    sys.exit(run_program(PretrainingProgram(), __doc__))
