"""The policy: Qwen3-VL in Flax NNX, its sharding, its weights, its images and its chat format."""
