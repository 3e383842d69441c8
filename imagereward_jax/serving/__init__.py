"""A scorer behind HTTP: protocol, batches across clients, server."""
