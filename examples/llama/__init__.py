"""Llama pretraining on a CPU, a GPU or a TPU slice, with and without caution.

``python -m examples.llama`` lists the commands. This package holds what is specific to
the Llama: the model, its data, its recipes, and the commands that use a trained model.
See ``docs/llama.md`` for the full guide.
"""
