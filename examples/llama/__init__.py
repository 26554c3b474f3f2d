"""Llama pretraining on a CPU, a GPU or a slice of TPUs, with and without caution.

``python -m examples.llama`` lists the commands. What is here is the Llama's own: the
model, its data, its recipes, and what is done with it once it is trained.
``docs/llama.md`` has the whole story.
"""
