"""Builds the GPT model of one pipeline stage from Megatron's arguments."""

from __future__ import annotations

from argparse import Namespace

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.arguments import core_transformer_config_from_args

from megatron_vespo.trainer.attention import PackedAttention, PackedSelfAttention


def model_config(args: Namespace) -> TransformerConfig:
    """Megatron's configuration for micro-batches that are packs of varying length.

    Layers are built without gradient accumulation fusion. Megatron's own fusion would need Apex's kernel,
    and the output layer's backward, `linear_log_probs`, never calls it. `model_provider` turns the fusion on
    for TE's layers.
    """
    config = core_transformer_config_from_args(args)
    config.variable_seq_lengths = True
    config.gradient_accumulation_fusion = False
    return config


def model_provider(args: Namespace, config: TransformerConfig):
    """The function that Megatron's get_model calls once per pipeline (or virtual pipeline) stage."""

    def provide(
        pre_process: bool, post_process: bool, vp_stage: int | None = None, pg_collection=None, **_
    ) -> GPTModel:
        use_te = args.transformer_impl == "transformer_engine"
        spec = get_gpt_decoder_block_spec(
            config, use_transformer_engine=use_te, normalization=args.normalization, vp_stage=vp_stage
        )
        if not use_te:
            for layer in spec.layer_specs:  # pyright: ignore[reportOptionalIterable]
                attention = layer.submodules.self_attention  # pyright: ignore[reportAttributeAccessIssue]
                attention.module = PackedSelfAttention
                attention.submodules.core_attention = PackedAttention
        model = GPTModel(
            config,
            spec,  # pyright: ignore[reportArgumentType]
            vocab_size=args.padded_vocab_size,
            max_sequence_length=args.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            parallel_output=True,
            share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
            position_embedding_type=args.position_embedding_type,
            rotary_percent=args.rotary_percent,
            rotary_base=args.rotary_base,
            rope_scaling=args.use_rope_scaling,
            rope_scaling_factor=args.rope_scaling_factor,
            vp_stage=vp_stage,
            pg_collection=pg_collection,
        )
        _fuse_gradient_accumulation(model, args.gradient_accumulation_fusion)
        for router in routers(model):
            router.frozen_expert_bias = (
                True  # Megatron's load balancing would change the policy, see glm4_moe
            )
        return model

    return provide


def routers(model: torch.nn.Module) -> list[TopKRouter]:
    """The routers of a model chunk, in its order."""
    return [module for module in model.modules() if isinstance(module, TopKRouter)]


def _fuse_gradient_accumulation(model: GPTModel, fused: bool) -> None:
    """Sets whether Transformer Engine's layers add their weight's gradient to `main_grad` themselves.

    If so, they set the weight's `grad_added_to_main_grad`, and Megatron's data parallelism adds nothing.
    """
    for module in model.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):  # TE's name for it, read in every forward pass
            module.fuse_wgrad_accumulation = fused  # pyright: ignore[reportArgumentType]
