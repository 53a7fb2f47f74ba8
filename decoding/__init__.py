"""From logits to text: sampling, stopping, beams, scores, how many guesses pay."""
