"""Ways to make a language model one person's: what its prompt is given, and which adapters are on."""
