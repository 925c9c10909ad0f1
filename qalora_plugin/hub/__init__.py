"""Model cards, and pushing to the Hugging Face Hub."""
