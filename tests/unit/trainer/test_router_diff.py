"""A megatron-core without the router's diff is refused by name."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
from megatron.core.transformer.moe import moe_utils

from megatron_vespo.trainer import capabilities
from tests.support.apply_patches import ROOT, apply

DIFF = ROOT / "patches/megatron-core-0.19.2/0003-router-sorted-topk.diff"


@pytest.fixture
def unpatched(tmp_path, monkeypatch):
    """Megatron's module as it is published."""
    [patch] = apply.parse_diff(DIFF)
    text = apply.convert(patch, Path(moe_utils.__file__).read_text(), revert=True)
    path = tmp_path / "published_moe_utils.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location("published_moe_utils", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(capabilities, "moe_utils", module)


def model(**fields) -> SimpleNamespace:
    return SimpleNamespace(**{"num_experts": 128, "moe_router_topk": 8, "moe_router_fusion": False} | fields)


def test_refused(unpatched):
    with pytest.raises(ValueError) as error:
        capabilities.check_router(model(), "trainer rank 3 on node-7")
    assert str(error.value) == (
        "trainer rank 3 on node-7: megatron-core lacks the diff 0003-router-sorted-topk, W of an unchanged "
        "policy would not be 1: python patches/apply.py apply"
    )


@pytest.mark.parametrize(
    "fields", [{"num_experts": None}, {"moe_router_topk": 2}, {"moe_router_fusion": True}]
)
def test_models_that_do_not_need_it(unpatched, fields):
    capabilities.check_router(model(**fields), "here")


def test_with_it():
    capabilities.check_router(model(), "here")
