"""The mathematics: where prompts stand, families of base models, and how prompts become class embeddings."""
