"""The catalogue: bugs that people really make in exporters and engines, and where the gates have to find each.

Formats are "fp32", "fp16" and "int8" on ONNX Runtime and "bf16" on OpenVINO.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from onnx import TensorProto

from tests.export.proof import planted_network as network
from tests.export.proof import planted_numbers as numbers
from tests.export.proof import planted_operators as operators
from tests.export.proof.surgery import Surgery

ATTENTION = ("attention",)
WITH_SIGNAL = ("attention", "signal")


@dataclass(frozen=True)
class Bug:
    """One bug.

    Attributes:
        name: What went wrong.
        plant: Puts it into a graph.
        block: Where it has to be found.
        parts: As what, one of them.
        subject: What it is planted in, one of the test's subjects.
        formats: Number formats that it is planted in.
        images: How many images of each kind it takes to see it.
    """

    name: str
    plant: Callable[[Surgery], None]
    block: int
    parts: tuple[str, ...]
    subject: str = "merge"
    formats: tuple[str, ...] = ("fp32",)
    images: int = 3


ALL = ("fp32", "fp16", "bf16", "int8")
FLOAT = ("fp32", "fp16", "bf16")
NARROW = ("fp16", "bf16", "int8")
INT8 = ("int8",)

BUGS = (
    # compensator
    Bug("delta of v dropped", network.delta_dropped, 1, ATTENTION, "compensated", FLOAT),
    Bug("gate's sign flipped", network.gate_flipped, 2, ATTENTION, "compensated", FLOAT),
    Bug("gate of another degree", network.gate_of_another_degree, 1, ATTENTION, "compensated", FLOAT),
    Bug("delta folded twice", network.delta_twice, 0, ATTENTION, "compensated", FLOAT),
    Bug("delta's scale 10% off", network.delta_scale_wrong, 1, ATTENTION, "compensated", FLOAT),
    # attention
    Bug("sizes forgotten", network.size_forgotten, 2, ATTENTION, formats=ALL),
    Bug("sizes subtracted", network.size_subtracted, 1, ATTENTION, formats=ALL),
    Bug("sizes not in logarithm", network.size_not_in_logarithm, 2, ATTENTION, formats=ALL),
    Bug("sizes of an earlier block", network.size_of_an_earlier_block, 2, ATTENTION, formats=ALL),
    Bug("logarithm of sizes in half", network.log_in_half, 2, ATTENTION, formats=ALL),
    Bug("queries and keys swapped", network.queries_and_keys_swapped, 1, WITH_SIGNAL, formats=ALL),
    Bug("attention not scaled", network.scaled_by(4.0), 1, ATTENTION, formats=ALL),
    Bug("attention scaled twice", network.scaled_by(0.25), 1, ATTENTION, formats=ALL),
    Bug("bias of q dropped", network.no_bias("q"), 1, ATTENTION, formats=ALL),
    Bug("bias of k dropped", network.no_bias("k"), 1, ("signal",), formats=ALL),  # softmax does not see it
    Bug("bias of v dropped", network.no_bias("v"), 1, ATTENTION, formats=ALL),
    Bug("softmax over queries", network.softmax_over_queries, 1, ATTENTION, formats=ALL),
    Bug("heads interleaved", network.heads_interleaved, 1, ATTENTION, formats=FLOAT),
    Bug("residual lost", network.no_residual, 1, ATTENTION, formats=ALL),
    Bug("images share attention", network.images_share_attention, 1, ATTENTION, formats=ALL),
    # signal
    Bug("metric of values", network.metric_of_values, 1, ("signal",), formats=ALL),
    Bug("metric of one head", network.metric_of_one_head, 1, ("signal",), formats=ALL),
    Bug("attention of one head", network.attention_of_one_head, 1, ("signal",), "prune", ALL),
    Bug("pruned by attention without sizes", network.attention_without_sizes, 1, ("signal",), "prune", ALL),
    # merging
    Bug("scores not normalized", operators.not_normalized, 1, ("decision",), formats=ALL),
    Bug("least similar merged", operators.set_number("ranked", "largest", 0), 1, ("decision",), formats=ALL),
    Bug("best match left unmerged", operators.best_match_left_unmerged, 1, ("decision",), formats=ALL),
    Bug("unmerged off by one", operators.unmerged_shifted, 1, ("decision",), formats=ALL),
    Bug("unmerged by score", operators.unmerged_by_score, 1, ("decision",), formats=ALL),
    Bug("unmerged by position", operators.unmerged_by_position, 1, ("decision",), "gap", ALL),
    Bug("destination off by one", operators.next_destination, 1, ("decision",), formats=ALL),
    Bug("a and b swapped", operators.a_and_b_swapped, 1, ("decision",), formats=ALL),
    Bug("decided for the first image", operators.decided_for_the_first_image, 1, ("decision",), formats=ALL),
    Bug("scores in bfloat16", operators.scores_in(TensorProto.BFLOAT16), 1, ("decision",), "gap", ALL),
    Bug("scores in half", operators.scores_in(TensorProto.FLOAT16), 1, ("decision",), "gap", ALL, 24),
    Bug("class token merged", operators.protecting(0), 0, ("decision",), formats=ALL),
    Bug("distillation token merged", operators.protecting(1), 0, ("decision", "reduction"), "distilled", ALL),
    Bug("register tokens merged", operators.protecting(1), 0, ("decision", "reduction"), "registers", ALL),
    Bug("mean without sizes", operators.mean_without_sizes, 1, ("reduction",), formats=ALL),
    Bug("sum instead of mean", operators.sum_instead_of_mean, 1, ("reduction",), formats=ALL),
    Bug("sizes not added", operators.sizes_not_added, 1, ("reduction",), formats=ALL),
    Bug("merged token dropped", operators.merged_token_dropped, 1, ("reduction",), formats=ALL),
    # pruning
    Bug("least attended kept", operators.set_number("ranked", "largest", 0), 1, ("decision",), "prune", ALL),
    Bug("kept off by one", operators.kept_shifted, 1, ("reduction",), "prune", ALL),
    Bug("positions without prefix", operators.prefix_dropped_from_ranking, 1, ("decision",), "prune", ALL),
    Bug("fused without weights", operators.fused_without_weights, 1, ("reduction",), "prune", ALL),
    Bug("fused token's size", operators.largest_size_only, 1, ("reduction",), "prune", ALL),
    Bug("fused token first", operators.fused_token_first, 1, ("reduction",), "prune", ALL),
    # norms, residuals, MLP
    Bug("GELU by tanh", network.gelu_by_tanh, 2, ("mlp",), formats=ALL),
    Bug("epsilon of the MLP's norm", network.epsilon("1.norm2"), 1, ("mlp",), formats=ALL),
    Bug("epsilon of attention's norm", network.epsilon("1.norm1"), 1, WITH_SIGNAL, formats=ALL),
    Bug("norm of the block before", network.norm_of_the_block_before, 2, WITH_SIGNAL, formats=ALL),
    Bug("LayerScale lost", network.scale_lost, 1, ATTENTION, "registers", ALL),
    Bug("LayerScale twice", network.scale_twice, 1, ("mlp",), "registers", ALL),
    Bug("residual from before merging", network.residual_before_merging, 1, ("mlp",), formats=ALL),
    Bug("MLP without norm", network.mlp_before_the_residual, 2, ("mlp",), formats=ALL),
    # ends
    Bug("positions off by one", network.positions_shifted, 0, ("embedding",), formats=ALL),
    Bug("class token without position", network.class_token_without_position, 0, ("embedding",), formats=ALL),
    Bug("colours backwards", network.colours_backwards, 0, ("embedding",), formats=ALL),
    Bug("normalized twice", network.normalized_twice, 0, ("embedding",), formats=("fp32", "fp16", "int8")),
    Bug("final norm missing", network.no_final_norm, 3, ("head",), formats=ALL),
    Bug("classes off by one", network.classes_shifted, 3, ("head",), formats=ALL),
    Bug("heads read each other's token", network.head_reads_the_other_token, 2, ("head",), "distilled", ALL),
    Bug("average without sizes", network.average_without_sizes, 2, ("head",), "gap", ALL),
    Bug("attention pooling without sizes", network.pooling_without_sizes, 2, ("head",), "map", ALL),
    # weights
    Bug("one weight 1% off", numbers.one_percent_more, 2, ("mlp",), formats=FLOAT),
    Bug("sign bit flipped", numbers.bit_flipped(31), 2, ("mlp",), formats=FLOAT),
    Bug("exponent bit flipped", numbers.bit_flipped(25), 2, ("mlp",), formats=FLOAT),
    Bug("weights of another checkpoint", numbers.of_another_checkpoint, 1, ("mlp",), formats=FLOAT),
    Bug("weights of an earlier epoch", numbers.of_an_earlier_epoch, 1, WITH_SIGNAL, formats=FLOAT),
    Bug("weight transposed", numbers.transposed, 1, ATTENTION, formats=FLOAT),
    Bug("weight stored in bfloat16", numbers.rounded_to_bfloat16, 2, ("mlp",), formats=FLOAT),
    # quantization
    Bug("weight's scales permuted", numbers.scales_permuted, 1, ("mlp",), formats=INT8),
    Bug("zero point off by one", numbers.zero_off_by_one, 1, ("mlp",), formats=INT8),
    Bug("zero point of signed codes", numbers.zero_of_signed, 2, ("mlp",), formats=INT8),
    Bug("input's scale of another product", numbers.scale_of_another_product, 1, ("mlp",), formats=INT8),
    Bug("input's scale of another block", numbers.scale_of_another_input, 2, ATTENTION, formats=INT8),
    Bug("codes of 7 bits", numbers.seven_bits, 1, ("mlp",), formats=INT8),
    Bug("codes rounded down", numbers.codes_one_low, 2, ("mlp",), formats=INT8),
    Bug("attention scale not in the query's scales", numbers.attention_scale_forgotten, 1, ATTENTION, formats=INT8),
    Bug("bias in units of a scale", numbers.quantized_bias_scaled, 1, ("mlp",), formats=INT8),
)


# Name -> how far off the bug makes its part (a decision: its margin), measured in float32, and the formats whose gates
# are further (`tocom.export.proof.gates`): no gate tells it there from a healthy engine.
HIDDEN: Mapping[str, tuple[float, tuple[str, ...]]] = {
    "delta's scale 10% off": (4.4e-3, ("bf16",)),
    "logarithm of sizes in half": (2.2e-5, NARROW),
    "scores in bfloat16": (3.6e-3, ("bf16", "int8")),
    "scores in half": (2.2e-4, NARROW),
    "GELU by tanh": (8.9e-5, NARROW),
    "epsilon of the MLP's norm": (8.3e-7, ALL),
    "epsilon of attention's norm": (2.8e-6, NARROW),
    "average without sizes": (2.1e-2, ("bf16",)),
    "one weight 1% off": (3.2e-4, ("fp16", "bf16")),
    "weights of an earlier epoch": (6.9e-4, ("fp16", "bf16")),
    "weight stored in bfloat16": (7.3e-4, ("fp16", "bf16")),
}

# What the gates let pass although it is further off than healthy engines are: (name, format) -> how far off it makes
# its part. Native operators do not tell what they decide on, so that a wrong signal shows only in decisions that are
# far off; and healthy parts of badly conditioned networks are as far off as one wrong token or bit of a weight.
MISSED: Mapping[tuple[str, str], float] = {
    ("bias of k dropped", "bf16"): 0.46,
    ("fused without weights", "bf16"): 4.0e-2,
    ("exponent bit flipped", "bf16"): 2.5e-2,
}

# Edits that change nothing, or nothing that matters: that the others are caught is not because something was edited.
NO_BUGS = (
    *(
        Bug(f"{subject} untouched", lambda graph: None, -1, (), subject)
        for subject in ("merge", "prune", "distilled", "registers", "gap", "map", "compensated")
    ),
    Bug("a body of its own", lambda graph: graph.body(1), -1, ()),
    Bug("a body of its own, pruning", lambda graph: graph.body(1), -1, (), "prune"),
    # of equally similar tokens either may be chosen: no logit can tell which of them is right
    Bug("ties by the highest index", operators.set_number("tmp_8", "select_last_index", 1), -1, ()),
    # whole numbers below 2048, which half holds exactly
    Bug("sizes in half", operators.sizes_in_half, -1, ()),
)
