"""What the Llama trains on: text, from files or streamed, as batches of tokens."""
