"""Two hosts with tiny images on their disks, and a server that forks ranks of one host."""

from typing import Any

import pytest

from tests.multinode.launches import Cluster
from tests.ranks import warm_context


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """Two hosts; skips where this machine cannot have them."""
    cluster = Cluster(tmp_path_factory.mktemp("hosts"))
    if cluster.reason:
        pytest.skip(cluster.reason)
    return cluster


@pytest.fixture(scope="module")
def cluster(hosts: Cluster) -> Cluster:
    """The hosts, with images."""
    hosts.add_images()
    return hosts


@pytest.fixture(scope="session")
def server() -> Any:
    """See `warm_context`."""
    return warm_context()
