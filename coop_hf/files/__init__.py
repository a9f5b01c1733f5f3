"""Files that travel: adapters, base models, the Hub, model cards, checkpoints of other code."""
