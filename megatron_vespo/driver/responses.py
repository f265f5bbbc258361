"""How responses are made: by one request, by episodes with an environment, or by a user's function."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_vespo.arguments.environment import EnvironmentSettings
from megatron_vespo.data.tokenizer import ChatFormat
from megatron_vespo.data.turns import TurnTemplate
from megatron_vespo.rollout.environment import load_environment, tools_of
from megatron_vespo.rollout.episode import EpisodeLimits, Episodes
from megatron_vespo.rollout.generate_function import (
    CustomGeneration,
    GenerateContext,
    load_generate_function,
)
from megatron_vespo.rollout.sampler import Maker


def with_tools(form: ChatFormat, settings: EnvironmentSettings) -> ChatFormat:
    """Return the format with the environment's tools, which the chat template describes in every prompt.

    ValueError if the template does not read `tools`, or if the environment refuses it. Tools of
    --chat-template-arguments come first.
    """
    if settings.environment is None or not form.apply_template:
        return form
    environment = load_environment(settings.environment)
    if (check := getattr(environment, "check_template", None)) is not None:
        check(form.tokenizer.get_chat_template())
    if (tools := tools_of(environment)) is None:
        return form
    return replace(form, arguments={"tools": tools} | dict(form.arguments))


def make_maker(settings: EnvironmentSettings, form: ChatFormat, tokenizer: Any, folder: Any) -> Maker | None:
    """Return what makes responses; None if one request is one response.

    `folder` is that of the tokenizer, for messages. ValueError for an environment, a function or a chat
    template that cannot be used.
    """
    name = f"--hf-checkpoint {folder}"
    if settings.environment is not None:
        environment = load_environment(settings.environment)
        turns = TurnTemplate(form, name, getattr(environment, "roles", ("user",)))
        limits = EpisodeLimits(settings.max_turns, settings.max_turn_tokens, settings.environment_timeout)
        return Episodes(environment, turns, tokenizer, limits)
    if settings.generate_function is not None:
        function = load_generate_function(settings.generate_function)
        context = GenerateContext(tokenizer, _turns(form, name), is_evaluation=False)
        return CustomGeneration(function, context)
    return None


def _turns(form: ChatFormat, name: str) -> TurnTemplate | None:
    try:
        return TurnTemplate(form, name)
    except ValueError:  # the function may not need it
        return None
