"""Where ranks meet: at an address that other nodes can reach."""

from __future__ import annotations

import socket

import pytest
import ray

from rlflow.actors.trainer import Trainer


@pytest.fixture(autouse=True)
def name_is_of_this_machine_only(monkeypatch: pytest.MonkeyPatch):
    """As Debian's /etc/hosts has it."""
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")


@pytest.mark.parametrize(("in_ray", "host"), [(True, "127.0.3.2"), (False, "127.0.0.1")])
def test_ranks_meet_at_the_address_by_which_ray_knows_their_node(monkeypatch, in_ray, host):
    monkeypatch.setattr(ray, "is_initialized", lambda: in_ray)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.3.2")
    trainer = object.__new__(Trainer)
    address, _, port = Trainer.rendezvous(trainer).rpartition(":")
    assert trainer._listening is not None
    assert address == host and trainer._listening.getsockname() == (host, int(port))
    trainer._listening.close()


def test_an_address_that_no_interface_has_is_named(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "192.0.2.1")
    with pytest.raises(OSError, match=r"cannot listen at 192\.0\.2\.1, .* ray start --node-ip-address"):
        Trainer.rendezvous(object.__new__(Trainer))


def test_the_port_at_which_ranks_meet_is_taken_from_the_first_moment_on(monkeypatch):
    """Until its process group is there, rank 0 imports torch, for seconds in which anyone may ask for a port."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    trainer = object.__new__(Trainer)
    port = int(Trainer.rendezvous(trainer).rpartition(":")[2])
    with pytest.raises(OSError, match="in use"):
        socket.create_server(("", port))
    early = socket.create_connection(("127.0.0.1", port), timeout=10)
    early.close()
    assert trainer._listening is not None
    trainer._listening.close()
