"""No test reaches the network: an audit hook refuses every address but this machine's own, in C code too.

`tests/conftest.py` imports this file and puts its folder on PYTHONPATH, so child processes of a test obey as well.
"""

import sys


class NetworkRefused(RuntimeError):
    """A test, or the code it runs, tried to reach another machine."""


LOCAL = {"", "localhost", "::1", "0.0.0.0", "::"}


def _is_local(host: object) -> bool:
    name = host.decode("ascii", "replace") if isinstance(host, bytes) else host
    return name is None or (isinstance(name, str) and (name in LOCAL or name.startswith("127.")))


def _refuse(event: str, args: tuple) -> None:
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = args[1]
        if isinstance(address, tuple) and not _is_local(address[0]):
            raise NetworkRefused(f"{event} to {address!r}: tests run without a network")
    elif event in ("socket.getaddrinfo", "socket.gethostbyname") and not _is_local(args[0]):
        raise NetworkRefused(f"{event} of {args[0]!r}: tests run without a network")


sys.addaudithook(_refuse)
