"""How good images are: features, scores, the real images' statistics, verdicts, and the job that measures."""
