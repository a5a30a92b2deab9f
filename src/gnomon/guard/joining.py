"""How the guard joins the house: its Capability. Imports nothing heavy."""

from gnomon.capability import Capability

GUARD = Capability(
    name="guard",
    help="Check prompt and answer while they stream: secrets, personal data, words, patterns, scanners.",
    options="gnomon.guard.policy:GuardOptions",
    prompt_stage="gnomon.guard.stage:build_prompt",
    logits_stage="gnomon.guard.stage:build_detour",
    stream_stage="gnomon.guard.stage:build_answer",
    stream_order=100,
    prepare="gnomon.guard.stage:prepare",
    merge="gnomon.guard.policy:merged",
    commands="gnomon.cli.guard:app",
    routes="gnomon.serve.guard:router",
    parse="gnomon.guard.policy:parse_text",
)
