"""The balancer: membership under leases, and placement by epochs, remembered in Redis.

Knows nothing of requests, tokens or rows. Nothing on the path of a token waits for it.
"""
