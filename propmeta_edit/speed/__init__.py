"""Speed claimed as a ratio, both sides by turns in one run."""
