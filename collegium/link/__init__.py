"""Links: the data path between one router and one worker (DESIGN 3.2 to 3.4).

`frame` is the wire format, `base` the interface, and each other file one transport behind it. Knows numpy and torch;
refuses to know gRPC, event loops, placement, and what an expert computes.
"""
