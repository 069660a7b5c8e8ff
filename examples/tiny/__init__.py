"""A tiny Cosmos3, trained from nothing on a synthetic world of shapes that bounce and ring."""
