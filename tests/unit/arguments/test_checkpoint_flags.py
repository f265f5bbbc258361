"""Flags of saving and of failures: what is refused, in one line."""

from argparse import ArgumentParser, Namespace

import pytest

from megatron_vespo.arguments.checkpoint import (
    add_checkpoint_arguments,
    check_checkpoints,
    check_megatron_saving,
)


def parse(*argv: str) -> Namespace:
    parser = ArgumentParser()
    add_checkpoint_arguments(parser)
    return parser.parse_args(argv)


def test_the_defaults_are_accepted():
    check_checkpoints(parse())


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="^--trainer-restarts is -1, must not be negative$"):
        check_checkpoints(parse("--trainer-restarts", "-1"))


def test_megatrons_worker_process_and_other_formats_are_refused():
    good = {
        "use_persistent_ckpt_worker": False,
        "save_interval": 50,
        "save": "folder",
        "ckpt_format": "torch_dist",
    }
    check_megatron_saving(Namespace(**good))
    check_megatron_saving(Namespace(**good | {"save": None, "ckpt_format": "torch"}))
    with pytest.raises(ValueError, match="^--use-persistent-ckpt-worker: .* leave it out$"):
        check_megatron_saving(Namespace(**good | {"use_persistent_ckpt_worker": True}))
    with pytest.raises(ValueError, match="^--ckpt-format torch: "):
        check_megatron_saving(Namespace(**good | {"ckpt_format": "torch"}))
