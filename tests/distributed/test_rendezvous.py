"""All ranks meet, or a sentence says who is missing."""

import socket

import pytest

from mlomae.distributed import rendezvous as _rendezvous
from mlomae.errors import UserError
from tests.ranks import free_port


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> int:
    """This process is rank 0 of three; returns the port."""
    port = free_port()
    names = {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in (names | {"RES_OPTIONS": "timeout:1 attempts:1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    return port


@pytest.mark.usefixtures("launched")
def test_ranks_that_do_not_come_are_named():
    sentence = (
        "only 1 of 3 ranks came within 1 s, all of them from .*; missing: 1, 2: look at the log"
    )
    with pytest.raises(UserError, match=sentence):
        _rendezvous.meet(0.6)


def test_a_port_that_is_in_use_is_named(launched: int):
    with socket.socket() as other:
        other.bind(("", launched))
        other.listen()
        with pytest.raises(UserError, match=f"port {launched} of .* is in use: .* --master_"):
            _rendezvous.meet(0.6)


def test_a_rank_0_that_does_not_come_is_named(launched: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UserError, match=f"rank 1 on .* cannot reach rank 0 at .*:{launched}"):
        _rendezvous.meet(1.0)
