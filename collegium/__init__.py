"""Collegium's shared library: what two services, or a user, need. Imports point down only: client | link | fabric | model -> v1."""
