"""A process that opens three streams and prints when each has given its first batch.

Started by `data_loading.py` as _first_batches.py CONTENDER... PATH NUM_WORKERS BATCH_SIZE.
The clock is the machine's (CLOCK_MONOTONIC), so the starter can tell how long it took.
"""

import os
import sys
import time
from pathlib import Path

from _loaders import Contender, open_loader


def main() -> None:
    *cells, image_size, path, num_workers, batch_size = sys.argv[1:]
    contender = Contender(*cells, int(image_size))
    numbers = (num_workers, batch_size)
    streams = [open_loader(contender, Path(path), n, *map(int, numbers)) for n in range(3)]
    for stream in streams:
        next(stream)
    print(time.monotonic(), flush=True)
    os._exit(0)  # how long threads take to end is another matter


if __name__ == "__main__":
    main()
