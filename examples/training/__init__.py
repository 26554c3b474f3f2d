"""The training program, shared by all experiments.

An experiment is a package next to this one. It provides a `Task` and presets as an
`Experiment`, and passes them to `command_line.main`. Everything else lives here, and
nothing here imports an experiment.
"""
