"""The command line, and the one-machine cluster behind `collegium up`."""
