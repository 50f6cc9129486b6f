"""Model families: all code that depends on the kind of network, for training and for sampling."""
