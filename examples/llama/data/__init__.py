"""Training data of the Llama: text, from files or streamed, as batches of tokens."""
