"""A small Llama, trained as a language model with and without caution.

``python -m examples.llama.compare`` trains the same model twice, with an optimizer
and with its cautious version, and reports which learns faster and by how much.
``python -m examples.llama.train`` trains one model. ``--help`` lists the options.

A step on a CPU under Linux gets faster with ``GLIBC_TUNABLES=glibc.malloc.hugetlb=1``
in the environment: each step takes much fresh memory, and large pages take it sooner.
"""
