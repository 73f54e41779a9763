"""One episode: an append-only transcript, the think-act-observe loop, tools and rewards."""
