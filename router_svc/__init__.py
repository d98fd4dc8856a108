"""The router: attention and gate without experts, the KV cache, continuous batching, sampling."""
