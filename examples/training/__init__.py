"""The training program: from a task and an optimizer to a run that can be trusted.

An experiment is a folder beside this one. It brings a `Task` and presets, as an
`Experiment`, and hands them to `command_line.main`. Everything else is here, and
nothing here imports an experiment.
"""
