"""Collegium's shared library: what two services, or a user, need.

Imports point down only: cli | services -> client -> fabric -> link | model -> v1.
"""
