"""How processes meet: errors and statuses, settings, logs, life cycle, RPC servers and channels, leases, telemetry.

Knows nothing of models, experts or requests. Imports neither torch nor redis nor transformers.
"""
