"""Models trained elsewhere: their weights and tokenizers in, ours out, and low-rank training."""
