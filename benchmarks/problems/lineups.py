"""Which methods are compared on which problems."""

# Where the same data come with raw and with standardized inputs.
FROM_Z = ("from_z_sgd", "from_z_adam")

CORE = (
    "sgd",
    "momentum",
    "adam",
    "adamw",
    "muon",
    "batchnorm",
    "layernorm",
    "groupnorm",
    "batchnorm_adam",
    "layernorm_adam",
    "ready_sgd",
    "ready_adam",
    "ready_adamw",
    "bnp_sgd",
    "bnp_momentum",
    "adam_z",
    "adamw_z",
    "muon_z",
)

# A step of K-FAC on the 3072 inputs of CIFAR-10 takes hundreds of SGD's: small inputs only.
WITH_KFAC = (*CORE, "kfac")

# Batch normalization's remedies for small batches.
REMEDIES = ("batchrenorm", "four_things")
SMALL_BATCH = (*CORE, *REMEDIES)

# Muon's Newton-Schulz iteration on a kernel of 3072 x 100 costs as much as the gradient of a batch
# of hundreds: at small batches it would take most of the time of a contest.
WIDE_SMALL_BATCH = (*(name for name in CORE if not name.startswith("muon")), *REMEDIES)

CONVOLUTIONAL = (
    "sgd",
    "adam",
    "batchnorm",
    "layernorm",
    "batchnorm_adam",
    "layernorm_adam",
    *REMEDIES,
    "ready_sgd",
    "ready_adam",
    "bnp_sgd",
    "adam_z",
    "muon_z",
    "bnp_gn",
)

RESIDUAL = ("batchnorm_momentum", "groupnorm_momentum", "bnp_momentum", "bnp_gn_momentum")

TRANSFORMER = (
    "sgd",
    "adamw",
    "muon",
    "layernorm_adamw",
    "layernorm_muon",
    "ready_sgd",
    "ready_adamw",
    "ready_adamw_ln",
    "bnp_sgd",
    "adamw_z",
    "muon_z",
    "adamw_z_ln",
)

DEEP_TRANSFORMER = (
    *("adamw", "muon", "layernorm_adamw", "layernorm_muon", "adamw_z"),
    *("ready_adamw", "ready_adamw_ln"),
    *("whiten_adam", "whiten_muon", "whiten_adam_ln", "whiten_muon_ln"),
)

# Problems on which nothing of the library was chosen: what its defaults replace, their rivals, and
# the paper's options.
HELD_OUT = (
    "sgd",
    "adam",
    "adamw",
    "batchnorm_adam",
    "layernorm_adam",
    "ready_sgd",
    "ready_adam",
    "ready_adamw",
    "bnp_sgd",
    "adam_z",
    "adamw_z",
)
HELD_OUT_TEXT = (
    *("sgd", "adam", "adamw", "layernorm_adamw"),
    *("ready_sgd", "ready_adam", "ready_adamw", "bnp_sgd", "adam_z", "adamw_z"),
)
