"""Fetching the archives that are small and free."""

import hashlib
import os
from contextlib import suppress
from pathlib import Path

from data_ffcv.errors import DataError

_CIFAR = "https://www.cs.toronto.edu/~kriz"
_FASHION = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
# The addresses and MD5 sums that torchvision's data sets have.
ARCHIVES: dict[str, dict[str, tuple[str, str]]] = {
    "cifar10": {
        "cifar-10-python.tar.gz": (
            f"{_CIFAR}/cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"
        )
    },
    "cifar100": {
        "cifar-100-python.tar.gz": (
            f"{_CIFAR}/cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85"
        )
    },
    "fashion-mnist": {
        name: (f"{_FASHION}/{name}", md5)
        for name, md5 in (
            ("train-images-idx3-ubyte.gz", "8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
            ("train-labels-idx1-ubyte.gz", "25c81989df183df01b3e8a0aad5dffbe"),
            ("t10k-images-idx3-ubyte.gz", "bef4ecab320f06d8554ea6380940ec79"),
            ("t10k-labels-idx1-ubyte.gz", "bb300cfdad3c16e7a12a480ee83cd310"),
        )
    },
}  # fmt: skip


def fetch(collection: str, folder: Path) -> None:
    """Downloads the files of a collection that `folder` lacks, and checks them.

    Raises:
        DataError: an address cannot be reached, or what came is not what was published.
    """
    from torch.hub import download_url_to_file

    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is not a folder; give the one to download into")
    for name, (address, md5) in ARCHIVES[collection].items():
        if (folder / name).is_file():
            continue
        arriving = folder / f".{name}.{os.getpid()}.tmp"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            download_url_to_file(address, str(arriving))
            if hashlib.md5(arriving.read_bytes()).hexdigest() != md5:
                raise DataError(f"{address} sent something else than {name}; get it elsewhere")
            os.replace(arriving, folder / name)
        except OSError as error:  # no network is a URLError, which is one
            raise DataError(
                f"{address} cannot be fetched ({error}); copy {name} into {folder} by other means"
            ) from error
        finally:
            with suppress(OSError):
                arriving.unlink()
