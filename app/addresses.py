"""Which client an address stands for, in the rate limits."""

import re
from functools import lru_cache
from ipaddress import IPv4Address, ip_address, ip_network

# What one subscriber is given (RFC 6177); who has it can use any of its 2^64 addresses.
IPV6_SUBSCRIBER_BITS = 64
# What one site is given: 65,536 networks of a subscriber's size.
IPV6_SITE_BITS = 48
# Some proxies write the client's port too: "192.0.2.1:4711", "[2001:db8::1]:4711".
WITH_PORT = re.compile(r"\[(?P<v6>[^]]+)\](:\d+)?|(?P<v4>[0-9.]+):\d+").fullmatch
LONGEST = 64


@lru_cache(maxsize=4096)
def network_of(client: str) -> str:
    """Return the network that a client, as `client_of` names it, belongs to: /48 or /24."""
    try:
        network = ip_network(client)
    except ValueError:
        return client
    return str(network.supernet(new_prefix=IPV6_SITE_BITS if network.version == 6 else 24))


@lru_cache(maxsize=4096)
def client_of(address: str) -> str:
    """Return the address, an IPv6 one as its /64 network, an IPv4 one inside IPv6 as IPv4."""
    if match := WITH_PORT(address):
        address = match["v6"] or match["v4"]
    try:
        parsed = ip_address(address.partition("%")[0])
    except ValueError:
        return address[:LONGEST]
    if isinstance(parsed, IPv4Address):
        return str(parsed)
    if parsed.ipv4_mapped:
        return str(parsed.ipv4_mapped)
    return str(ip_network((parsed, IPV6_SUBSCRIBER_BITS), strict=False))
