"""The learner: packing, train state, the jitted step, the SFT and RL loops."""
