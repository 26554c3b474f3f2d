"""The study: whether caution helps once both sides are tuned, and how much.

``python -m benchmarks.study run`` trains the runs missing from ``docs/results/*.csv``;
``python -m benchmarks.study draw`` writes ``docs/results.md`` and its figures.

``docs/results/machine.txt`` says where the runs were trained. Their text is the
standard library of one version of Python, with which later runs must be trained too.

A file identifies a run by its optimizer, its settings and its seed. If anything else
about a question changes, such as its model, delete its file; otherwise, the runs in it
are taken for runs of the new configuration.
"""
