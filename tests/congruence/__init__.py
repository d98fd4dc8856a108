"""The cluster's tokens equal the single-process reference, over architectures, worker counts and disturbances."""
