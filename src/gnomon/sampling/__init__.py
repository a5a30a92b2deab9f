"""Sampling options, stop strings and logit bias: the first three capabilities, all inline.

They join through the same registry as every later room, which proves the mechanism.
"""

from gnomon.capability import Capability

SAMPLING = Capability(
    name="sampling",
    help="How the next token is drawn: temperature, filters, penalties, seed, limits, logprobs.",
    options="gnomon.sampling.options:SamplingOptions",
    inline=True,
)

STOP = Capability(
    name="stop",
    help="Strings that end the text; they never appear in it.",
    options="gnomon.sampling.stop:StopOptions",
    inline=True,
    stream_stage="gnomon.sampling.stop:build",
)

LOGIT_BIAS = Capability(
    name="logit_bias",
    help="Added to the logits of single tokens before masks and temperature.",
    options="gnomon.sampling.bias:LogitBiasOptions",
    inline=True,
    phase="bias",
    logits_stage="gnomon.sampling.bias:build",
)
