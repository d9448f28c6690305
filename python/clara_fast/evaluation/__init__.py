"""What a model's answers and retrieval are worth."""
