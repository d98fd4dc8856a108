"""Balancing: which worker is home to which experts, so that the busiest worker is as little busy as it can be."""
