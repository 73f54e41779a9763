"""Many episodes: groups, their resampling, what is stored and what is counted of them."""
