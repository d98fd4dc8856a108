"""The stubs that protoc generates from protos/collegium/v1. Never edited: `make protos` writes them anew."""
