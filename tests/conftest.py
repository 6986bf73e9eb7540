"""What all tests share."""

import os

# Processes that meet on one machine look its address up by DNS, too. Where no server answers, that
# costs each of them seconds.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")
