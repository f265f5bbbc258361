"""Names of files and folders in checkpoints."""

# Megatron's
TRACKER_NAME = "latest_checkpointed_iteration.txt"  # contains the newest complete iteration
RELEASE = "release"  # tracker content and folder name for converted weights, not saved by training
METADATA_NAME = ".metadata"  # of torch_dist: the tensors and their locations
COMPLETE_NAME = "metadata.json"  # written when everything else is, just before the tracker
COMMON_STATE = "common_state/shard_0_1"  # key of the object that holds the run's arguments

# Hugging Face's
CONFIG_NAME = "config.json"
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

# ours
HF_FOLDER = "hf"  # configuration and tokenizer, beside the weights of a Megatron checkpoint
MANIFEST_NAME = "manifest.json"  # dtype, shape and hash of every tensor that a conversion wrote
BUFFER_NAME = "rollout_buffer.bin"  # state of asynchronous generation
CANARY_NAME = "canary.npz"  # a few samples with the policy's log-probs
OLD_CANARY_NAME = "probe.npz"  # its name in older checkpoints
PROMPTS_NAME = "prompts.npz"  # the prompts that the run trains on
RESERVE_NAME = "reserved.partial"  # disk space that is kept free while tensors are written
