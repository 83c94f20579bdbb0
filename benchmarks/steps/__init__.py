"""Training steps, ours and plain ones, on generated texts and random weights: what time goes to."""
