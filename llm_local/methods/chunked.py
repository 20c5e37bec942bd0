"""Blocks of several layers, by default one a stage, each trained by its own loss alone."""

from llm_local.methods.method import Method, register_method

register_method("chunked", Method())
