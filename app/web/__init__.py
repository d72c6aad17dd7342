"""The web process: server, protocol, the purchase lane, the JSON routes, and who may ask."""
