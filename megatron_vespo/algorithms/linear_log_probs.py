"""Computes log-probs and entropies of a linear output layer without ever holding all of its logits.

Shape suffixes: T tokens, H hidden, V this rank's rows of the vocabulary, W rows of V in one tile.

Forward and backward loop over tiles of the vocabulary, [T, W] logits each. A matmul computes a tile, a
reduction uses it, and the next tile overwrites it. Logits are at least float32: a logit of 16 to 32, rounded
to bfloat16, is off by up to 0.06, and so are log-probs.

The forward keeps running statistics of the softmax. It merges them over tiles as in online softmax (arXiv
1805.02867), and over ranks by one MAX and one SUM. The backward recomputes each tile. It knows the
normaliser, so it needs no reduction. A tile holds all tokens, so one matmul gives its rows of the weight's
gradient: only the gradient of the hidden states is accumulated over tiles.

    z = logits / temperature,  p = softmax(z),  h = entropy of p,  g and e the gradients of log p_label and h
    d loss / d logits_v = (g 1[v = label] - p_v (g + e (log p_v + h))) / temperature

Of a token with a support, the part of the vocabulary that truncated sampling left, p is the softmax over that
part. Each tile gets logits of no probability everywhere else, so all that follows is the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup, ReduceOp, all_reduce

from megatron_vespo.algorithms.supports import Supports

# matmuls are fastest if the row length of their operands is a multiple of this
ALIGNED_WIDTH = 128
# elementwise passes over a tile work on blocks of rows that fit into a core's cache
CACHED_ELEMENTS = 2**18
LEAST_EXPONENT = -87.0  # its exp is close to the least normal float32; that of less is taken for 0


def linear_log_probs(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    labels_T: Tensor,
    temperature_T: Tensor,
    *,
    vocab_size: int,
    group: ProcessGroup | None,
    chunk_size: int,
    supports: Supports | None = None,
    entropy_gradient: bool = False,
    use_triton: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """log softmax(hidden weight^T / temperature)[label] and the entropy of that softmax, each [T].

    Args:
        hidden_TH: float [T, H], gathered over sequence parallelism. Hidden states, labels and temperatures
            are the same on every rank of `group`.
        weight_VH: [V, H] of the same dtype: rows rank * V .. (rank + 1) * V of the output layer. Rows from
            `vocab_size` on are Megatron's padding: they get no probability and no gradient.
        labels_T: int64 [T]. A label outside the vocabulary has log-prob -inf.
        temperature_T: float32 [T], positive; gets no gradient.
        group: ranks that share the vocabulary; None is one rank.
        chunk_size: at most `chunk_size` x V logits exist at a time, the logits of `chunk_size` tokens. In
            the backward of 16-bit inputs the same number of gradients of logits exists, too.
        supports: of the T tokens, the same on every rank of `group`. A label must be in its token's support.
            A token that is alone in its support has a log-prob and an entropy of exactly 0 and no gradient.
        entropy_gradient: without it the entropy is not differentiable.
        use_triton: use Triton kernels for all work except matmuls; None: on CUDA.

    Both results are float64 and bit-identical on all ranks of `group`. log W sums tens of thousands of them,
    so rounding each to float32 would add a visible error. Logits and softmax are float32 (float64 for
    float64 inputs), whatever the inputs' dtype. The gradient of the logits is rounded to that dtype for its
    two matmuls. The gradient of `hidden_TH` is this rank's part, from its rows of the vocabulary. The caller
    sums it over `group`, as the backward of Megatron's gather and copy regions does. Tokens whose upstream
    gradient is 0 cost the backward nothing.
    """
    num_tokens, num_ranks = len(hidden_TH), 1 if group is None else group.size()
    assert labels_T.shape == temperature_T.shape == (num_tokens,), "one label and one temperature a token"
    assert chunk_size > 0, "chunk_size is a number of tokens"
    assert 0 < vocab_size <= num_ranks * len(weight_VH), "the ranks' rows do not cover the vocabulary"
    if use_triton is None:
        use_triton = hidden_TH.is_cuda
    return _LinearLogProbs.apply(
        hidden_TH,
        weight_VH,
        labels_T,
        temperature_T,
        vocab_size,
        group,
        chunk_size,
        supports,
        entropy_gradient,
        use_triton,
    )


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden_TH,
        weight_VH,
        labels_T,
        temperature_T,
        vocab_size,
        group,
        chunk_size,
        supports,
        entropy_gradient,
        use_triton,
    ):
        first_row = 0 if group is None else group.rank() * len(weight_VH)
        ctx.num_real_rows = min(max(vocab_size - first_row, 0), len(weight_VH))
        ctx.supports = None if supports is None else supports.counted_from(first_row)
        ctx.chunk_size, ctx.use_triton = chunk_size, use_triton
        ctx.set_materialize_grads(False)

        dtype = torch.promote_types(hidden_TH.dtype, torch.float32)
        # the kernels need contiguous memory: a caller may expand one temperature to all tokens
        temperature_T = temperature_T.to(dtype).contiguous()
        own_labels_T = (labels_T - first_row).contiguous()
        statistics_4T = torch.zeros(4, len(hidden_TH), dtype=torch.float64, device=hidden_TH.device)
        statistics_4T[0] = -torch.inf
        add_to_statistics, _ = _tile_operations(use_triton)
        real_VH = weight_VH[: ctx.num_real_rows]
        for start, logits_TW in _tiles(hidden_TH, real_VH, chunk_size, dtype, ctx.supports):
            add_to_statistics(statistics_4T, logits_TW, temperature_T, own_labels_T - start)
        if group is not None and group.size() > 1:
            _combine_ranks(statistics_4T, group)
        max_T, sum_exp_T, centered_T, target_T = statistics_4T

        log_sum_exp_T = sum_exp_T.log()
        entropy_T = log_sum_exp_T - centered_T / sum_exp_T
        in_vocabulary_T = (labels_T >= 0) & (labels_T < vocab_size)
        log_probs_T = torch.where(in_vocabulary_T, target_T - max_T - log_sum_exp_T, -torch.inf)
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropy_T)
        ctx.save_for_backward(
            hidden_TH,
            weight_VH,
            temperature_T,
            own_labels_T,
            (max_T + log_sum_exp_T).to(dtype),
            entropy_T.to(dtype),
        )
        return log_probs_T, entropy_T

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_log_probs_T, grad_entropy_T):
        hidden_TH, weight_VH, temperature_T, labels_T, log_normalizer_T, entropy_T = ctx.saved_tensors
        if grad_log_probs_T is None:
            grad_log_probs_T = torch.zeros_like(entropy_T)
        fields = [temperature_T, labels_T, log_normalizer_T, grad_log_probs_T]
        has_gradient_T = grad_log_probs_T != 0
        if grad_entropy_T is not None:
            fields += [entropy_T, grad_entropy_T]
            has_gradient_T |= grad_entropy_T != 0
        # R: the tokens that need work; prompts and padding, often most of a pack, are masked
        rows_R = has_gradient_T.nonzero()[:, 0]
        fields = [field_T[rows_R] for field_T in fields[:2]] + [
            field_T[rows_R].to(temperature_T.dtype) for field_T in fields[2:]
        ]
        supports = None if ctx.supports is None else ctx.supports.of_tokens(rows_R)
        grad_hidden_RH, grad_weight_VH = _layer_gradients(ctx, hidden_TH[rows_R], weight_VH, fields, supports)
        grad_hidden_TH = None
        if grad_hidden_RH is not None:
            grad_hidden_TH = torch.zeros_like(hidden_TH)
            grad_hidden_TH[rows_R] = grad_hidden_RH.to(hidden_TH.dtype)
        return grad_hidden_TH, grad_weight_VH, *[None] * 8


def _layer_gradients(
    ctx, hidden_TH: Tensor, weight_VH: Tensor, fields: list[Tensor], supports: Supports | None
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the layer's input, not yet in its dtype, and of its weight; None if not needed."""
    grad_hidden_TH = grad_weight_VH = None
    if ctx.needs_input_grad[0]:
        grad_hidden_TH = torch.zeros_like(hidden_TH, dtype=fields[0].dtype)
    if ctx.needs_input_grad[1]:
        grad_weight_VH = torch.empty_like(weight_VH)
        grad_weight_VH[ctx.num_real_rows :] = 0
    _, write_gradient = _tile_operations(ctx.use_triton)
    temperature_T, labels_T, *others = fields
    dtype, gradient_memory = temperature_T.dtype, None
    real_VH = weight_VH[: ctx.num_real_rows]
    for start, logits_TW in _tiles(hidden_TH, real_VH, ctx.chunk_size, dtype, supports):
        rows = slice(start, start + logits_TW.shape[1])
        gradient_TW = logits_TW
        if dtype != hidden_TH.dtype:
            if gradient_memory is None:  # no tile is larger than the first one
                gradient_memory = hidden_TH.new_empty(logits_TW.numel())
            gradient_TW = gradient_memory[: logits_TW.numel()].view(logits_TW.shape)
        write_gradient(gradient_TW, logits_TW, temperature_T, labels_T - start, *others)
        if grad_hidden_TH is not None:
            grad_hidden_TH += gradient_TW @ weight_VH[rows]
        if grad_weight_VH is not None:
            torch.mm(gradient_TW.t(), hidden_TH, out=grad_weight_VH[rows])
    return grad_hidden_TH, grad_weight_VH


