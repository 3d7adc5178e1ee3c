"""The network interface that ranks use: loopback on one machine, else the one that reaches the rendezvous. Never all
interfaces, and never one that is looked up by this machine's own name, which may not resolve."""

from __future__ import annotations

import os
import socket

import psutil

from ncf_dist.errors import ConfigError

STORE, LISTENING = "NCF_STORE", "NCF_LISTENING"
"""Environment of ranks that our supervisor starts: the file that they meet in · of several machines: the open socket
that rank 0 serves the others at. Ranks that something else started have neither: they meet as torchrun says."""
MEET_S = 300
"""What ranks have at least to start in: on a busy machine their imports take unequally long, and one that is started
through others comes late."""
ANY_PORT = 9
"""A datagram socket that is connected sends nothing: the port does not matter."""


def split(rendezvous: str) -> tuple[str, int]:
    """(host, port) of HOST:PORT; an IPv6 address may stand in brackets. Raises ConfigError."""
    host, _, port = rendezvous.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise ConfigError(
            f"train.rendezvous is {rendezvous!r}; needed HOST:PORT of the first machine, such as 10.0.0.5:29500"
        )
    return host.strip("[]"), int(port)


def resolve(host: str) -> tuple[socket.AddressFamily, str]:
    """(family, address) of a host. Raises ConfigError at once where it has none."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, ANY_PORT, type=socket.SOCK_DGRAM)[0]
    except OSError as error:
        raise ConfigError(
            f"the ranks meet at host {host!r}, which does not resolve here ({error}); needed a name or an address of "
            "the first machine that every machine knows: set train.rendezvous, or MASTER_ADDR where you start the "
            "ranks yourself"
        ) from None
    return family, str(address[0])


def interface_facing(host: str) -> str:
    """The interface that this machine reaches `host` over: that of `host` itself where it is this machine's address."""
    family, address = resolve(host)
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, ANY_PORT))
        except OSError as error:
            raise ConfigError(
                f"the ranks meet at {host} ({address}), which no interface here leads to ({error})"
            ) from None
        return interface_of(probe.getsockname()[0])


def interface_of(address: str) -> str:
    """The interface that has an address."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(known.address.partition("%")[0] == address.partition("%")[0] for known in addresses):
            return name
    raise ConfigError(
        f"no network interface here has the address {address}; needed one that ranks can talk over: bring it up (for "
        "127.0.0.1: ip link set lo up)"
    )


def bound_to(interface: str) -> dict[str, str]:
    """Environment that holds gloo and NCCL to one interface; = is NCCL's for exactly that name."""
    return {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": f"={interface}"}


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at one address of this machine and no other. Raises ConfigError."""
    family, address = resolve(host)
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((address, port))
        listening.listen(2**10)
    except OSError as error:
        listening.close()
        raise ConfigError(
            f"train.rendezvous is {host}:{port}, where this machine cannot listen ({os.strerror(error.errno or 0)}); "
            "needed a free port at an address of the machine that the job train runs on"
        ) from None
    return listening
