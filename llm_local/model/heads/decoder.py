"""Private decoder layers, a norm and an output matrix of the block's own."""

from llm_local.model.heads.head import Head, register_head


class Decoder(Head):
    """At least one private layer."""

    needs_private_layers = True


register_head("decoder", Decoder())
