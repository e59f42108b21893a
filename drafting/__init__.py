"""Drafting ahead: several tokens of plan, text and causal spans per pass, with the same text."""
