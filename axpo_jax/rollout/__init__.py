"""Who samples the tokens: the engine protocol and the engines."""
