"""Every parameter's part of the model and third of its layers."""

import pytest

from megatron_vespo.models.parameter_groups import THIRDS, part_of, third_of

LAYER = "decoder.layers.7."


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("embedding.word_embeddings.weight", "embedding"),
        ("output_layer.weight", "output"),
        ("decoder.final_layernorm.weight", "norms"),
        (LAYER + "input_layernorm.weight", "norms"),
        (LAYER + "pre_mlp_layernorm.weight", "norms"),
        (LAYER + "self_attention.q_layernorm.weight", "norms"),
        (LAYER + "self_attention.linear_qkv.layer_norm_weight", "norms"),
        (LAYER + "mlp.linear_fc1.layer_norm_weight", "norms"),
        (LAYER + "self_attention.linear_qkv.weight", "attention"),
        (LAYER + "self_attention.linear_proj.weight", "attention"),
        (LAYER + "mlp.router.weight", "router"),
        (LAYER + "mlp.experts.local_experts.3.linear_fc1.weight", "experts"),
        (LAYER + "mlp.experts.linear_fc2.weight17", "experts"),
        (LAYER + "mlp.linear_fc1.weight", "mlp"),
        (LAYER + "mlp.shared_experts.linear_fc1.weight", "experts"),
        (LAYER + "mlp.router.expert_bias", "router"),
        (LAYER + "self_attention.linear_qkv.bias", "attention"),
    ],
)
def test_parts(name, part):
    assert part_of(name) == part


def test_an_unknown_parameter_is_named():
    with pytest.raises(KeyError, match="something.else"):
        part_of("something.else")


@pytest.mark.parametrize(
    ("num_layers", "counts"), [(1, [1, 0, 0]), (4, [2, 1, 1]), (48, [16, 16, 16]), (5, [2, 2, 1])]
)
def test_thirds(num_layers, counts):
    found = [third_of(f"decoder.layers.{layer}.mlp.router.weight", num_layers) for layer in range(num_layers)]
    assert [found.count(third) for third in THIRDS] == counts
    assert found == sorted(found, key=THIRDS.index)
    assert third_of("decoder.final_layernorm.weight", num_layers) is None
