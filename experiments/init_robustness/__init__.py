"""The main experiment: the range of initialization scales over which a network trains."""
