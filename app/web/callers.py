"""Who may name the shopper of a request, with SHOPPER_AUTH=trusted: the shop's own servers."""

from functools import lru_cache
from ipaddress import IPv4Network, IPv6Network, ip_address

from ..problems import UnknownCaller


class Callers:
    """The networks of TRUSTED_CALLERS; none means that everybody may."""

    def __init__(self, networks: tuple[IPv4Network | IPv6Network, ...]) -> None:
        self._networks = networks
        self._admits = lru_cache(maxsize=4096)(self._find)

    def check(self, address: str) -> None:
        """Raise UnknownCaller for an address of another network."""
        if self._networks and not self._admits(address):
            raise UnknownCaller("This address may not name a shopper")

    def _find(self, address: str) -> bool:
        try:
            found = ip_address(address.partition("%")[0])
        except ValueError:
            return False
        if found.version == 6 and found.ipv4_mapped:
            found = found.ipv4_mapped
        return any(found in network for network in self._networks)
