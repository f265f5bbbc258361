"""The tokens that a chat template puts between two turns of the policy."""

import pytest

from megatron_vespo.data.tokenizer import ChatFormat
from megatron_vespo.data.turns import TurnTemplate
from tests.support.letter_tokenizer import letters

APPENDS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}~ {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# thinking is kept in the last answer alone, and results of tools are grouped, as in Qwen3's template
THINKING = (
    "{% for m in messages %}"
    "{% if m.role == 'tool' %}{% if messages[loop.index0 - 1].role != 'tool' %}<user>{% endif %}"
    "[{{ m.content }}]{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}~ {% endif %}"
    "{% else %}<{{ m.role }}>"
    "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ m.content }}~ {% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
COUNTS_TURNS = "{% for m in messages %}<{{ m.role }} {{ messages|length }}>{{ m.content }}~ {% endfor %}"
TOOLS_AT_THE_END = (
    "{% for m in messages %}{% if loop.last and m.role == 'user' %}(tools){% endif %}"
    "<{{ m.role }}>{{ m.content }}~ {% endfor %}"
)
FIRST_ANSWER_ONLY = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.role != 'assistant' or loop.last %}{{ m.content }}{% endif %}~ {% endfor %}"
)
NO_TOOLS = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}~ {% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
IGNORES_TOOLS = "{% for m in messages %}{% if m.role != 'tool' %}" + APPENDS.partition("%}")[2].replace(
    "{% endfor %}", "{% endif %}{% endfor %}"
)
# writes empty thinking into the answers after the last question alone, as Qwen3.6's template does
EMPTY_THINKING = (
    "{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' and loop.index0 > ns.last %}"
    "<think> </think> {% endif %}{{ m.content }}~ {% endfor %}"
    "{% if add_generation_prompt %}<assistant><think> {% endif %}"
)


def template(text: str, *roles: str) -> TurnTemplate:
    return TurnTemplate(ChatFormat(letters(text)), "the model", roles or ("user",))


def text_of(token_ids) -> str:
    return "".join(map(chr, token_ids.tolist()))


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        ("~", " <user>Why?~ <assistant>"),  # the policy has written the end itself
        ("x", "~ <user>Why?~ <assistant>"),  # it has ended in another way
    ],
)
def test_a_message_follows_an_answer(last, expected):
    made = template(APPENDS).next_turn([{"role": "user", "content": "Why?"}], ord(last))
    assert text_of(made) == expected and made.dtype.name == "int32"


def test_an_observation_may_begin_with_the_last_token():
    """The template writes no end of an answer, so nothing of the observation may stand for it."""
    bare = template("{% for m in messages %}{{ m.content }}{% endfor %}")
    made = bare.next_turn([{"role": "user", "content": "39 letters"}], ord("3"))
    assert text_of(made) == "39 letters"


def test_thinking_that_the_template_drops_is_no_rewriting():
    made = template(THINKING, "user", "tool").next_turn([{"role": "user", "content": "Why?"}], ord("~"))
    assert text_of(made) == " <user>Why?~ <assistant>"


def test_results_of_several_tools_are_rendered_together():
    results = [{"role": "tool", "content": str(number)} for number in (4, 7)]
    assert text_of(template(THINKING, "tool").next_turn(results, ord("~"))) == " <user>[4][7]~ <assistant>"


def test_empty_thinking_that_the_template_adds_is_no_rewriting():
    made = template(EMPTY_THINKING, "user", "tool")
    for role in ("user", "tool"):
        given = text_of(made.next_turn([{"role": role, "content": "Why?"}], ord("~")))
        assert given == f" <{role}>Why?~ <assistant><think> "


def test_a_role_is_checked_when_it_first_appears():
    made = template(NO_TOOLS)
    with pytest.raises(ValueError, match="the chat template refuses the messages: no tools here"):
        made.next_turn([{"role": "tool", "content": "7"}], ord("~"))


def test_an_observation_may_say_what_the_stand_in_says():
    text = "Stand-in answer 0. Stand-in observation. 7cut7 7cut77"
    given = template(APPENDS).next_turn([{"role": "user", "content": text}], ord("~"))
    assert text_of(given) == f" <user>{text}~ <assistant>"


@pytest.mark.parametrize(
    ("text", "role", "message"),
    [
        (COUNTS_TURNS, "user", "rewrites earlier turns when a message of role 'user' follows"),
        (TOOLS_AT_THE_END, "user", "rewrites earlier turns when a message of role 'user' follows"),
        (FIRST_ANSWER_ONLY, "user", "leaves out an earlier answer"),
        (IGNORES_TOOLS, "tool", "leaves out messages of role 'tool' that follow an answer"),
        (NO_TOOLS, "tool", "the chat template refuses the messages: no tools here"),
    ],
)
def test_a_template_that_does_not_append_is_refused(text, role, message):
    with pytest.raises(ValueError, match=message):
        template(text, role)


def test_there_is_a_template():
    with pytest.raises(ValueError, match="leave out --no-chat-template"):
        TurnTemplate(ChatFormat(letters(None), apply_template=False), "the model")
