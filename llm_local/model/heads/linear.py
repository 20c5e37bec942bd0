"""The block's own norm and output matrix, and nothing else."""

from llm_local.model.heads.head import Head, register_head


class Linear(Head):
    """No private layers."""

    takes_private_layers = False


register_head("linear", Linear())
