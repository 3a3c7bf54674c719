"""What is done with running statistics: updates, accumulation, validation, and trees of them."""
