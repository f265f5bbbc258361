"""Names of files and folders in checkpoints."""

# Megatron's
TRACKER_NAME = "latest_checkpointed_iteration.txt"  # names the newest complete iteration
RELEASE = "release"  # the tracker's word, and the folder's name, for weights that no training has saved
METADATA_NAME = ".metadata"  # of torch_dist: which tensors there are, and where
COMPLETE_NAME = "metadata.json"  # written when everything else is, just before the tracker
COMMON_STATE = "common_state/shard_0_1"  # key of the object that holds the arguments of the run

# Hugging Face's
CONFIG_NAME = "config.json"
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

# ours
HF_FOLDER = "hf"  # configuration and tokenizer, beside the weights of a Megatron checkpoint
MANIFEST_NAME = "manifest.json"  # dtype, shape and hash of every tensor that a conversion has written
BUFFER_NAME = "rollout_buffer.bin"  # state of asynchronous generation
CANARY_NAME = "canary.npz"  # a few samples with the policy's log-probs
OLD_CANARY_NAME = "probe.npz"  # its name in older checkpoints
PROMPTS_NAME = "prompts.npz"  # which prompts the run trains on
RESERVE_NAME = "reserved.partial"  # disk space that is kept free while tensors are written
