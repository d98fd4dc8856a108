"""Mixture-of-Experts mathematics: architectures, manifest, dispatch, kernels, placement, sampling.

Knows nothing of processes: no gRPC, no asyncio, no sockets.
"""
