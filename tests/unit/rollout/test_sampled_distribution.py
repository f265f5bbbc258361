"""What would let engines sample from something else than their log-probs describe is refused by name."""

import pytest

from megatron_vespo.rollout.sampled_distribution import check_environment, check_flags

PREFERRED = "--preferred-sampling-params"


@pytest.mark.parametrize("value", ["1", "true", "True", "yes", "on", "2"])
def test_log_probs_before_the_temperature(value):
    with pytest.raises(ValueError, match=f"^SGLANG_RETURN_ORIGINAL_LOGPROB={value}: .*: unset it$"):
        check_environment({"SGLANG_RETURN_ORIGINAL_LOGPROB": value})


@pytest.mark.parametrize("value", [None, "", "0", "false", "No"])
def test_the_variable_that_is_off(value):
    check_environment({} if value is None else {"SGLANG_RETURN_ORIGINAL_LOGPROB": value})


@pytest.mark.parametrize(
    ("params", "named"),
    [
        ('{"repetition_penalty": 1.3}', "repetition_penalty 1.3"),
        ('{"top_k": -1, "frequency_penalty": 0.1}', "frequency_penalty 0.1"),
        ('{"presence_penalty": -0.5}', "presence_penalty -0.5"),
        ('{"top_p": 0.9}', "top_p 0.9"),
        ('{"top_k": 20}', "top_k 20"),
        ('{"min_p": 0.1}', "min_p 0.1"),
        ('{"temperature": 0.7}', "temperature 0.7"),
        ('{"min_new_tokens": 3}', "min_new_tokens 3"),
        ('{"logit_bias": {"5": 1.0}}', 'logit_bias {"5": 1.0}'),
        ('{"regex": "a+"}', 'regex "a+"'),
        ('{"ignore_eos": true}', "ignore_eos true"),
        ('{"n": 2}', "n 2"),
        ('{"a_field_of_tomorrow": 1}', "a_field_of_tomorrow 1"),
    ],
)
def test_preferred_parameters_that_change_what_is_sampled(params, named):
    with pytest.raises(ValueError) as error:
        check_flags(["--tp-size", "2", PREFERRED, params])
    field = named.split()[0]
    instead = {name: f"use --rollout-{name.replace('_', '-')}" for name in ("top_p", "top_k", "min_p")}
    assert str(error.value) == (
        f"--sglang{PREFERRED[1:]} has {named}: engines' log-probs do not describe what is sampled with "
        f"{named}, and training needs them to; {instead.get(field, 'leave it out')}"
    )


@pytest.mark.parametrize(
    "params",
    [
        "{}",
        '{"repetition_penalty": 1.0, "top_p": 1, "top_k": -1, "min_p": 0.0, "n": 1, "temperature": null}',
        '{"frequency_penalty": 0, "logit_bias": {}, "regex": "", "ignore_eos": false}',
        '{"skip_special_tokens": false, "no_stop_trim": true}',
    ],
)
def test_neutral_parameters_pass(params):
    check_flags([PREFERRED, params])
    check_flags(["--tp-size", "2"])


@pytest.mark.parametrize(
    ("params", "said"), [("{", "is not JSON"), ("[1]", "a JSON object is expected"), ("1.3", "a JSON object")]
)
def test_what_is_no_object(params, said):
    with pytest.raises(ValueError, match=said):
        check_flags([PREFERRED, params])


@pytest.mark.parametrize(
    "flag", ["--speculative-accept-threshold-single", "--speculative-accept-threshold-acc"]
)
def test_speculative_decoding_that_accepts_more_than_it_may(flag):
    check_flags([flag, "1.0"])
    with pytest.raises(ValueError, match=f"^--sglang{flag[1:]} 0.9: "):
        check_flags([flag, "0.9"])
