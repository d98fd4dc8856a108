"""The gateway service: what callers talk to. Text and requests live here; token ids go on to routers."""
