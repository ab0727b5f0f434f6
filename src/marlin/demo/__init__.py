"""The demo: a real model and real text from package registries, and the whole job run on them."""
