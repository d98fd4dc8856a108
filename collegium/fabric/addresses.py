"""HOST:PORT as people write it, often as the URL that another program wanted.

Owns what is taken for an address and what is refused, with the reason. Resolves no name and connects to nothing.
"""

from __future__ import annotations

import ipaddress
import re

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_GRPC_NAME = re.compile(r"(?:dns|ipv4|ipv6):(?=.*:)", re.IGNORECASE)  # gRPC's own schemes, which have no slashes
_HOST = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?\.?")
_DOTTED = re.compile(r"[0-9]+(?:\.[0-9]+){3}")
_PLAIN, _ENCRYPTED, _EITHER = ("http",), ("https", "grpcs"), ("grpc", "dns")
_LONGEST = 300


def read_address(text: str, *, is_encrypted: bool | None = None) -> str:
    """Return HOST:PORT (an IPv6 host in brackets) of what somebody wrote; a scheme and a last slash are dropped.

    is_encrypted: whether TLS will be spoken, against which http:// and https:// are held; None: not known here. Raises
    ValueError, which says what is wrong.
    """
    if len(text) > _LONGEST:
        raise ValueError(f"it is {len(text)} characters long; the maximum is {_LONGEST}")
    rest = _without_scheme(text.strip(), is_encrypted).rstrip("/")
    for mark, what in (("/", "a path"), ("?", "a query"), ("#", "a fragment"), ("@", "a user")):
        if mark in rest:
            raise ValueError(f"it holds {what}")
    if any(character.isspace() or not character.isprintable() for character in rest):
        raise ValueError("it holds a blank; several addresses are separated by commas")
    if rest.startswith("["):
        host, _, port = rest[1:].partition("]")
        if not _is_ipv6(host):
            raise ValueError("what stands in brackets is no IPv6 address")
        host, port = f"[{host}]", port.removeprefix(":") if port.startswith(":") or not port else "?"
    else:
        host, _, port = rest.rpartition(":") if ":" in rest else (rest, "", "")
        _check_host(host, rest)
    return f"{host}:{_port(port)}"


def _without_scheme(text: str, is_encrypted: bool | None) -> str:
    match = _SCHEME.fullmatch(text)
    if match is None:
        if text.lower().startswith("unix:"):
            raise ValueError("a unix socket is none of a host")
        return _GRPC_NAME.sub("", text, count=1) if _GRPC_NAME.match(text) else text
    scheme, rest = match[1].lower(), match[2]
    if scheme not in (*_PLAIN, *_ENCRYPTED, *_EITHER):
        raise ValueError(f"{scheme}:// is not spoken here")
    if scheme in _ENCRYPTED and is_encrypted is False:
        raise ValueError(f"{scheme}:// asks for TLS; leave it out, and ask by tls=True (on the command line --tls)")
    if scheme in _PLAIN and is_encrypted:
        raise ValueError(f"{scheme}:// is plain text, but TLS is asked for; leave one of them out")
    return rest.removeprefix("/") if scheme == "dns" else rest


def _check_host(host: str, rest: str) -> None:
    if ":" in host or _is_ipv6(rest):
        raise ValueError("an IPv6 address stands in brackets before its port, such as [::1]:50051")
    if not host:
        raise ValueError("the host is missing")
    if not host.isascii():
        raise ValueError("a host that is not ASCII is given in its xn-- form")
    if not _HOST.fullmatch(host) or (_DOTTED.fullmatch(host) and not _is_ipv4(host)):
        raise ValueError(f"{host!r} is no host")


def _port(text: str) -> int:
    if not text:
        raise ValueError("the port is missing")
    if not (text.isascii() and text.isdigit()) or not 0 < int(text) <= 65535:
        raise ValueError(f"{text!r} is no port")
    return int(text)


def _is_ipv4(text: str) -> bool:
    try:
        ipaddress.IPv4Address(text)
    except ValueError:
        return False
    return True


def _is_ipv6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True
