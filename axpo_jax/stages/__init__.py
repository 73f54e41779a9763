"""A run from its config: teach, SFT, screen, RL, evaluation, and what they are built from."""
