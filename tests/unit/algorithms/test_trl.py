"""VESPO, GSPO and SAPO against TRL's losses, on padded [sequences, longest] tensors.

TRL has no public call of a loss without a trainer: its formulas are written anew here, as its GRPOTrainer has
them for loss_type "vespo", "grpo" with importance_sampling_level "sequence" (GSPO) and "sapo". VESPO's weight
has one, and where trl is installed it is called.

Shape suffixes: T packed tokens, S sequences, N the longest sequence.
"""

import math

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from megatron_vespo.algorithms.losses.aggregation import count, weighted_sum
from megatron_vespo.algorithms.losses.inputs import LossInputs
from megatron_vespo.algorithms.losses.table import METHODS
from megatron_vespo.algorithms.vespo import GammaKernel
from tests.support.naive_losses import batch

LENGTHS = [7, 1, 30, 12, 3]
ADVANTAGES_S = torch.tensor([0.8, -1.1, -0.3, 1.7, 0.0])
KERNEL = GammaKernel()


def gamma_weights(advantages_S1, log_ratio_SN, mask_SN):
    """TRL's phi(W) [S, 1]: token ratios and log W clamped, NaN and infinities made 0."""
    log_w_S1 = (log_ratio_SN.clamp(-20, 20) * mask_SN).sum(-1, keepdim=True).clamp(math.log(1e-8), 20)
    k_S1 = torch.where(advantages_S1 >= 0, KERNEL.positive[0], KERNEL.negative[0])
    lambda_S1 = torch.where(advantages_S1 >= 0, KERNEL.positive[1], KERNEL.negative[1]).clamp(min=1e-4)
    return (lambda_S1 + k_S1 * log_w_S1 - lambda_S1 * log_w_S1.exp()).exp().nan_to_num(0.0, 0.0, 0.0)


def trl_vespo(log_probs_SN, old_SN, mask_SN, advantages_S1):
    phi_S1 = gamma_weights(advantages_S1, (log_probs_SN - old_SN).detach(), mask_SN)
    loss_SN = -phi_S1 * advantages_S1 * log_probs_SN
    return (loss_SN * mask_SN).sum() / mask_SN.sum()


def trl_gspo(log_probs_SN, old_SN, mask_SN, advantages_S1):
    log_ratio_SN = log_probs_SN - old_SN
    length_S1 = mask_SN.sum(-1, keepdim=True).clamp(min=1.0)
    s_S1 = ((log_ratio_SN * mask_SN).sum(-1, keepdim=True) / length_S1).exp()
    bounded_S1 = s_S1.clamp(1 - 3e-4, 1 + 4e-4)
    return -torch.min(s_S1 * advantages_S1, bounded_S1 * advantages_S1).mean()


def trl_sapo(log_probs_SN, old_SN, mask_SN, advantages_S1):
    ratio_SN = (log_probs_SN - old_SN).exp()
    tau_S1 = torch.where(advantages_S1 > 0, 1.0, 1.05)
    loss_SN = -torch.sigmoid(tau_S1 * (ratio_SN - 1)) * 4 / tau_S1 * advantages_S1
    return ((loss_SN * mask_SN).sum(-1) / mask_SN.sum(-1)).mean()


def tokens(spread) -> LossInputs:
    """Responses alone, without their prompts and without padding."""
    inputs = batch(LENGTHS, ADVANTAGES_S.tolist(), spread=spread, dtype=torch.float32)
    kept_T = inputs.loss_mask_T > 0
    tensors = {k: v for k, v in vars(inputs).items() if v is not None}
    return LossInputs(**{k: v.detach()[kept_T] if k.endswith("_T") else v for k, v in tensors.items()})


def padded(values_T):
    return pad_sequence(values_T.split(LENGTHS), batch_first=True)


@pytest.mark.parametrize("spread", [1e-4, 0.1], ids=["near", "far"])
@pytest.mark.parametrize(
    ("method", "aggregation", "theirs"),
    [
        ("vespo", "token-mean", trl_vespo),
        ("gspo", "sequence-mean-token-mean", trl_gspo),
        ("sapo", "sequence-mean-token-mean", trl_sapo),
    ],
)
def test_loss_and_gradient_are_those_of_trls_formulas(method, aggregation, theirs, spread):
    inputs = tokens(spread)
    log_probs_T = inputs.log_probs_T.requires_grad_()
    # theirs in float64, of the same float32 numbers: what is left is our rounding
    reference_T = log_probs_T.detach().double().requires_grad_()
    old_T = reference_T.detach() - inputs.log_ratio_T.double()
    mask_SN = padded(torch.ones_like(reference_T))
    expected = theirs(padded(reference_T), padded(old_T), mask_SN, ADVANTAGES_S[:, None].double())
    [expected_T] = torch.autograd.grad(expected, reference_T)

    term = METHODS[method].bind(KERNEL, None, None, None)(inputs)
    loss = weighted_sum(term.loss_T, inputs, aggregation, 1) / count(inputs, aggregation, True)
    [gradient_T] = torch.autograd.grad(loss, log_probs_T)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        gradient_T.double(), expected_T, rtol=0, atol=1e-6 * expected_T.abs().max().item()
    )


def test_phi_is_trls_own():
    trainer = pytest.importorskip(
        "trl.trainer.grpo_trainer", reason="TRL is compared with where all that it needs is installed"
    )
    gamma_weights_of_trl = getattr(trainer.GRPOTrainer, "get_gamma_weights", None)
    if gamma_weights_of_trl is None:
        pytest.skip("this TRL has no VESPO")
    inputs = tokens(0.1)
    log_ratio_SN, mask_SN = padded(inputs.log_ratio_T), padded(inputs.loss_mask_T)
    theirs_S1 = gamma_weights_of_trl(
        advantages=ADVANTAGES_S[:, None], log_ratio_per_token=log_ratio_SN, mask=mask_SN,
        importance_sampling_ratio=None, k_pos=2.0, lambda_pos=3.0, k_neg=3.0, lambda_neg=2.0,
    )  # fmt: skip
    ours_S = KERNEL.phi(log_ratio_SN.double().sum(-1), ADVANTAGES_S)
    torch.testing.assert_close(theirs_S1[:, 0].float(), ours_S, rtol=5e-6, atol=0)
