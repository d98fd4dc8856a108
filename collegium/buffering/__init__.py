"""Which experts stay in fast memory: policies, quotas, traces of routing, and their replay.

Decisions only: nothing here holds a weight, reads a clock or knows a link. Stdlib and numpy.
"""