def _tiles(
    hidden_TH: Tensor, weight_VH: Tensor, chunk_size: int, dtype: torch.dtype, supports: Supports | None
) -> Iterator[tuple[int, Tensor]]:
    """First row and logits [T, W] of each tile. Every tile reuses the memory of the previous one."""
    num_tokens, num_rows = len(hidden_TH), len(weight_VH)
    width = max(1, min(num_rows, num_rows * chunk_size // max(1, num_tokens)))
    if width > ALIGNED_WIDTH:
        width -= width % ALIGNED_WIDTH
    memory = hidden_TH.new_empty(num_tokens * width + 1, dtype=dtype)  # one more, for `restrict`
    for start in range(0, num_rows, width):
        tile_WH = weight_VH[start : start + width]
        logits_TW = memory[: num_tokens * len(tile_WH)].view(num_tokens, len(tile_WH))
        _product(hidden_TH, tile_WH.t(), logits_TW)
        if supports is not None:
            supports.restrict(memory, logits_TW, start)
        yield start, logits_TW


def _product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """The matrix product of left and right, not rounded to their dtype if that of `out` is larger."""
    if left.dtype == out.dtype:
        return torch.mm(left, right, out=out)
    if left.is_cuda:  # the same matmul, which sums in float32 anyway
        return torch.mm(left, right, out_dtype=out.dtype, out=out)
    return torch.mm(left.to(out.dtype), right.to(out.dtype), out=out)


def _combine_ranks(statistics_4T: Tensor, group: ProcessGroup) -> None:
    max_T = statistics_4T[0].clone()
    all_reduce(max_T, ReduceOp.MAX, group)
    _recenter(statistics_4T, max_T)
    all_reduce(statistics_4T[1:], ReduceOp.SUM, group)


def _recenter(statistics_4T: Tensor, max_T: Tensor) -> None:
    """Rescale the sums to another maximum, in place."""
    old_max_T, sum_exp_T, centered_T, _ = statistics_4T
    # -inf before the first logit, as on a rank that holds only padding: both sums are 0 then and stay 0
    shift_T = torch.where(old_max_T == -torch.inf, 0.0, old_max_T - max_T)
    centered_T.addcmul_(shift_T, sum_exp_T).mul_(shift_T.exp())
    sum_exp_T.mul_(shift_T.exp())
    old_max_T.copy_(max_T)


def _tile_operations(use_triton: bool) -> tuple[Callable[..., None], Callable[..., None]]:
    if use_triton:
        # imported here, as a machine without a GPU may have no Triton
        from megatron_vespo.algorithms.log_prob_kernels import add_to_statistics, write_gradient

        return add_to_statistics, write_gradient
    return _add_to_statistics, _write_gradient


def _add_to_statistics(
    statistics_4T: Tensor, logits_TW: Tensor, temperature_T: Tensor, labels_T: Tensor
) -> None:
    """Merge one tile into the statistics, in place; overwrites the tile.

    Statistics of z = logits / temperature: max z, sum exp(z - max), sum exp(z - max) (z - max), and z at the
    label, 0 if not seen. Labels count from the tile's first column; one outside [0, W) is not in the tile.
    """
    in_tile_T, column_T1 = _label_columns(labels_T, logits_TW.shape[1])
    # rounded as z is: the log-prob of a certain token is exactly 0
    target_T = (logits_TW.gather(1, column_T1)[:, 0] / temperature_T).double()
    statistics_4T[3] += torch.where(in_tile_T, target_T, 0.0)
    for rows in _cached_blocks(logits_TW):
        block_4T = statistics_4T[:, rows]
        z_TW = logits_TW[rows].to(temperature_T.dtype).div_(temperature_T[rows, None])
        _recenter(block_4T, torch.maximum(block_4T[0], z_TW.amax(1)))
        z_TW.sub_(block_4T[0, :, None].to(z_TW.dtype))
        exp_TW = _exp(z_TW)
        block_4T[1] += exp_TW.sum(1)
        block_4T[2] += exp_TW.mul_(z_TW).sum(1)


def _write_gradient(
    gradient_TW: Tensor,
    logits_TW: Tensor,
    temperature_T: Tensor,
    labels_T: Tensor,
    log_normalizer_T: Tensor,
    grad_log_probs_T: Tensor,
    *entropy_fields: Tensor,
) -> None:
    """Write the gradient of a tile's logits to `gradient_TW`, which may be the tile itself.

    Labels are as in `_add_to_statistics`. `entropy_fields` are the entropy and its upstream gradient, each
    [T], or empty if there is no such gradient.
    """
    in_tile_T, column_T1 = _label_columns(labels_T, logits_TW.shape[1])
    scale_T = -1 / temperature_T
    at_label_T1 = torch.where(in_tile_T, -grad_log_probs_T * scale_T, 0.0)[:, None]
    for rows in _cached_blocks(logits_TW):
        scale_T1 = scale_T[rows, None]
        z_TW = logits_TW[rows].to(temperature_T.dtype).div_(temperature_T[rows, None])
        log_p_TW = z_TW.sub_(log_normalizer_T[rows, None])
        grad_T1 = grad_log_probs_T[rows, None]
        if entropy_fields:
            entropy_T1, grad_entropy_T1 = (field_T[rows, None] for field_T in entropy_fields)
            scaled_p_TW = _exp(log_p_TW).mul_(scale_T1)
            grad_TW = log_p_TW.add_(entropy_T1).mul_(grad_entropy_T1).add_(grad_T1).mul_(scaled_p_TW)
        else:
            grad_TW = _exp(log_p_TW).mul_(grad_T1 * scale_T1)
        gradient_TW[rows] = grad_TW.scatter_add_(1, column_T1[rows], at_label_T1[rows])


def _exp(z: Tensor) -> Tensor:
    """exp(z), 0 where float32 would underflow: there torch's own takes ten times as long on a CPU."""
    exp = z.clamp(min=LEAST_EXPONENT).exp_()
    return torch.threshold_(exp, math.exp(LEAST_EXPONENT + 0.01), 0.0)


def _label_columns(labels_T: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Whether each label is in a tile of `width` columns, [T], and a valid column for every label, [T, 1]."""
    return (labels_T >= 0) & (labels_T < width), labels_T.clamp(0, width - 1)[:, None]


def _cached_blocks(tile_TW: Tensor) -> Iterator[slice]:
    num_tokens, width = tile_TW.shape
    step = max(1, CACHED_ELEMENTS // width)
    return (slice(start, start + step) for start in range(0, num_tokens, step))
