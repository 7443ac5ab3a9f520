"""Score blocks, protocol, transport: what clients and service share."""
