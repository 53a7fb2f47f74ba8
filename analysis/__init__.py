"""Looking inside a model: hidden states and attention weights."""
