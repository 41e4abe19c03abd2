"""Gemma 3 12B's projections, to count with: no weights here."""

LAYERS = 48
VOCABULARY = 262_208
HIDDEN = 3840
# (in, out) of every projection of one decoder layer.
PROJECTIONS = {
    "q_proj": (HIDDEN, 4096),
    "k_proj": (HIDDEN, 2048),
    "v_proj": (HIDDEN, 2048),
    "o_proj": (4096, HIDDEN),
    "gate_proj": (HIDDEN, 15360),
    "up_proj": (HIDDEN, 15360),
    "down_proj": (15360, HIDDEN),
}
LAYER_PARAMETERS = sum(i * o for i, o in PROJECTIONS.values())
PARAMETERS = LAYERS * LAYER_PARAMETERS + VOCABULARY * HIDDEN
HEAD_WIDTHS = 4096  # of all 16 query heads
