"""Flags that had another name are refused with the new one named."""

import pytest

from megatron_vespo.arguments.parser import FlagParser
from megatron_vespo.arguments.renamed import RENAMED
from megatron_vespo.arguments.training_flags import add_vespo_arguments


@pytest.mark.parametrize("old", RENAMED)
@pytest.mark.parametrize("form", ["{} 3", "{}=3"])
def test_an_old_spelling_names_the_new_one(old, form, capsys):
    parser = add_vespo_arguments(FlagParser(prog="megatron-vespo train"))
    assert RENAMED[old].split()[0] in parser._option_string_actions
    with pytest.raises(SystemExit) as exit:
        parser.parse_known_args(form.format(old).split())
    assert exit.value.code == 2
    assert f"{old} is called {RENAMED[old]} now" in capsys.readouterr().err


def test_a_command_that_has_such_a_flag_itself_takes_it():
    parser = FlagParser(prog="megatron-vespo evaluate")
    parser.add_argument("--num-completions", type=int)
    assert parser.parse_args(["--num-completions", "3"]).num_completions == 3
