"""The Redis side of the sale: keys, connections, claims, scripts."""
