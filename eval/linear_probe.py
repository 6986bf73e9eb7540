"""Linear probe of a frozen encoder, by the protocols of the field.

    deepspeed eval/linear_probe.py --recipe R.yaml --deepspeed_config D.json --init_from RUN \\
        [--resume] [key.subkey=value ...]

The encoder runs on freshly augmented images in every epoch, and linear heads are trained on its
features behind a batch norm without affine parameters. `protocol` says which number is reported:

    mae       MAE's (arXiv 2111.06377): one head, LARS, the number after the last epoch.
    mae_ct    MAE-CT's (arXiv 2304.10520): ten heads at once, each with a rate of its own, and the
              best number over heads and epochs. It is selected on the test images.
    held_out  trained as mae_ct; the head is chosen on held-out training images after the last
              epoch, and counted on the test images once.

Numbers of different protocols must not be compared, nor with those of `eval/cached_probe.py`, which
encodes every image once.
"""

import sys

from eval.probing.program import LinearProbeProgram
from mlomae.training.command_line import run_program

if __name__ == "__main__":
    sys.exit(run_program(LinearProbeProgram(), __doc__))
