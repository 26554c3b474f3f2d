"""Llama pretraining on a CPU, a GPU or a slice of TPUs, with and without caution.

``train`` trains one model, ``compare`` several optimizers, ``compile_only`` says what
a step takes on a slice that is not there, ``generate`` samples text, and ``export``
writes a model for ``transformers``. Each is a program with its own ``--help``:
``python -m examples.llama.train --help``. ``docs/llama.md`` has the whole story.
"""
