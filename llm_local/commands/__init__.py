"""The subcommands of llm-local: a module each, whose main takes the arguments and returns the exit status.

Only the process that runs a command imports its module, which may prepare the environment for the imports of libraries.
"""
