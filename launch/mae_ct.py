"""Contrastive tuning of a masked autoencoder (MAE-CT) on any number of GPUs, or on CPU.

    deepspeed [--hostfile H] launch/mae_ct.py --recipe R.yaml --deepspeed_config D.json \\
        [--step pretrain|head|tune] [--init_from PATH] [--resume] [key.subkey=value ...]

Three steps, each in a folder of its own below output_dir: MAE pretraining (pretrain), a contrastive
head on the frozen encoder (head), and tuning of the encoder's upper half (tune). A step that is
finished is not run again. With weights in init_from there is no first step.
"""

import sys

from mlomae.contrastive.chain import run_chain

if __name__ == "__main__":
    sys.exit(run_chain(__doc__))
