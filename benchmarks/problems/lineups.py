"""Which methods are compared on which problems."""

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
    "bnp_sgd",
    "bnp_momentum",
    "adam_z",
    "adamw_z",
    "muon_z",
)

# Batch normalization's remedies for small batches.
SMALL_BATCH = (*CORE, "batchrenorm", "four_things")

CONVOLUTIONAL = (*SMALL_BATCH, "bnp_gn")

RESIDUAL = ("batchnorm_momentum", "groupnorm_momentum", "bnp_momentum", "bnp_gn_momentum")

TRANSFORMER = (
    "sgd",
    "adam",
    "adamw",
    "muon",
    "layernorm_adam",
    "layernorm_adamw",
    "layernorm_muon",
    "bnp_sgd",
    "adam_z",
    "adamw_z",
    "muon_z",
    "adamw_z_ln",
)
