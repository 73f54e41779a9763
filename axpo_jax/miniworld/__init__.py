"""The miniature world: small questions made on the fly from a seed, real code paths throughout."""
