"""The gateway service: what callers talk to. Text and requests live here; token ids go on to routers."""

import os

# gRPC's core starts its threads anew in every forked child, before that has become another program, and in one of
# thirty they crash it there. A gateway under uvloop forks to render and tokenise apart; it never serves from a fork.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
