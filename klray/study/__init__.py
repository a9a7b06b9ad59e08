"""Studies: what a space file asks, the search, its trials, and what they found."""
